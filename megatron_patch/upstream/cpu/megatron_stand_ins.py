"""What the CPU platform replaces in Megatron, by what, and why: one tuple, `MEGATRON_STAND_INS`.

Each closes a gap of core 0.19.2 that is met without Transformer Engine or without NCCL and has no flag. Where upstream
closes it, the entry becomes superfluous, not wrong; remove it when the oldest supported version has the fix. Neither
torch nor Megatron is imported at module level.
"""

import functools
from collections.abc import Callable
from typing import Any

from megatron_patch.upstream.cpu.torch_stand_ins import RNG_REASON, StandIn, nothing, set_rng_state


def _local_norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, *unused: Any, **also_unused: Any) -> Any:
    """Replaces `WrappedTorchNorm.__new__`; the further parameters are unused by the original as well."""
    from megatron_patch.kernels.norms import build_norm

    return build_norm(config, hidden_size, eps)


def _attention_by_torch(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`DotProductAttention.forward` by torch's fused kernel, where that computes the same: causal, fp32, no dropout.

    Upstream's writes out all scores [b, np, s, s] several times, masked ones too: at width 128, sequence 128, it is a
    third of a training step. What a sum's order changes is the last digits.
    """

    @functools.wraps(forward)
    def attend(
        self: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        attn_mask_type: Any = None,  # upstream does not use it either
        attention_bias: Any = None,
        packed_seq_params: Any = None,
    ) -> Any:
        import torch
        from megatron.core.transformer.enums import AttnMaskType

        softmax = self.scale_mask_softmax
        plain = (
            attention_mask is attention_bias is packed_seq_params is self.softmax_offset is None
            and softmax.attn_mask_type == AttnMaskType.causal
            and softmax.window_size is None
            and softmax.scale is None
            and query.dtype == torch.float32
            and len(query) == len(key)
            and not (self.training and self.attention_dropout.p)
        )
        if not plain:
            return forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [s, b, heads, size] -> [b, heads, s, size]
        context = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return context.permute(2, 0, 1, 3).reshape(len(query), query.shape[1], -1)

    return attend


def _state_dict_before_the_first_step(state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """`DistributedOptimizer.state_dict`, which reads Adam's step off its state, also while there is no state yet."""

    @functools.wraps(state_dict)
    def of_any_age(self: Any) -> Any:
        if self.optimizer.state:
            return state_dict(self)
        import torch

        actual = self.optimizer.state_dict()
        # Only the step is read of this entry; the state itself is no part of the result.
        self.optimizer.state_dict = lambda: {**actual, "state": {0: {"step": torch.tensor(0.0)}}}
        try:
            return state_dict(self)
        finally:
            del self.optimizer.state_dict

    return of_any_age


def _load_with_a_step_for_each(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """`DistributedOptimizer.load_state_dict`, which gives all parameters one tensor as their step count."""

    @functools.wraps(load_state_dict)
    def load(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    return load


def _set_states_but_the_step(set_states: Callable[..., Any]) -> Callable[..., Any]:
    """`DistributedOptimizer._set_main_param_and_optimizer_states`, for tensors that are parameters, and Adam's step.

    `load_state_dict` has set the step from the checkpoint already. Of the sharding formats, "dp_reshardable" brings
    here the step of the optimizer just built, 0; "fully_reshardable" brings none, and upstream looks for it in vain.
    """

    @functools.wraps(set_states)
    def set_others(self: Any, model_param: Any, tensors: Any) -> None:
        import torch

        with torch.no_grad():
            set_states(self, model_param, {**tensors, "step": None})  # what is no tensor is skipped

    return set_others


def _gather_of_unequal_parts(gather: Callable[..., Any]) -> Callable[..., Any]:
    """`_gather_along_first_dim`, where the ranks bring different numbers of rows: padded to the largest, then cut."""

    @functools.wraps(gather)
    def gather_padded(input_: Any, group: Any, output_split_sizes: Any = None, *rest: Any, **named: Any) -> Any:
        import torch

        rows = [] if output_split_sizes is None else [int(n) for n in output_split_sizes]
        if len(set(rows)) < 2 or group.size() == 1:
            return gather(input_, group, output_split_sizes, *rest, **named)
        padded = input_.new_zeros(max(rows), *input_.shape[1:])
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in rows]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])

    return gather_padded


