"""Which tokens are looked at, and the hooks that catch the inputs of linear layers for them.

Hooks exist only between `Probes.attach` and `Probes.detach`, that is in measured iterations, and each takes the first
call of its module: the first microbatch, whatever the schedule; a recomputation in the backward pass comes later.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_patch.metrics.views import Captured, CapturePoint, SublayerView


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
            self._cache[key] = ((positions[owner == rank] - rank * tokens).to(device), counts)
        return self._cache[key]


class Probes:
    """The forward hooks of one measured iteration."""

    def __init__(self, points: Sequence[CapturePoint], sublayers: Sequence[SublayerView]) -> None:
        self._points = points
        self._sublayers = sublayers
        self._handles: dict[int, torch.utils.hooks.RemovableHandle] = {}
        self.captured: dict[str, Captured] = {}
        self.outputs: dict[str, Tensor] = {}
        """Output vectors of the sublayers for the sampled tokens, [B_loc, hidden], fp32."""

    @property
    def attached(self) -> bool:
        """Whether any hook is registered."""
        return bool(self._handles)

    def attach(self) -> None:
        """Register the hooks and forget what earlier ones caught: also the start of a repeated forward pass."""
        self.detach()
        self.captured = {}
        self.outputs = {}
        for key, point in enumerate(self._points):
            self._handles[key] = self._register(key, point)
        for key, sublayer in enumerate(self._sublayers, start=len(self._points)):
            self._handles[key] = self._register_output(key, sublayer)

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def _register(self, key: int, point: CapturePoint) -> torch.utils.hooks.RemovableHandle:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # Removing a hook from within itself is allowed; the module then runs at full speed again.
            if key in self._handles:
                self._handles.pop(key).remove()
                with torch.no_grad():
                    self.captured.update(point.extract(args, kwargs, output))

        return point.module.register_forward_hook(hook, with_kwargs=True)

    def _register_output(self, key: int, sublayer: SublayerView) -> torch.utils.hooks.RemovableHandle:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if key in self._handles:
                self._handles.pop(key).remove()
                with torch.no_grad():
                    self.outputs[sublayer.name] = sublayer.output(output).float()

        return sublayer.module.register_forward_hook(hook)
