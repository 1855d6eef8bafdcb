"""What a linear layer or a convolution multiplied its weight with, for the sampled tokens."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_patch.metrics.sample import Sample
from megatron_patch.metrics.views import Captured, Extract
from megatron_patch.plain.modules import CONVOLUTIONS


def extract(name: str, module: nn.Module) -> Extract:
    """Return what finds the inputs of a layer in the arguments of its forward call: {name: [B, C]}.

    Args:
        name: of the layer.
        module: a linear layer, whose tokens are all but the last dimension of its input; or a convolution, whose tokens
            are the positions of its output and whose inputs are the patches that it sees there.
    """

    def captured(sample: Sample, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> dict[str, Captured]:
        inputs = args[0] if args else next(iter(kwargs.values()))
        if isinstance(module, CONVOLUTIONS):
            windows = patches(module, inputs.detach())
        else:
            windows = inputs.detach().reshape(-1, inputs.shape[-1])
        positions = windows.shape[: 1 if windows.dim() == 2 else len(module.kernel_size) + 1]  # type: ignore[arg-type]
        index, counts = sample.local(math.prod(positions), windows.device)
        where = torch.unravel_index(index, positions)
        return {name: Captured(windows[where].flatten(1), counts)}

    return captured


def patches(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return what a convolution sees at every position of its output, [N, out..., C, k...], a view where possible.

    `Y[n, o] = W . patches[n, o]` for each output channel, with W [C, k...]; of grouped convolutions C is all channels,
    of which each group of output channels reads its own stretch.

    Args:
        module: Conv1d, Conv2d or Conv3d, with any stride, padding, padding mode and dilation.
        inputs: [N, C, in...], or [C, in...] without a batch.
    """
    convolution: Any = module
    spatial = len(convolution.kernel_size)
    x = inputs if inputs.dim() == spatial + 2 else inputs.unsqueeze(0)
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    x = functional.pad(x, convolution._reversed_padding_repeated_twice, mode=mode)
    for i, (size, stride, dilation) in enumerate(
        zip(convolution.kernel_size, convolution.stride, convolution.dilation, strict=True)
    ):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    outputs, window = range(2, 2 + spatial), range(2 + spatial, 2 + 2 * spatial)
    return x.permute(0, *outputs, 1, *window)
