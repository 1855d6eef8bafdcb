"""LayerNorm and RMSNorm for Megatron's local layer spec that also work under sequence parallelism.

Upstream gap: `megatron.core.transformer.torch_norm.WrappedTorchNorm`, the only norm of the local spec without Apex,
stops at "sequence parallel not supported by torch LayerNorm". Torch's norm would compute the right thing; what is
missing is the mark on its parameters. Under sequence parallelism each tensor-parallel rank normalises its own slice
of the sequence, so each holds a partial gradient, and Megatron sums over the tensor-parallel group exactly those
parameters that carry `sequence_parallel = True` (`core/distributed/finalize_model_grads.py`).
Read at 0.19.2; to be removed when WrappedTorchNorm marks its parameters itself.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_patch.errors import ConfigError


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` with Megatron's two extras: the sequence-parallel mark and the zero-centred gain.

    y = (x - mean(x)) / sqrt(var(x) + eps) * g + bias over the last dimension, with g = weight, or g = 1 + weight
    when `zero_centered` (then the weight starts at 0, so that weight decay pulls g towards 1).
    """

    def __init__(self, hidden_size: int, eps: float, zero_centered: bool = False) -> None:
        self.zero_centered = zero_centered
        super().__init__(hidden_size, eps=eps)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.zero_centered:
            torch.nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:  # [s (or s/tp), b, h] -> the same shape and dtype
        if not self.zero_centered:
            return super().forward(input)  # bit for bit torch's norm; its 16-bit kernels accumulate in fp32 as well
        # 1 + weight must be formed in fp32: in bf16 it would lose a weight below 2^-8 entirely.
        y = functional.layer_norm(
            input.float(), self.normalized_shape, self.weight.float() + 1.0, self.bias.float(), self.eps
        )
        return y.type_as(input)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with the same two extras: y = x / sqrt(mean(x^2) + eps) * g over the last dimension."""

    def __init__(self, hidden_size: int, eps: float, zero_centered: bool = False) -> None:
        self.zero_centered = zero_centered
        super().__init__(hidden_size, eps=eps)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.zero_centered:
            torch.nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:  # [s (or s/tp), b, h] -> the same shape and dtype
        if not self.zero_centered:
            return super().forward(x)
        y = functional.rms_norm(x.float(), self.normalized_shape, self.weight.float() + 1.0, self.eps)
        return y.type_as(x)


def build_norm(config: Any, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
    """The norm that Megatron's `config` (a TransformerConfig) asks for, its parameters marked for sequence parallelism.

    Args:
        config: read are `normalization`, `layernorm_zero_centered_gamma` and `sequence_parallel`.
            `persist_layer_norm` and `memory_efficient_layer_norm` choose between CUDA kernels and change no number.
        hidden_size: length of the normalised last dimension.
        eps: Megatron passes `config.layernorm_epsilon`.
    """
    norms: dict[str, type[torch.nn.Module]] = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
    if config.normalization not in norms:
        raise ConfigError(
            "--normalization", config.normalization, "LayerNorm or RMSNorm on CPU", "choose one of the two"
        )
    norm = norms[config.normalization](hidden_size, eps, zero_centered=config.layernorm_zero_centered_gamma)
    norm.returns_residual = False  # type: ignore[assignment]  # asked for from 0.20 on
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm
