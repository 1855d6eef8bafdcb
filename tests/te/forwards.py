"""Plain-torch forwards for Transformer Engine's modules, whose own need a GPU: same arguments, same communication.

The modules themselves are the real ones: their parameters, attributes and process groups, and what Megatron's wrappers
hand them, which is what the metrics read.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _norm(kind: str, x: Tensor, gain: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
    gain = gain.float() + (1.0 if zero_centered else 0.0)
    if kind == "RMSNorm":
        y = functional.rms_norm(x.float(), (x.shape[-1],), gain, eps)
    else:
        y = functional.layer_norm(x.float(), (x.shape[-1],), gain, None if bias is None else bias.float(), eps)
    return y.to(x.dtype)


def _column_input(module: Any, x: Tensor) -> Tensor:
    """Return what the GEMM of a column-parallel module multiplies: TE gathers the sequence itself."""
    from megatron.core.tensor_parallel import mappings

    group = module.tp_group
    if module.sequence_parallel and module.tp_size > 1:
        return mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    return mappings.copy_to_tensor_model_parallel_region(x, group=group)


def _product(module: Any, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    from megatron.core.tensor_parallel import mappings

    if module.parallel_mode == "column":
        x = _column_input(module, x)
    y = x @ module.weight.T
    if module.parallel_mode == "row":
        if module.sequence_parallel and module.tp_size > 1:
            y = mappings.reduce_scatter_to_sequence_parallel_region(y, group=module.tp_group)
        else:
            y = mappings.reduce_from_tensor_model_parallel_region(y, group=module.tp_group)
    if module.return_bias:
        return y, module.bias
    return y + module.bias if module.use_bias else y


def linear(self: Any, inp: Tensor, is_first_microbatch: Any = None, **kwargs: Any) -> Any:
    """Stands in for `te.pytorch.Linear.forward`."""
    return _product(self, inp)


def layernorm_linear(self: Any, inp: Tensor, is_first_microbatch: Any = None, **kwargs: Any) -> Any:
    """Stands in for `te.pytorch.LayerNormLinear.forward`: the norm comes before the gather."""
    bias = getattr(self, "layer_norm_bias", None)
    normed = _norm(self.normalization, inp, self.layer_norm_weight, bias, self.eps, self.zero_centered_gamma)
    return _product(self, normed)


def grouped_linear(self: Any, inp: Tensor, m_splits: Any, is_first_microbatch: Any = None, **kwargs: Any) -> Any:
    """Stands in for `te.pytorch.GroupedLinear.forward`: expert by expert, no communication."""
    pieces = torch.split(inp, [int(n) for n in m_splits])
    y = torch.cat([x @ getattr(self, f"weight{i}").T for i, x in enumerate(pieces)])
    return (y, None) if self.return_bias else y


def norm(self: Any, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stands in for `te.pytorch.RMSNorm.forward` and `LayerNorm.forward`."""
    kind = "RMSNorm" if "RMS" in type(self).__name__ else "LayerNorm"
    return _norm(kind, inp, self.weight, getattr(self, "bias", None), self.eps, self.zero_centered_gamma)


class _Everywhere(torch.autograd.Function):
    """All ranks' tensors, stacked; the gradient of a rank's tensor is the sum of what all ranks made of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        pieces = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(pieces, x.contiguous(), group=group)
        return torch.stack(pieces)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.group.rank()], None


def attention(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stands in for `te.pytorch.DotProductAttention.forward`: causal, [s, b, heads, size], context-parallel or not.

    Context-parallel rank r of n holds chunks r and 2n - 1 - r of the sequence.
    """
    from megatron.core import parallel_state

    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    repeat = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)
    chunk = query.shape[0] // 2
    places = [
        torch.cat([torch.arange(chunk) + r * chunk, torch.arange(chunk) + (2 * ranks - 1 - r) * chunk])
        for r in range(ranks)
    ]
    if ranks == 1:
        places = [torch.arange(query.shape[0])]
    else:
        group = parallel_state.get_context_parallel_group()
        key, value = (_Everywhere.apply(t, group).flatten(0, 1) for t in (key, value))
    scale = self.softmax_scale if getattr(self, "softmax_scale", None) else query.shape[-1] ** -0.5
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * scale
    future = places[rank][:, None] < torch.cat(places)[None, :]
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


def stand_in() -> None:
    """Put all of the above in place for this process."""
    import transformer_engine.pytorch as te

    te.Linear.forward = linear
    te.LayerNormLinear.forward = layernorm_linear
    te.GroupedLinear.forward = grouped_linear
    te.RMSNorm.forward = norm
    te.LayerNorm.forward = norm
    te.DotProductAttention.forward = attention
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # the router then multiplies with torch
    _optimizer_without_kernels()


def _optimizer_without_kernels() -> None:
    """Give Megatron the optimizer and the norm that it takes where Transformer Engine is not installed."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as wrappers

    optimizer.Adam = torch.optim.AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = True
    for module in (clip_grads, wrappers):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None
