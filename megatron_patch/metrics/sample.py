"""Which tokens are looked at, the same on every rank that has to agree."""

import torch
from torch import Tensor


def sample_positions(total: int, count: int, seed: int) -> Tensor:
    """Return `count` distinct positions in `range(total)`, one drawn from each of `count` equal stretches, ascending.

    The draw depends on the arguments only, so every rank makes the same one, and no random state of torch is touched.

    Args:
        total: number of tokens to choose from.
        count: number of tokens wanted; all of them if it exceeds `total`.
        seed: the iteration.

    >>> sample_positions(4, 9, seed=1).tolist()
    [0, 1, 2, 3]
    """
    count = min(count, total)
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    edges = torch.arange(count + 1) * total // count
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return edges[:-1] + (draw * (edges[1:] - edges[:-1])).long()


class Sample:
    """The sampled tokens of one data-parallel rank in one iteration.

    Tokens are numbered as in the flattened [s, b] layout of the first microbatch: `position = sequence index * b +
    batch index`. Under sequence parallelism tensor-parallel rank r holds the r-th of equal stretches of that numbering.
    """

    def __init__(self, iteration: int, count: int) -> None:
        self.iteration = iteration
        self.count = count
        self._cache: dict[tuple[int, int, int, torch.device], tuple[Tensor, tuple[int, ...]]] = {}

    def local(self, tokens: int, device: torch.device, rank: int = 0, ranks: int = 1) -> tuple[Tensor, tuple[int, ...]]:
        """Return where the sampled tokens are in this rank's stretch, and how many of them each rank has.

        Args:
            tokens: tokens this rank holds, the same number on all `ranks`.
            device: where the index is wanted.
            rank, ranks: which stretch this is, of how many.
        """
        key = (tokens, rank, ranks, device)
        if key not in self._cache:
            positions = sample_positions(tokens * ranks, self.count, self.iteration)
            owner = positions // max(tokens, 1)
            counts = tuple(torch.bincount(owner, minlength=ranks).tolist())
            index = positions[owner == rank] - rank * tokens
            if device.type == "cuda":  # from pinned memory, for which the host does not wait
                index = index.pin_memory()
            self._cache[key] = (index.to(device, non_blocking=True), counts)
        return self._cache[key]
