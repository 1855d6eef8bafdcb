"""The proof of ``explain --all-ranks``: together the ranks hold the whole model, once, and copies agree."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.errors import AuditError
from megatron_patch.theory.width import ParamSpec


@dataclass(frozen=True)
class Position:
    """Where a rank stands in the model-parallel grid."""

    rank: int
    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int


@dataclass(frozen=True)
class Held:
    """One parameter as one rank holds and trains it."""

    spec: ParamSpec
    local_shape: tuple[int, ...]
    split: bool
    """A slice along one dimension, by tensor-parallel rank; else all of it."""
    is_expert: bool
    """Split over the experts' own tensor-parallel group, and held by one expert-parallel rank."""
    assumed: bool
    """A layer this package does not know: its base fan-in follows the ratio of the hidden sizes."""
    values: Mapping[str, Any]
    """Its entry of hyperparameters.json, read back from the param groups."""


def merge(ranks: Sequence[tuple[Position, Sequence[Held]]], whole: Mapping[str, tuple[int, ...]]) -> list[Held]:
    """Return every parameter of the model, sorted by name, having proved that the ranks cover it exactly once.

    Args:
        ranks: one rank of every distinct position, with all it holds.
        whole: name and shape of every parameter of the model when it is not split at all.

    Raises:
        AuditError: a parameter that no rank holds, that the whole model does not have, of which a slice is missing or
            held twice, or whose copies differ in shape, class, fan-in, LR, weight decay or eps.
    """
    holders: dict[str, list[tuple[Position, Held]]] = {}
    for position, parameters in ranks:
        for held in parameters:
            holders.setdefault(held.spec.name, []).append((position, held))
    for name in sorted(whole.keys() - holders.keys()):
        raise AuditError(f"{name} of shape {list(whole[name])} is held by no rank")
    for name, held_by in sorted(holders.items()):
        if name not in whole:
            raise AuditError(f"{name} on rank {held_by[0][0].rank} is no parameter of the whole model")
        _same_on_all(name, held_by)
        _covered_once(name, held_by, whole[name])
    return [held_by[0][1] for _, held_by in sorted(holders.items())]


def _same_on_all(name: str, held_by: Sequence[tuple[Position, Held]]) -> None:
    first, known = held_by[0]
    for position, held in held_by[1:]:
        if held.values != known.values or held.spec != known.spec:
            raise AuditError(
                f"{name} is {_shown(known)} on rank {first.rank} and {_shown(held)} on rank {position.rank}"
            )


def _shown(held: Held) -> str:
    return ", ".join(
        f"{key} {held.values[key]}"
        for key in ("class", "shape", "fan_in", "m", "lr", "weight_decay", "eps", "optimizer")
    )


def _covered_once(name: str, held_by: Sequence[tuple[Position, Held]], shape: tuple[int, ...]) -> None:
    _, known = held_by[0]
    if known.spec.shape != shape:
        raise AuditError(f"{name} has the shape {list(shape)}, but split over the ranks it is {list(known.spec.shape)}")
    stages = sorted({position.pipeline for position, _ in held_by})
    # A tied LM head and multi-token prediction keep copies of the embedding on other stages.
    if len(stages) > 1 and known.spec.role != "embedding":
        raise AuditError(f"{name} is on more than one pipeline stage: {stages}")
    owners = sorted({position.expert for position, _ in held_by})
    if known.is_expert and len(owners) > 1:
        raise AuditError(f"{name} is on more than one expert-parallel rank: {owners}")
    slices: dict[int, int] = {}
    for position, held in held_by:
        place = position.expert_tensor if held.is_expert else position.tensor
        size = math.prod(held.local_shape)
        if slices.setdefault(place if held.split else 0, size) != size:
            raise AuditError(f"{name} has slices of different sizes on ranks of tensor-parallel rank {place}")
    if sum(slices.values()) != math.prod(shape):
        raise AuditError(
            f"{name}: the {len(slices)} distinct slices hold {sum(slices.values())} of {math.prod(shape)} elements"
        )
