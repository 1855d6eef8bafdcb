"""The LR of a run's steps, from the scheduler the run would have, with nothing to train."""

import contextlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from megatron_patch.theory.schedules import decay_away_step
from megatron_patch.upstream.dry.machine import assigned, megatrons_checks

ALL_STEPS = 500_000
"""Up to so many steps, every one is made; of a longer run, the first `FINE` and then fewer and fewer."""
FINE = 2_000
"""A stretch of a longer run is one part in so many of what lies before it."""


@dataclass(frozen=True)
class Schedule:
    """One value for each optimizer step, or for some of a very long run's."""

    times: array[int]
    """The optimizer steps t, rising from 0; the last step of the run is among them."""
    factor: array[float]
    """The extra warmup's f_t; 1 without one."""
    lr: array[float]
    """LR of a parameter with the base LR: Megatron's schedule times the factor."""
    weight_decay: array[float]
    """Weight decay of the base model."""
    groups: Mapping[tuple[float, float], tuple[array[float], array[float]]]
    """LR and weight decay of the param groups, by their peak LR and final weight decay."""
    samples: int
    """Samples the run trains on."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.times[-1] + 1 if self.times else 0

    def lengths(self) -> Iterator[int]:
        """Yield how many steps each entry stands for."""
        return (later - t for t, later in zip(self.times, [*self.times[1:], self.steps], strict=True))


def schedule(args: Any, groups: Sequence[Mapping[str, Any]]) -> Schedule:
    """Take Megatron's scheduler, or ours where it is installed, through all iterations of a run.

    The batch size grows as Megatron's own calculator says. A run longer than `ALL_STEPS` is taken in stretches: LR and
    weight decay are exact at the steps that are returned, the factor decay-away up to the curvature of the schedule
    within one part in `FINE` of the run so far.

    Args:
        args: Megatron's, validated; its --train-iters is worked out here where --train-samples was given.
        groups: param groups, without their parameters.

    Raises:
        ConfigError: the run has no length, or Megatron refuses the schedule.
    """
    from megatron.training import global_vars, training

    base = {"max_lr": args.lr, "min_lr": args.min_lr, "wd_mult": 1.0, "lr_mult": 1.0, "width_dependent": 1.0}
    live = [{"lr": 0.0, "weight_decay": 0.0, **group} for group in (base, *groups)]
    columns = [(array("d"), array("d")) for _ in live]
    times, factors, samples, t = array("q"), array("d"), 0, 0
    with megatrons_checks(), assigned(global_vars, _GLOBAL_ARGS=args), _batches(args) as increment:
        scheduler = training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=live))
        factor = getattr(scheduler, "factor", lambda: 1.0)
        while t < args.train_iters:
            times.append(t)
            factors.append(factor())
            for group, (lrs, decays) in zip(live, columns, strict=True):
                lrs.append(group["lr"])
                decays.append(group["weight_decay"])
            batch = increment(samples)
            steps = 1
            if args.train_iters > ALL_STEPS and t < args.train_iters - 1:
                steps = max(1, min(t // FINE, args.train_iters - 1 - t))
                while steps > 1 and increment(samples + (steps - 1) * batch) != batch:  # it ramps up on the way
                    steps //= 2
            _advance(scheduler, steps, batch)
            samples += steps * batch
            t += steps
    final = args.end_weight_decay
    by_group = {(g["max_lr"], g["wd_mult"] * final): c for g, c in zip(live[1:], columns[1:], strict=True)}
    return Schedule(times, factors, *columns[0], by_group, samples)


def _advance(scheduler: Any, steps: int, batch: int) -> None:
    """Make `steps` optimizer steps of `batch` samples, all but the last one at once."""
    if steps > 1:
        if hasattr(scheduler, "decay_product"):  # ours: what it sums up along the way
            first = scheduler.base_lr(), scheduler.get_wd()
            scheduler.num_steps += (steps - 2) * batch
            last = scheduler.base_lr(), scheduler.get_wd()
            mean = [(a + b) / 2 for a, b in zip(first, last, strict=True)]
            scheduler.decay_product *= decay_away_step(1.0, *mean) ** (steps - 1)
            scheduler.num_steps += batch
            scheduler.optimizer_steps += steps - 1
        else:
            scheduler.num_steps += (steps - 1) * batch
    scheduler.step(batch)


@contextlib.contextmanager
def _batches(args: Any) -> Iterator[Callable[[int], int]]:
    """Set up Megatron's batch-size calculator; gives a function from samples consumed to those of the next step."""
    from megatron.core import num_microbatches_calculator as calculator

    calculator.init_num_microbatches_calculator(
        rank=args.rank,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size,
        decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
        step_batch_size_schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    )
    ramp = args.step_batch_size_schedule is not None

    def batch(samples: int) -> int:
        if ramp:
            calculator.update_num_microbatches(samples, consistency_check=False)
        return int(calculator.get_num_microbatches()) * int(args.micro_batch_size) * int(args.data_parallel_size)

    try:
        yield batch
    finally:
        calculator.unset_num_microbatches_calculator()
