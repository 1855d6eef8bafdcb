"""The hooks that catch the inputs of linear layers for the sampled tokens.

Hooks exist only between `Probes.attach` and `Probes.detach`, that is in measured iterations, and each takes the call of
its module that it is meant for, which is in the first microbatch, whatever the schedule; a recomputation in the
backward pass comes later.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_patch.metrics.sample import Sample
from megatron_patch.metrics.views import Captured, CapturePoint, SublayerView


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

    def attach(self, sample: Sample) -> None:
        """Register the hooks and forget what earlier ones caught: also the start of a repeated forward pass.

        Args:
            sample: the tokens to look at.
        """
        self.detach()
        self.captured = {}
        self.outputs = {}
        for key, point in enumerate(self._points):
            self._handles[key] = self._register(key, point, sample)
        for key, sublayer in enumerate(self._sublayers, start=len(self._points)):
            self._handles[key] = self._register_output(key, sublayer, sample)

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def _register(self, key: int, point: CapturePoint, sample: Sample) -> torch.utils.hooks.RemovableHandle:
        calls = 0

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal calls
            calls += 1
            if calls <= point.call:
                return
            # Removing a hook from within itself is allowed; the module then runs at full speed again.
            if key in self._handles:
                self._handles.pop(key).remove()
                with torch.no_grad():
                    self.captured.update(point.extract(sample, args, kwargs, output))

        return point.module.register_forward_hook(hook, with_kwargs=True)

    def _register_output(self, key: int, sublayer: SublayerView, sample: Sample) -> torch.utils.hooks.RemovableHandle:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if key in self._handles:
                self._handles.pop(key).remove()
                with torch.no_grad():
                    self.outputs[sublayer.name] = sublayer.output(sample, output).float()

        return sublayer.module.register_forward_hook(hook)
