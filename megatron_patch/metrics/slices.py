"""The update dW from optimizer state that a distributed optimizer has cut into slices, without ever gathering it.

Each rank of a data group owns one contiguous range of the flattened weight, so nearly whole rows of dW. `dW X` for the
tokens of ALL ranks is therefore computed row-wise by the owners: the few sampled tokens travel, not dW. Only rows that
a range boundary cuts in two are completed first; such a row belongs to the rank that owns its first entry.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_patch.metrics.reduce import all_gather_flat, all_reduce_sum
from megatron_patch.metrics.views import Group, LinearView, group_rank, group_size

BLOCK_ELEMENTS = 1 << 20
"""Length of the float64 scratch vector."""


@dataclass(frozen=True)
class Block:
    """Whole rows of dW."""

    rows: slice
    """Which local output rows."""
    delta: Tensor
    """[number of rows, C_loc], fp32."""


def gradient_update_(old: Tensor, new: Tensor, lr: float, weight_decay: float) -> Tensor:
    """Return the gradient part of an update, written over `old`.

    `dW = W_{t+1} - (1 - eta lambda) W_t`, formed in float64 a block at a time and rounded once: in fp32 the product
    alone would be wrong by 6e-8 of W, and dW is smaller than W by about the learning rate.

    Args:
        old, new: fp32 weights before and after the optimizer step, flat, of one length.
        lr, weight_decay: eta and lambda of the step.

    Source: arXiv 2510.19093, section 5.2 and appendix F.1.
    """
    for before, after in zip(torch.split(old, BLOCK_ELEMENTS), torch.split(new, BLOCK_ELEMENTS), strict=True):
        before.copy_(after.double().sub_(before, alpha=1.0 - lr * weight_decay))
    return old


class SliceExchange:
    """Turns slices of dW into whole rows with all tokens, for the layers of one data group.

    Collectives: one all-reduce for the cut rows, one all-gather of the numbers of tokens, and one all-to-all of tokens
    for every chunk of layers that `all_tokens` is called with.

    Args:
        views: layers whose master weights are sharded over `group`; the same, in the same order, on all its ranks.
        group: the data group.
        device: where the weights are.
    """

    def __init__(self, views: Sequence[LinearView], group: Group, device: torch.device) -> None:
        self._views = views
        self._group = group
        self._device = device
        own = torch.tensor([[v.master.start, v.master.stop] for v in views], dtype=torch.int64, device=device)
        ranges = all_gather_flat(own, group).view(group_size(group), len(views), 2).tolist()
        self._widths = [view.columns for view in views]
        self._first: list[list[int]] = []
        """[rank][layer]: first row that the rank owns."""
        self._last: list[list[int]] = []
        """[rank][layer]: one past the last."""
        cut = set()
        for rank_ranges in ranges:
            for i, (start, stop) in enumerate(rank_ranges):
                width = self._widths[i]
                if start < stop and start % width:
                    cut.add((i, start // width))
            sized = list(zip(rank_ranges, self._widths, strict=True))
            self._first.append([-(-start // width) if start < stop else 0 for (start, stop), width in sized])
            self._last.append([-(-stop // width) if start < stop else 0 for (start, stop), width in sized])
        self._offsets: dict[tuple[int, int], int] = {}
        """Where each cut row (layer, row) starts in the buffer that completes it."""
        size = 0
        for i, row in sorted(cut):
            self._offsets[i, row] = size
            size += self._widths[i]
        self._buffer_size = size

    @property
    def ranges_of_rows(self) -> list[tuple[int, int]]:
        """Rows of each layer that this rank owns, half-open."""
        rank = group_rank(self._group)
        return list(zip(self._first[rank], self._last[rank], strict=True))

    def whole_rows(self, deltas: Sequence[Tensor]) -> list[list[Block]]:
        """Return for each layer the whole rows of dW that this rank owns, views of `deltas` where possible.

        Args:
            deltas: for each layer this rank's slice of dW, flat.
        """
        buffer = deltas[0].new_zeros(self._buffer_size)
        for i, (view, delta) in enumerate(zip(self._views, deltas, strict=True)):
            start, stop, width = view.master.start, view.master.stop, self._widths[i]
            for row in {start // width, (stop - 1) // width} if start < stop else ():
                if (i, row) in self._offsets:
                    begin, end = max(start, row * width), min(stop, (row + 1) * width)
                    at = self._offsets[i, row] + begin - row * width
                    buffer[at : at + end - begin] = delta[begin - start : end - start]
        all_reduce_sum(buffer, self._group)
        result = []
        for i, (first, last) in enumerate(self.ranges_of_rows):
            blocks = []
            width, start = self._widths[i], self._views[i].master.start
            inner = last - 1 if (i, last - 1) in self._offsets else last
            if first < inner:
                whole = deltas[i][first * width - start : inner * width - start].view(inner - first, width)
                blocks.append(Block(slice(first, inner), whole))
            if first < last and inner < last:
                at = self._offsets[i, inner]
                blocks.append(Block(slice(inner, last), buffer[at : at + width].view(1, width)))
            result.append(blocks)
        return result

    def token_numbers(self, own: Sequence[int]) -> list[list[int]]:
        """Return how many tokens each rank has sampled for each layer, [rank][layer]; a collective call.

        Args:
            own: this rank's numbers; those of an expert differ from rank to rank and may be 0.
        """
        tensor = torch.tensor(own, dtype=torch.int64, device=self._device)
        numbers: list[list[int]] = all_gather_flat(tensor, self._group).tolist()
        return numbers

    def all_tokens(
        self, which: Sequence[int], inputs: Sequence[Tensor], numbers: Sequence[Sequence[int]]
    ) -> list[Tensor | None]:
        """Return the sampled inputs of all ranks for some layers, [B_all, C_loc]; None where this rank owns no row.

        Args:
            which: the layers, the same on all ranks.
            inputs: for each of them this rank's, [B_loc, C_loc].
            numbers: what `token_numbers` returned.
        """
        ranks, rank = group_size(self._group), group_rank(self._group)
        if ranks == 1:
            return [x if self._owns(rank, i) else None for i, x in zip(which, inputs, strict=True)]
        mine = [i for i in which if self._owns(rank, i)]
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in inputs))
        send, send_sizes = [inputs[0].new_empty(0, dtype=dtype)], []
        for owner in range(ranks):
            pieces = [x.reshape(-1).to(dtype) for i, x in zip(which, inputs, strict=True) if self._owns(owner, i)]
            send += pieces
            send_sizes.append(sum(piece.numel() for piece in pieces))
        sizes = [[numbers[source][i] * self._widths[i] for i in mine] for source in range(ranks)]
        received = inputs[0].new_empty(sum(map(sum, sizes)), dtype=dtype)
        dist.all_to_all_single(received, torch.cat(send), [sum(s) for s in sizes], send_sizes, group=self._group)
        parts = iter(torch.split(received, [size for source in sizes for size in source]))
        found: dict[int, list[Tensor]] = {i: [] for i in mine}
        for _ in range(ranks):
            for i in mine:
                found[i].append(next(parts).view(-1, self._widths[i]))
        return [torch.cat(found[i]) if i in found else None for i in which]

    def _owns(self, rank: int, layer: int) -> bool:
        return self._first[rank][layer] < self._last[rank][layer]
