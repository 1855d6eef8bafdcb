"""The LR of every step, from the scheduler a run would have, stepped through the whole run with nothing to train."""

import contextlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from megatron_patch.upstream.dry.machine import assigned, megatrons_checks


@dataclass(frozen=True)
class Schedule:
    """One value for each optimizer step t = 0, 1, ... of the run."""

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


def schedule(args: Any, groups: Sequence[Mapping[str, Any]]) -> Schedule:
    """Step Megatron's scheduler, or ours where it is installed, through all iterations of a run.

    The batch size grows as Megatron's own calculator says.

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
    factors, samples = array("d"), 0
    with megatrons_checks(), assigned(global_vars, _GLOBAL_ARGS=args), _batches(args) as increment:
        scheduler = training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=live))
        factor = getattr(scheduler, "factor", lambda: 1.0)
        for _ in range(args.train_iters):
            factors.append(factor())
            for group, (lrs, decays) in zip(live, columns, strict=True):
                lrs.append(group["lr"])
                decays.append(group["weight_decay"])
            batch = increment(samples)
            scheduler.step(batch)
            samples += batch
    final = args.end_weight_decay
    by_group = {(g["max_lr"], g["wd_mult"] * final): c for g, c in zip(live[1:], columns[1:], strict=True)}
    return Schedule(factors, *columns[0], by_group, samples)


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
