"""The metrics in Megatron's training step: when to measure, and where the results go."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_patch.config import MetricsConfig, Settings
from megatron_patch.config.pattern import pattern_of
from megatron_patch.errors import ConfigError
from megatron_patch.metrics.forecast import NormForecast
from megatron_patch.metrics.meter import Meter, Sums
from megatron_patch.metrics.registry import Registry, Sublayer
from megatron_patch.metrics.reporter import Measured, Reporter, open_alarm, open_files
from megatron_patch.metrics.sample import Sample
from megatron_patch.metrics.views import group_size
from megatron_patch.metrics.writers import log_scalars
from megatron_patch.upstream.monitor.linears import find_linears, routed_layers
from megatron_patch.upstream.monitor.masters import find_masters, live_hyperparameters
from megatron_patch.upstream.monitor.sublayers import find_sublayers
from megatron_patch.upstream.ranks import collectively
from megatron_patch.upstream.width.optimizers import update_growth
from megatron_patch.upstream.width.parameters import NamedParameter


@dataclass(frozen=True)
class _Step:
    """What is known of one step of the optimizer; by default of one in which nothing is measured."""

    iteration: int = 0
    """1-based."""
    spectral: bool = False
    sample: Sample | None = None
    """The tokens to look at, where alignment is measured."""
    hyperparameters: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Learning rate and weight decay by param group, known right before the update."""

    @property
    def alignment(self) -> bool:
        """Whether alignment is measured."""
        return self.sample is not None

    @property
    def measured(self) -> bool:
        """Whether anything is."""
        return self.alignment or self.spectral


