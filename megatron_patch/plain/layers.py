"""The linear layers and convolutions of a torch model, each described as a `LinearView` of this rank's rows."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_patch.errors import ConfigError
from megatron_patch.metrics.views import CapturePoint, Group, LinearView, MasterSlice, Row, group_rank, group_size
from megatron_patch.plain.groups import planned
from megatron_patch.plain.inputs import extract
from megatron_patch.plain.modules import CONVOLUTIONS, is_transposed, plain_name, whole_shape
from megatron_patch.plain.weights import matrix_shape, row_reader, share


@dataclass
class Step:
    """What the views read of the optimizer step that is measured."""

    old: dict[str, Tensor] = field(default_factory=dict)
    """This rank's rows of every weight before the update, [rows, C], fp32, by layer name."""
    updated: bool = False
    """Whether the weights are read anew, after the update."""
    hyperparameters: dict[int, tuple[float, float]] = field(default_factory=dict)
    """LR and weight decay by id of the parameter."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A measured layer."""

    row: Row
    parameter: nn.Parameter
    read: Callable[[], Tensor]
    """Returns this rank's rows as they are, [rows, C]; a collective call where ranks share the weight."""
    view: LinearView
    """Its rows are the layer, or one for each group of a convolution."""
    point: CapturePoint


def find_layers(model: nn.Module, pattern: str, group: Group, step: Step) -> list[Layer]:
    """Return the trainable layers whose name a pattern finds, in the order of the model.

    Args:
        model: wrapped or not.
        pattern: matched by `re.search`.
        group: the data-parallel ranks.
        step: what the views read.

    Raises:
        ConfigError: nothing matches; weights whose fp32 values are not at hand.
    """
    wanted = re.compile(pattern)
    named = {plain_name(name): module for name, module in model.named_modules()}
    found = []
    for name, module in named.items():
        known = isinstance(module, (nn.Linear, *CONVOLUTIONS)) or is_transposed(module)
        # MultiheadAttention multiplies with out_proj's weight without calling the module.
        uncalled = isinstance(named.get(name.rpartition(".")[0]), nn.MultiheadAttention)
        if known and not uncalled and wanted.search(name) and module.weight.requires_grad:
            found.append(_layer(name, module, group, step))
    if not found:
        raise ConfigError(
            "layers",
            repr(pattern),
            "a pattern that matches a trainable linear layer or convolution of this model",
            "see model.named_modules()",
        )
    return found


def not_measured(model: nn.Module, layers: list[Layer]) -> tuple[str, ...]:
    """Return the names of the trainable weights, embeddings included, that are in none of the layers."""
    measured = {id(layer.parameter) for layer in layers}
    return tuple(
        plain_name(name)
        for name, p in model.named_parameters()
        if p.requires_grad and len(whole_shape(p)) > 1 and id(p) not in measured
    )


def _layer(name: str, module: Any, group: Group, step: Step) -> Layer:
    parameter: nn.Parameter = module.weight
    fan_out, fan_in = matrix_shape(module, parameter)
    plan = planned(parameter)
    row = Row(name, "replicated", fan_in, fan_out, plan[1].spec.m if plan else 1.0)
    groups = module.groups if isinstance(module, CONVOLUTIONS) else 1
    parts = (row,) if groups == 1 else tuple(replace(row, layer=f"{name}/{i}") for i in range(groups))
    start, stop = share(fan_out, group_rank(group), group_size(group))
    read = row_reader(name, module, parameter, group)
    view = LinearView(
        name=name,
        kind="column",
        rows=parts,
        row_part=torch.arange(start, stop, device=parameter.device) // (fan_out // groups),
        weight=lambda: step.old[name],
        master=MasterSlice(
            read=lambda: (read() if step.updated else step.old[name]).reshape(-1),
            start=0,
            stop=(stop - start) * fan_in,
            sharded=False,
            hyperparameters=lambda: step.hyperparameters[id(parameter)],
        ),
        shard_group=group,
        data_group=None,
        scattered=True,
        block_diagonal=groups > 1,
    )
    return Layer(row, parameter, read, view, CapturePoint(module, extract(name, module)))
