"""The lines of the whole model, in one order that every rank knows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_patch.metrics.views import Group, Row, group_size


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key under which layer 10 comes after layer 9.

    >>> sorted(["layers.10.a", "layers.9.b", "layers.9.a"], key=natural_key)
    ['layers.9.a', 'layers.9.b', 'layers.10.a']
    """
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class Sublayer:
    """An attention or MLP block of the model."""

    name: str
    input_row: str
    """The line whose input is the block's normalised input."""
    width: int
    """Length of input and output vectors."""


class Registry:
    """All lines and sublayers of the model, wherever they live; the constructor is a collective call.

    Args:
        rows: the lines that this rank holds a shard of.
        sublayers: the sublayers on this rank: name, line of the first linear layer, width.
        world: all ranks.

    Raises:
        RuntimeError: two ranks describe one line differently.
    """

    def __init__(self, rows: Sequence[Row], sublayers: Sequence[Sublayer], world: Group) -> None:
        gathered: list[tuple[list[Row], list[Sublayer]]] = [(list(rows), list(sublayers))]
        if group_size(world) > 1:
            gathered = [([], [])] * group_size(world)
            dist.all_gather_object(gathered, (list(rows), list(sublayers)), group=world)
        merged: dict[str, Row] = {}
        for rank_rows, _ in gathered:
            for row in rank_rows:
                if merged.setdefault(row.layer, row) != row:
                    raise RuntimeError(f"ranks disagree on {row.layer}: {merged[row.layer]} and {row}")
        self.rows = tuple(sorted(merged.values(), key=lambda row: natural_key(row.layer)))
        self.row_index = {row.layer: place for place, row in enumerate(self.rows)}
        distinct = {sublayer for _, rank_sublayers in gathered for sublayer in rank_sublayers}
        self.sublayers = tuple(sorted(distinct, key=lambda sublayer: natural_key(sublayer.name)))
        self.sublayer_index = {sublayer.name: place for place, sublayer in enumerate(self.sublayers)}
