"""The metrics in Megatron's training step: when to measure, and where the results go."""

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_patch.config import MetricsConfig
from megatron_patch.errors import ConfigError
from megatron_patch.files.json_lines import JsonLines
from megatron_patch.files.lines import CheckLine, read_lines
from megatron_patch.metrics.alarm import FILE, TransferCheck, collapsed, read_proxy, rules_of
from megatron_patch.metrics.derive import (
    METRICS,
    alignment_line,
    equilibrium_line,
    expert_means,
    sublayer_line,
)
from megatron_patch.metrics.forecast import NormForecast
from megatron_patch.metrics.meter import Meter
from megatron_patch.metrics.probes import Sample
from megatron_patch.metrics.registry import Registry, Sublayer
from megatron_patch.metrics.views import group_size
from megatron_patch.metrics.writers import log_scalars, scalars
from megatron_patch.upstream.monitor.linears import find_linears
from megatron_patch.upstream.monitor.masters import find_masters, live_hyperparameters
from megatron_patch.upstream.monitor.sublayers import find_sublayers
from megatron_patch.upstream.refusals import check_supported
from megatron_patch.upstream.width.parameters import NamedParameter

_EQUILIBRIUM_METRICS = (
    "weight_rms",
    "predicted_weight_rms",
    "predicted_relative_update",
    "normalised_top_singular_value",
)