class AlignmentMonitor:
    """Measures a run. All methods are called on every rank, at the same points of every step.

    Order of calls in one step: `begin_step` (again if forward and backward are repeated), forward and backward,
    `before_update`, the optimizer's step, `after_update`; in the end `flush`. On iterations that are not measured no
    hook is attached, no tensor is touched and no rank communicates; the forecast advances by a few floats per param
    group.

    Build it when the optimizer has its fp32 weights, that is after a checkpoint is loaded; the constructor is a
    collective call. With `settings.directory` it cuts the files there back to `args.iteration`.

    Args:
        settings: what to measure and where to write it.
        model: Megatron's model chunks.
        parameters: every parameter of this rank, described.
        optimizer: Megatron's.
        args: Megatron's arguments.
        log: gives values to the run's writers, on the rank that has them; Megatron's by default.

    Raises:
        ConfigError: no layer matches --alignment-layers.
    """

    def __init__(
        self,
        settings: MetricsConfig,
        model: Sequence[torch.nn.Module],
        parameters: Sequence[NamedParameter],
        optimizer: Any,
        args: Any,
        log: Callable[[Mapping[str, float], int], None] | None = None,
    ) -> None:
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config

        self._settings = settings
        self._args = args
        self._log = log or _log
        self._optimizer = optimizer
        self._step = _Step()
        config = get_model_config(model[0])
        wanted = re.compile(settings.alignment_layers)
        # What may fail on one rank alone does so on all, before any rank waits for the others.
        found = collectively(
            lambda: find_linears(
                model, parameters, config, parallel_state, find_masters(optimizer), wanted, update_growth(args)
            )
        )
        sublayers = find_sublayers(model, found.views, config, parallel_state)
        world = dist.group.WORLD
        self._registry = Registry(
            [row for view in found.views for row in view.rows],
            [Sublayer(s.name, s.input_row, s.width) for s in sublayers],
            world,
        )
        self._lines_wanted = [wanted.search(row.layer) is not None for row in self._registry.rows]
        means = dict.fromkeys(row.mean for row in self._registry.rows if row.mean is not None)
        self._means_wanted = tuple(mean for mean in means if wanted.search(mean))
        if not any(self._lines_wanted) and not self._means_wanted:
            raise ConfigError(
                "--alignment-layers",
                settings.alignment_layers,
                "a pattern that matches a linear layer of this model",
                "see the names in hyperparameters.json",
            )
        device = torch.empty(0, device="cuda").device  # where Megatron puts parameters; a stage may be without any
        routed = routed_layers(self._registry.rows)
        routers = [point for moe_layer, point in found.routers.items() if moe_layer in routed]
        self._meter = Meter(found.views, [*found.points, *routers], sublayers, self._registry, world, device)
        self._pattern = pattern_of(vars(args))
        growths = {row.layer: row.update_rms for row in self._registry.rows}
        groups_of_layers = self._param_groups(found.param_groups)
        self.forecast = NormForecast(groups_of_layers, self._weight_rms(), self._pattern, growths)
        self._unwritten: tuple[_Step, Sums, NormForecast] | None = None
        self._reporter = self._make_reporter() if args.rank == args.world_size - 1 else None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the lines that are reported, in the order of the file: the means over experts last."""
        lines = zip(self._registry.rows, self._lines_wanted, strict=True)
        return (*(row.layer for row, wanted in lines if wanted), *self._means_wanted)

    @property
    def held_bytes(self) -> int:
        """Bytes that the metrics hold on this rank right now beyond the training's own."""
        return self._meter.held_bytes

    def begin_step(self) -> None:
        """Start a forward and backward pass; `args.curr_iteration` is the number of the step, from 0."""
        iteration, settings = self._args.curr_iteration + 1, self._settings
        sample = Sample(iteration, self._token_count()) if _due(iteration, settings.alignment_interval) else None
        self._step = _Step(iteration, _due(iteration, settings.spectral_interval), sample)
        if sample is not None:
            self._meter.begin(sample)

    def before_update(self) -> None:
        """Use the weights of this step while they are there; call it right before the optimizer's step."""
        self.flush()
        step = self._step = replace(self._step, hyperparameters=live_hyperparameters(self._optimizer))
        if step.measured:
            self._meter.before_update(step.alignment, step.spectral)

    def after_update(self, succeeded: bool) -> None:
        """Measure the update; call it right after the optimizer's step. It is written by the next `flush`.

        Args:
            succeeded: whether the optimizer of this rank made the step (it skips one at an overflow).
        """
        step, self._step = self._step, _Step()
        if step.measured:
            sums = self._meter.after_update(succeeded)
            if self._reporter is not None:
                self._unwritten = step, sums, self.forecast.snapshot()
        if succeeded:
            self.forecast.step(step.hyperparameters)

    def flush(self) -> None:
        """Write what was measured last, if that is not written yet, on the one rank that writes.

        By the next step's update the sums have long arrived, and the host need not wait for them. Also to be called
        before a checkpoint is saved, whose iteration is the last that a resumed run does not repeat, and at the end.
        """
        if self._unwritten is None or self._reporter is None:
            return
        (step, sums, forecast), self._unwritten = self._unwritten, None
        table, sublayers, skipped = sums.read()
        measured = Measured(
            step.iteration, step.alignment, step.spectral, not skipped, table.tolist(), sublayers.tolist()
        )
        self._reporter.report(measured, forecast)

    def _make_reporter(self) -> Reporter:
        """Return what writes, on the one rank that does.

        Raises:
            ConfigError: the proxy's folder cannot be read, or holds no layer of this model.
            OSError: a file cannot be written.
        """
        settings, args, directory = self._settings, self._args, self._settings.directory
        files = alarm = None
        for flag, interval in (
            ("--alignment-interval", settings.alignment_interval),
            ("--spectral-interval", settings.spectral_interval),
        ):
            if interval > 0 and args.train_iters // interval == args.iteration // interval:
                print(
                    f"WARNING: {flag} {interval}: no iteration from {args.iteration + 1} to {args.train_iters}, where "
                    "this run ends, is a multiple of it: nothing is measured; give a smaller interval",
                    flush=True,
                )
        if directory is not None:
            files = open_files(directory, args.iteration)
            if settings.reference_run is not None:
                alarm = open_alarm(
                    settings.reference_run,
                    directory,
                    self.layers,
                    Settings.of(vars(args)).width.trained_by(),
                    args.train_iters,
                    args.iteration,
                    settings.reference_factor,
                    settings.reference_count,
                    self._pattern,
                )
        return Reporter(
            self._registry, self._lines_wanted, args.hidden_size, self._log, files, alarm, self._means_wanted
        )

    def _token_count(self) -> int:
        """Return how many tokens to look at on each data-parallel rank."""
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        args = self._args
        microbatch = args.micro_batch_size * args.seq_length // args.context_parallel_size
        if self._settings.alignment_tokens is not None:
            return int(min(self._settings.alignment_tokens, microbatch))
        return int(min(max(64, microbatch * get_num_microbatches() // 64), microbatch))

    def _param_groups(self, known: dict[str, str]) -> dict[str, str]:
        """Return the param group of every line of the model; ranks that own slices of a weight tell the others."""
        world = dist.group.WORLD
        gathered = [known]
        if group_size(world) > 1:
            gathered = [{}] * group_size(world)
            dist.all_gather_object(gathered, known, group=world)
        return {layer: group for rank in gathered for layer, group in rank.items()}

    def _weight_rms(self) -> dict[str, float]:
        squares = self._meter.weight_norms()
        return {
            row.layer: (square / (row.fan_in * row.fan_out)) ** 0.5
            for row, square in zip(self._registry.rows, squares, strict=True)
        }


def _log(values: Mapping[str, float], iteration: int) -> None:
    """Give values to the writers that Megatron has opened by now."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    log_scalars(values, iteration, get_tensorboard_writer(), get_wandb_writer())


def _due(iteration: int, interval: int) -> bool:
    return interval > 0 and iteration % interval == 0


def watch(monitor: AlignmentMonitor, optimizer: Any) -> None:
    """Make an optimizer call the monitor: `zero_grad` starts a step, `step` is measured around.

    Megatron calls both on the instance, once per step; `zero_grad` again when forward and backward are repeated.
    """
    zero_grad, step = optimizer.zero_grad, optimizer.step

    def begin(*args: Any, **kwargs: Any) -> Any:
        result = zero_grad(*args, **kwargs)
        monitor.begin_step()
        return result

    def measured(*args: Any, **kwargs: Any) -> Any:
        monitor.before_update()
        result = step(*args, **kwargs)
        monitor.after_update(bool(result[0]))
        return result

    optimizer.zero_grad, optimizer.step = begin, measured
