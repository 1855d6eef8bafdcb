"""The collectives of a logging step. Their number and sizes never depend on a value that only one rank knows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_patch.metrics.views import Group, group_rank, group_size

# torch 2.14 renamed the two; the old names still work there, with a warning a call.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

BUCKET_ELEMENTS = 1 << 24
"""Largest number of fp32 partial outputs held back for one reduction (64 MiB); a larger layer goes by itself."""


def all_reduce_sum(tensor: Tensor, group: Group) -> Tensor:
    """Sum a tensor over a group, in place; a group of one rank communicates nothing."""
    if group_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def all_gather_flat(tensor: Tensor, group: Group) -> Tensor:
    """Return the flattened tensors of all ranks of a group, which must have one shape, as [ranks, numel]."""
    ranks = group_size(group)
    flat = tensor.reshape(-1).contiguous()
    if ranks == 1:
        return flat.view(1, -1)
    gathered = torch.empty(ranks * flat.numel(), dtype=flat.dtype, device=flat.device)
    _all_gather(gathered, flat, group=group)
    return gathered.view(ranks, -1)


def gather_rows(pieces: Sequence[tuple[Tensor, tuple[int, ...]]], group: Group) -> list[Tensor]:
    """Undo the scattering of sampled tokens over a group, for many layers in one all-gather.

    Args:
        pieces: for each layer this rank's rows [own, C] and the number of rows of every rank, which all ranks know.
        group: the ranks, in the order of their tokens.

    Returns:
        For each layer the rows of all ranks, [sum of counts, C].
    """
    if not pieces:
        return []
    padded = []
    for rows, counts in pieces:
        block = rows.new_zeros(max(counts), rows.shape[1])
        block[: rows.shape[0]] = rows
        padded.append(block.reshape(-1))
    gathered = all_gather_flat(torch.cat(padded), group)
    result, offset = [], 0
    for rows, counts in pieces:
        size = max(counts) * rows.shape[1]
        blocks = gathered[:, offset : offset + size].view(len(counts), max(counts), rows.shape[1])
        result.append(torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)]))
        offset += size
    return result


class PartialSums:
    """Partial outputs of row-parallel layers, summed over the group before they are squared.

    Outputs are collected until `BUCKET_ELEMENTS` are there; then one reduce-scatter gives each rank a share of the
    summed outputs, of which it squares and adds up what belongs to each layer. The squares of all ranks together, added
    in the packed reduction that follows anyway, are the squared norms.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._pending: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        self._elements = 0

    @property
    def held(self) -> list[Tensor]:
        """The outputs that are held back."""
        return [flat for flat, _ in self._pending]

    def add(self, partial: Tensor, receive: Callable[[Tensor], None]) -> None:
        """Take the partial outputs of one layer; later call `receive` with this rank's share of the sum of squares.

        All ranks of the group must add tensors of the same sizes in the same order.
        """
        if self._elements + partial.numel() > BUCKET_ELEMENTS:
            self.flush()
        self._pending.append((partial.reshape(-1), receive))
        self._elements += partial.numel()

    def flush(self) -> None:
        """Reduce and hand out what is pending."""
        if not self._pending:
            return
        ranks = group_size(self._group)
        share = -(-self._elements // ranks)
        flats = [flat for flat, _ in self._pending]
        bucket = torch.cat([*flats, flats[0].new_zeros(share * ranks - self._elements)])
        if ranks > 1:
            mine = torch.empty(share, dtype=bucket.dtype, device=bucket.device)
            _reduce_scatter(mine, bucket, group=self._group)
        else:
            mine = bucket
        lo = share * group_rank(self._group)
        offset = 0
        for flat, receive in self._pending:
            begin = min(max(offset - lo, 0), share)
            end = min(max(offset + flat.numel() - lo, 0), share)
            receive(sum_of_squares(mine[begin:end]))
            offset += flat.numel()
        self._pending = []
        self._elements = 0


def sum_of_squares(tensor: Tensor) -> Tensor:
    """Return the sum of the squares of all entries as a float64 scalar."""
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    # Blocks of 4096 in the tensor's own precision, their sums in float64: fp32 alone would drift with the size.
    flat = tensor.reshape(-1)
    whole = flat.numel() // 4096 * 4096
    blocks: Tensor = torch.linalg.vector_norm(flat[:whole].view(-1, 4096), dim=1).double().square().sum()
    rest: Tensor = torch.linalg.vector_norm(flat[whole:]).double().square()
    return blocks + rest


def part_sums_of_squares(matrix: Tensor, part: Tensor, parts: int) -> Tensor:
    """Return the sums of squares of groups of rows of a matrix, float64 [parts].

    Args:
        matrix: [R, N].
        part: which group each row belongs to, int64 [R].
        parts: number of groups.
    """
    rows = torch.linalg.vector_norm(matrix, dim=1).double().square()
    return torch.zeros(parts, dtype=torch.float64, device=matrix.device).index_add_(0, part, rows)