class AlignmentMonitor:
    """Measures a training run. All methods are called on every rank, at the same points of every step.

    Order of calls in one step: `begin_step` (again if forward and backward are repeated), forward and backward,
    `before_update`, the optimizer's step, `after_update`. On iterations that are not measured no hook is attached, no
    tensor is touched and no rank communicates; the forecast advances by a few floats per param group.

    Build it when the optimizer has its fp32 weights, that is after a checkpoint is loaded; the constructor is a
    collective call. With `settings.directory` it cuts the files there back to `args.iteration`.

    Args:
        settings: what to measure and where to write it.
        model: Megatron's model chunks.
        parameters: every parameter of this rank, described.
        optimizer: Megatron's.
        args: Megatron's arguments.

    Raises:
        ConfigError: something the metrics cannot be exact with; no layer matches --alignment-layers.
    """

    def __init__(
        self,
        settings: MetricsConfig,
        model: Sequence[torch.nn.Module],
        parameters: Sequence[NamedParameter],
        optimizer: Any,
        args: Any,
    ) -> None:
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config

        check_supported(args)
        self._settings = settings
        self._args = args
        self._optimizer = optimizer
        self._sample: Sample | None = None
        self._iteration = 0
        self._last_spectral = args.iteration
        self._alignment = self._spectral = False
        config = get_model_config(model[0])
        wanted = re.compile(settings.alignment_layers)
        found = find_linears(
            model, parameters, config, parallel_state, find_masters(optimizer), self._current_sample, wanted
        )
        sublayers = find_sublayers(model, found.views, config, parallel_state, self._current_sample)
        world = dist.group.WORLD
        self._registry = Registry(
            [row for view in found.views for row in view.rows],
            [Sublayer(s.name, s.input_row, s.width) for s in sublayers],
            world,
        )
        self._lines_wanted = [wanted.search(row.layer) is not None for row in self._registry.rows]
        if not any(self._lines_wanted):
            raise ConfigError(
                "--alignment-layers",
                settings.alignment_layers,
                "a pattern that matches a linear layer of this model",
                "see the names in hyperparameters.json",
            )
        device = next(parameter for chunk in model for parameter in chunk.parameters()).device
        self._meter = Meter(found.views, found.points, sublayers, self._registry, world, device)
        self.forecast = NormForecast(self._param_groups(found.param_groups), self._weight_rms())
        self._transfer: tuple[TransferCheck, JsonLines] | None = None
        self._is_writer = args.rank == args.world_size - 1
        self._files: tuple[JsonLines, JsonLines, JsonLines] | None = None
        if self._is_writer and settings.directory is not None:
            alignment, equilibrium, gains = (
                JsonLines(f"{settings.directory}/{name}.jsonl", args.iteration)
                for name in ("alignment", "equilibrium", "sublayers")
            )
            self._files = alignment, equilibrium, gains
            if settings.reference_run is not None:
                self._transfer = self._transfer_check(settings.reference_run, settings.directory)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the lines that are reported, in the order of the file, without the means over experts."""
        return tuple(row.layer for row, wanted in zip(self._registry.rows, self._lines_wanted, strict=True) if wanted)

    @property
    def held_bytes(self) -> int:
        """Bytes that the metrics hold on this rank right now beyond the training's own."""
        return self._meter.held_bytes

    def begin_step(self) -> None:
        """Start a forward and backward pass; `args.curr_iteration` is the number of the step, from 0."""
        self._iteration = self._args.curr_iteration + 1
        settings = self._settings
        self._alignment = _due(self._iteration, settings.alignment_interval)
        self._spectral = _due(self._iteration, settings.spectral_interval)
        if self._alignment:
            self._sample = Sample(self._iteration, self._token_count())
            self._meter.begin(self._sample.count)

    def before_update(self) -> None:
        """Use the weights of this step while they are there; call it right before the optimizer's step."""
        self._hyperparameters = live_hyperparameters(self._optimizer)
        if self._spectral:
            # Singular vectors are not in checkpoints: a resumed run has none, so an undisturbed one drops them too.
            every = self._args.save_interval if self._args.save else None
            if every and (self._iteration - 1) // every > (self._last_spectral - 1) // every:
                self._meter.forget_singular_vectors()
            self._last_spectral = self._iteration
        if self._alignment or self._spectral:
            self._meter.before_update(self._alignment, self._spectral)

    def after_update(self, succeeded: bool) -> None:
        """Measure the update and write; call it right after the optimizer's step.

        Args:
            succeeded: whether the optimizer of this rank made the step (it skips one at an overflow).
        """
        if self._alignment or self._spectral:
            table, sublayers, skipped = self._meter.after_update(succeeded)
            if self._is_writer:
                self._write(table.tolist(), sublayers.tolist(), not skipped)
        self._alignment = self._spectral = False
        if succeeded:
            self.forecast.step(self._hyperparameters)

    def _write(self, table: list[list[float]], sublayer_table: list[list[float]], updated: bool) -> None:
        from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

        registry = self._registry
        every = [
            alignment_line(self._iteration, row, sums, self._alignment, self._spectral, updated)
            for row, sums in zip(registry.rows, table, strict=True)
        ]
        kept = [(r, line) for r, line, wanted in zip(registry.rows, every, self._lines_wanted, strict=True) if wanted]
        lines = [line for _, line in kept]
        equilibrium = [equilibrium_line(line, self.forecast, self._args.hidden_size) for line in lines]
        lines += expert_means([row for row, _ in kept], lines)
        gains = []
        if self._alignment:
            gains = [
                sublayer_line(self._iteration, s.name, s.width, sums, table[registry.row_index[s.input_row]])
                for s, sums in zip(registry.sublayers, sublayer_table, strict=True)
            ]
        if self._files is not None:
            for file, content in zip(self._files, (lines, equilibrium, gains), strict=True):
                file.write(content)
        values = {
            **scalars(lines, METRICS),
            **scalars(equilibrium, _EQUILIBRIUM_METRICS),
            **{f"sublayer_gain/{line['layer']}": line["gain"] for line in gains if line["gain"] is not None},
        }
        log_scalars(values, self._iteration, get_tensorboard_writer(), get_wandb_writer())

        if self._transfer is not None and self._alignment:
            check, file = self._transfer
            compared = check.compare(lines)
            file.write(compared)
            if warning := check.warning(compared):
                print(warning, flush=True)

    def _transfer_check(self, folder: str, directory: str) -> tuple[TransferCheck, JsonLines]:
        """Return the comparison with the proxy whose metrics folder is `folder`, and the file for it in `directory`.

        Raises:
            ConfigError: the folder cannot be read, or holds no layer of this model.
            OSError: the file cannot be written.
        """
        settings, args = self._settings, self._args
        proxy, path = read_proxy(folder), os.path.join(directory, FILE)
        file = JsonLines(path, args.iteration)
        check = TransferCheck(
            proxy,
            rules_of(vars(args)),
            args.train_iters,
            settings.reference_factor,
            settings.reference_count,
            earlier=read_lines(path, CheckLine, []),
        )
        missing = check.unmatched(self.layers)
        if len(missing) == len(self.layers):
            raise ConfigError(
                "--reference-run",
                folder,
                f"a run in which a layer of this model was measured, {self.layers[0]} for one",
                "give the run of a proxy of the same architecture",
            )
        compared = f"{len(self.layers) - len(missing)} layers with {folder}, factor {settings.reference_factor:g}"
        print(f"> transfer check: {compared}, {settings.reference_count} times in a row", flush=True)
        if missing:
            print(f"> transfer check: no counterpart for {', '.join(collapsed(missing))}", flush=True)
        return check, file

    def _current_sample(self) -> Sample:
        assert self._sample is not None, "a hook is attached outside a measured iteration"
        return self._sample

    def _token_count(self) -> int:
        """Return how many tokens to look at on each data-parallel rank."""
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        if self._settings.alignment_tokens is not None:
            return self._settings.alignment_tokens
        args = self._args
        microbatch = args.micro_batch_size * args.seq_length // args.context_parallel_size
        return max(64, int(microbatch * get_num_microbatches() // 64))

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
