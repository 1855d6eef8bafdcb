"""Alignment metrics of any torch model: one process, DDP, FSDP2, and DeepSpeed's engine with ZeRO 1 to 3."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_patch.errors import ConfigError
from megatron_patch.metrics.derive import Line, alignment_line
from megatron_patch.metrics.meter import SLOTS, Meter
from megatron_patch.metrics.reduce import all_gather_flat, sum_of_squares
from megatron_patch.metrics.registry import Registry
from megatron_patch.metrics.sample import Sample
from megatron_patch.metrics.views import Group, group_size
from megatron_patch.plain.layers import Step, find_layers, not_measured
from megatron_patch.plain.live import decay_is_coupled, inner_optimizer, is_engine, live_groups, stepping_optimizer

_ADDED = ("weight", "update", "weight_output", "update_output")
"""What is summed over the groups of a convolution. The others are the same for each, and top singular values' largest
is that of the whole, which is block-diagonal."""


@dataclass
class Measured:
    """What a block of `AlignmentMeter.measure` has measured, once it is left."""

    lines: list[Line] = field(default_factory=list)


class AlignmentMeter:
    """Measures single optimizer steps: weight and update alignment, relative update, relative representation change.

        meter = AlignmentMeter(model, optimizer)
        with meter.measure(iteration) as measured:
            ...                 # forward and backward of one or more micro-batches, and one optimizer.step()
        measured.lines

    or `begin` and `end`, where a step is not a block of code. Measured are linear layers, transformers' Conv1D and
    convolutions; the tokens of these are the positions of their output, the inputs patches C k k long. The tokens are
    those of the first micro-batch. Each rank looks at its share of the rows of every weight, so no rank holds more than
    one whole weight besides its own. Outside of a measured step nothing is attached, and nothing communicates.

    Args:
        model: as it is trained: wrapped by DDP, sharded by `fully_shard`, or DeepSpeed's engine.
        optimizer: a torch optimizer or Accelerate's wrapper of one; not needed beside an engine.
        tokens: how many are sampled on each rank.
        layers: regular expression; only layers whose name it finds are measured.
        spectral: whether top singular values are measured too.
        process_group: the data-parallel ranks; None: all, if torch.distributed is initialised.

    Raises:
        ConfigError: no layer that matches; weights without fp32 values; weight decay that is not decoupled; replicas
            that differ; an optimizer that does not train a layer; ZeRO's optimizer without its engine.

    Source: arXiv 2510.19093, eqs. 2 to 4.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        *,
        tokens: int = 256,
        layers: str = ".*",
        spectral: bool = True,
        process_group: Group = None,
    ) -> None:
        if tokens < 1:
            raise ConfigError("tokens", tokens, "a positive integer", "give the number of tokens to sample")
        self._tokens, self._pattern, self._spectral = tokens, layers, spectral
        self._engine: Any = next((thing for thing in (model, optimizer) if is_engine(thing)), None)
        self._optimizer = _checked_optimizer(self._engine, optimizer)
        self._group = process_group
        if process_group is None and dist.is_available() and dist.is_initialized():
            self._group = dist.group.WORLD
        self._step = Step()
        self._layers = find_layers(model, layers, self._group, self._step)
        self.unmeasured = not_measured(model, self._layers)
        """Names of the trainable weights that are not looked at, embeddings for one."""
        self._read_hyperparameters()
        self._require_equal_replicas()
        self._counted = 0
        self._handle: Any = None
        self._begun: tuple[int, int] | None = None
        """Iteration, and steps made before it, while a step is measured."""
        views = [layer.view for layer in self._layers]
        registry = Registry([row for view in views for row in view.rows], (), self._group)
        self._places = [[registry.row_index[row.layer] for row in view.rows] for view in views]
        points = [layer.point for layer in self._layers]
        self._meter = Meter(views, points, (), registry, self._group, views[0].row_part.device)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the measured layers, in the order of the lines."""
        return tuple(layer.row.layer for layer in self._layers)

    @property
    def held_bytes(self) -> int:
        """Bytes that this rank holds for a measurement right now: its rows of the weights, and sampled inputs."""
        return self._meter.held_bytes + sum(rows.numel() * rows.element_size() for rows in self._step.old.values())

    def begin(self, iteration: int) -> None:
        """Start to measure an optimizer step, before its forward pass; a collective call.

        Args:
            iteration: its number, which the lines carry and which chooses the tokens.
        """
        self._read_hyperparameters()
        self._step.updated = False
        with torch.no_grad():
            for layer in self._layers:
                self._step.old[layer.row.layer] = layer.read().clone()
        if self._engine is None and self._handle is None:
            self._handle = stepping_optimizer(self._optimizer).register_step_post_hook(self._count)
        self._begun = iteration, self._made()
        self._meter.begin(Sample(iteration, self._tokens))

    def end(self) -> list[Line]:
        """Return a line for each layer, the same on every rank, after the optimizer's step; a collective call.

        The keys are those of a line of alignment.jsonl; what depends on the update is None where the optimizer skipped
        the step or the LR is 0. `m` is 1 where `width_groups` has planned nothing.

        Raises:
            ConfigError: a layer that the forward pass did not call; more than one optimizer step since `begin`.
            RuntimeError: `begin` was not called.
        """
        if self._begun is None:
            raise RuntimeError("AlignmentMeter.end() without begin()")
        iteration, before = self._begun
        made = self._made() - before
        try:
            self._meter.probes.detach()
            self._share_token_numbers()
            if made > 1:
                raise ConfigError("iteration", iteration, f"one optimizer step, not {made}", "measure one at a time")
            self._meter.before_update(alignment=True, spectral=self._spectral)
            self._step.updated = True
            table, _, skipped = self._meter.after_update(made == 1).read()
        finally:
            self._forget()
        return [
            alignment_line(iteration, layer.row, _together(table[places].tolist()), True, self._spectral, not skipped)
            for layer, places in zip(self._layers, self._places, strict=True)
        ]

    @contextmanager
    def measure(self, iteration: int) -> Iterator[Measured]:
        """Measure the optimizer step of a block: `begin`, the block, `end`; nothing, if the block raises."""
        measured = Measured()
        self.begin(iteration)
        try:
            yield measured
        except BaseException:
            self._forget()
            raise
        measured.lines = self.end()

    def _forget(self) -> None:
        self._begun = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._step.old = {}
        self._meter.probes.detach()
        self._meter.probes.captured = {}

    def _made(self) -> int:
        """Return how many optimizer steps were made so far, skipped ones aside."""
        if self._engine is not None:
            return int(self._engine.global_steps - self._engine.skipped_steps)
        return self._counted

    def _count(self, *_: Any) -> None:
        """Note a step of a torch optimizer, and what it was made with, which a scheduler may have set since `begin`."""
        self._counted += 1
        self._read_hyperparameters()

    def _read_hyperparameters(self) -> None:
        """Read LR and weight decay of every layer."""
        inner = stepping_optimizer(self._optimizer)
        live = {}
        for group, parameters in live_groups(self._optimizer):
            if group["weight_decay"] != 0 and decay_is_coupled(inner, group):
                raise ConfigError(
                    "optimizer",
                    type(inner).__name__,
                    "decoupled weight decay: dW is what is left when W is shrunk by 1 - lr * weight_decay",
                    "use AdamW, or set weight_decay to 0",
                )
            live.update({id(p): (float(group["lr"]), float(group["weight_decay"])) for p in parameters})
        for layer in self._layers:
            if id(layer.parameter) not in live:
                raise ConfigError(
                    "optimizer",
                    f"without {layer.row.layer}.weight",
                    "the optimizer that trains every layer measured",
                    "build it from the model's parameters after wrapping, or leave the layer out with layers=",
                )
        self._step.hyperparameters = live

    def _require_equal_replicas(self) -> None:
        """Each rank looks at its rows only, which tells of the whole if all hold the same weights."""
        whole = [
            layer
            for layer in self._layers
            if not isinstance(layer.parameter, DTensor) and not hasattr(layer.parameter, "ds_id")
        ]
        if group_size(self._group) == 1 or not whole:
            return
        own = torch.stack([sum_of_squares(layer.parameter.detach().float()) for layer in whole])
        everyones = all_gather_flat(own, self._group)
        same = (everyones == everyones[0]).all(0).tolist()
        if not all(same):
            raise ConfigError(
                "model",
                f"with another {whole[same.index(False)].row.layer} on each rank",
                "the same weights on all ranks of process_group",
                "wrap it in DistributedDataParallel, or give process_group the ranks that share weights",
            )

    def _share_token_numbers(self) -> None:
        """Tell the ranks how many tokens each has of every layer, and whether any has not called one."""
        captured = self._meter.probes.captured
        names = self.layers
        own = [captured[name].inputs.shape[0] if name in captured else -1 for name in names]
        device = self._layers[0].view.row_part.device
        numbers = all_gather_flat(torch.tensor(own, device=device), self._group).T.tolist()
        for name, counts in zip(names, numbers, strict=True):
            if min(counts) < 0:
                raise ConfigError(
                    "layers",
                    repr(self._pattern),
                    f"layers that the forward pass calls: {name} was not called since begin()"
                    f"{'' if len(counts) == 1 else f' on rank {counts.index(-1)}'}",
                    "leave it out with another pattern; torch.compile skips hooks that are attached after it",
                )
            captured[name] = replace(captured[name], counts=tuple(counts))


def _checked_optimizer(engine: Any, optimizer: Any) -> Any:
    if engine is not None:
        if engine.mp_world_size > 1:
            raise ConfigError(
                "model",
                f"an engine with {engine.mp_world_size} tensor-parallel ranks",
                "data parallelism alone",
                "measure without it, or with Megatron",
            )
        if engine.zero_round_robin_gradients():  # 0.19.8: safe_get_full_fp32_param then gives another parameter's
            raise ConfigError(
                "model",
                "an engine with round_robin_gradients",
                "fp32 weights that DeepSpeed says of the right parameter",
                "set zero_optimization.round_robin_gradients to false in its config",
            )
        for key in ("bf16_master_weights_and_grads", "fp16_master_weights_and_grads"):
            if getattr(engine, key.replace("grads", "gradients"))():
                raise ConfigError(
                    "model",
                    f"an engine with {key}",
                    "fp32 weights, from which an update can be measured: a rounded one moves by steps, or not at all",
                    f"remove {key} from its config",
                )
        return engine
    if optimizer is None:
        raise ConfigError("optimizer", None, "the optimizer, beside any model but DeepSpeed's engine", "give it")
    # ZeRO steps parts of its optimizer one by one: only its engine knows what an optimizer step is.
    if not isinstance(inner_optimizer(optimizer), torch.optim.Optimizer):
        raise ConfigError(
            "optimizer",
            type(optimizer).__name__,
            "a torch optimizer, or DeepSpeed's engine as the model",
            "give the engine that deepspeed.initialize returned",
        )
    return optimizer


def _together(rows: list[list[float]]) -> list[float]:
    """Return the sums of a layer from those of its groups, in the order of `SLOTS`."""
    columns = dict(zip(SLOTS, zip(*rows, strict=True), strict=True))
    return [sum(c) if s in _ADDED else max(c) if "singular" in s else c[0] for s, c in columns.items()]