def _broadcast_instead(gather: Callable[..., None]) -> Callable[..., None]:
    """`LayerWiseDistributedOptimizer.allgather_params`, by upstream's own reference for it: a broadcast each."""

    @functools.wraps(gather)
    def broadcast(self: Any) -> None:
        self.broadcast_params()

    return broadcast


def _splits_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`maybe_move_tensor_to_cpu` for a tensor that is there already: upstream then forgets the conversion to numpy."""
    import torch

    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _megatron_set_rng_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
    set_rng_state(new_state)


def _local_layers(_: Any) -> Any:
    from megatron_patch.upstream.cpu.hybrid import local_submodules

    return local_submodules()


def _local_mamba_norm(_: Any) -> Any:
    from megatron_patch.upstream.cpu.hybrid import ExtendedRMSNorm

    return ExtendedRMSNorm


def _in_torch(name: str) -> Callable[[Any], Any]:
    """Return what takes a kernel's place; looked up late, since torch must not be imported here."""

    def kernel(_: Any) -> Any:
        from megatron_patch.kernels import mamba

        return getattr(mamba, name)

    return kernel


def _local_final_norm(_: Any) -> Any:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return WrappedTorchNorm


_MIXER = "megatron.core.ssm.mamba_mixer"
_NO_TRITON = "mamba_ssm's kernels are Triton's and need a GPU"

MEGATRON_STAND_INS: tuple[StandIn, ...] = (
    StandIn(
        "megatron.training.initialize:_warmup_jit_function",
        nothing,
        "nothing is compiled on CPU; and its torch.rand would advance the generator that initialises the weights by an "
        "amount that depends on the tensor-parallel size",
    ),
    StandIn(
        "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
        _attention_by_torch,
        "speed: the same numbers to 1e-6 by torch's fused attention",
        wraps=True,
    ),
    StandIn(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        _splits_as_numpy,
        "all_to_all_single takes its split sizes as a sequence of int, not as the CPU tensor upstream leaves there",
    ),
    StandIn(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",
        _state_dict_before_the_first_step,
        "with torch's Adam (no Transformer Engine) loading a checkpoint stops at `assert len(steps) == 1`",
        wraps=True,
    ),
    StandIn(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
        _set_states_but_the_step,
        "loading a checkpoint in fp32 writes in place into views of parameters, and sets Adam's step to 0",
        wraps=True,
    ),
    StandIn(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
        _load_with_a_step_for_each,
        "after a resume, torch's Adam advances the one shared step once for every parameter: wrong bias correction",
        wraps=True,
    ),
    StandIn(
        "megatron.core.tensor_parallel.mappings:_gather_along_first_dim",
        _gather_of_unequal_parts,
        "gloo gathers parts of one size only; experts split over tensor-parallel ranks have as many rows as tokens",
        wraps=True,
    ),
    StandIn(
        "megatron.core.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer.allgather_params",
        _broadcast_instead,
        "gloo gathers parts of one size only; ranks own parameters of different sizes",
        wraps=True,
    ),
    StandIn("megatron.core.tensor_parallel.random:_set_cuda_rng_state", _megatron_set_rng_state, RNG_REASON),
    StandIn(
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        _local_norm,
        "the local spec's norm refuses sequence parallelism; a new __new__ reaches every module that bound the class",
    ),
    StandIn(
        "megatron.core.models.hybrid.hybrid_layer_specs:hybrid_stack_spec.submodules",
        _local_layers,
        "upstream's only hybrid spec is Transformer Engine's; inside the object, so that each of its names has it",
        wraps=True,
    ),
    StandIn(
        "megatron.core.models.hybrid.hybrid_block:TENorm",
        _local_final_norm,
        "the hybrid stack builds its last norm from this name and not from its spec",
        wraps=True,
    ),
    StandIn(f"{_MIXER}:HAVE_MAMBA_SSM", True, _NO_TRITON),
    StandIn(f"{_MIXER}:MAMBA_HAS_STATE_DTYPE", False, "the scan in plain torch keeps its state in fp32"),
    StandIn(f"{_MIXER}:ExtendedRMSNorm", _local_mamba_norm, _NO_TRITON, wraps=True),
    *(
        StandIn(f"{_MIXER}:{name}", _in_torch(name), _NO_TRITON, wraps=True)
        for name in ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")
    ),
)
