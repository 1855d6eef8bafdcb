"""Attention on CPU by torch's fused kernel, against upstream's own forward in float64, and where upstream's stays."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_patch.upstream.cpu.megatron_stand_ins import _attention_by_torch
from tests.support.pool import Pool
from tests.support.training import TINY, Hooks, train

LENGTH, BATCH, HEADS, SIZE = 12, 3, 4, 8


def _layer(groups: int = HEADS, scale: float | None = None, dropout: float = 0.0, **config: Any) -> Any:
    """In a worker: upstream's attention as the local layer spec builds it."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
        get_cuda_rng_tracker().add("model-parallel-rng", 1)
    settings = TransformerConfig(
        num_layers=3,
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        attention_dropout=dropout,
        **config,
    )
    alone: Any = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    return DotProductAttention(settings, 2, AttnMaskType.causal, "self", softmax_scale=scale, pg_collection=alone)


def _compare(groups: int, scale: float | None) -> tuple[float, list[float]]:
    """In a worker: the largest error over the largest value, of the output and of the three gradients."""
    import torch
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    layer = _layer(groups, scale)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(LENGTH, BATCH, h, SIZE, generator=generator) for h in (HEADS, groups, groups)]
    weights = torch.randn(LENGTH, BATCH, HEADS * SIZE, generator=generator)
    upstream = DotProductAttention.forward.__wrapped__  # type: ignore[attr-defined]
    results = []
    for forward, dtype in ((DotProductAttention.forward, torch.float32), (upstream, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        output = forward(layer, *leaves, None)
        results.append([output, *torch.autograd.grad((output * weights.to(dtype)).sum(), leaves)])
    first, *others = (float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
    assert [t.shape for t in results[0]] == [t.shape for t in results[1]]
    return first, others


@pytest.mark.parametrize(("groups", "scale"), [(HEADS, None), (2, None), (1, 0.3)])
def test_the_numbers_are_upstreams(pool: Pool, groups: int, scale: float | None) -> None:
    ((output, gradients),) = pool.run(_compare, groups=groups, scale=scale, distributed=False)
    assert output < 1e-6
    assert max(gradients) < 2e-6


def _left_to_upstream() -> list[str]:
    """In a worker: the cases whose attention is upstream's."""
    import torch

    q = torch.randn(LENGTH, BATCH, HEADS, SIZE)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    plain = _layer()
    cases: dict[str, tuple[Any, ...]] = {
        "plain": (plain, q, q, q, None),
        "a mask of its own": (plain, q, q, q, mask),
        "other length of keys": (plain, q[:1], q, q, None),
        "bf16": (plain, q.bfloat16(), q.bfloat16(), q.bfloat16(), None),
        "dropout": (_layer(dropout=0.1), q, q, q, None),
        "no dropout in evaluation": (_layer(dropout=0.1).eval(), q, q, q, None),
        "window": (_layer(window_size=(3, 0)), q, q, q, None),
        "sink": (_layer(softmax_type="off-by-one"), q, q, q, None),
        "scaled per layer": (_layer(apply_query_key_layer_scaling=True, attention_softmax_in_fp32=True), q, q, q, None),
        "packed": (plain, q, q, q, None, None, None, "sequences"),
    }
    attend = _attention_by_torch(lambda *args, **named: "upstream")
    found = [name for name, given in cases.items() if isinstance(attend(*given), str)]
    if isinstance(attend(plain, q, q, q, None, attention_bias=q), str):
        found.append("bias")
    return found


def test_what_the_kernel_does_not_compute_is_left_to_upstream(pool: Pool) -> None:
    (found,) = pool.run(_left_to_upstream, distributed=False)
    assert found == [
        "a mask of its own",
        "other length of keys",
        "bf16",
        "dropout",
        "window",
        "sink",
        "scaled per layer",
        "packed",
        "bias",
    ]


class Unfused(Hooks):
    """A run with upstream's own attention."""

    def before_arguments(self) -> None:
        from megatron.core.transformer.dot_product_attention import DotProductAttention

        DotProductAttention.forward = DotProductAttention.forward.__wrapped__  # type: ignore[attr-defined]


def test_a_run_has_the_same_losses(pool: Pool) -> None:
    flags = "--no-create-attention-mask-in-dataloader --group-query-attention --num-query-groups 2 --swiglu"
    argv = [*TINY, *flags.split()]
    fused = pool.run(train, argv=argv, steps=20)[0]
    unfused = pool.run(train, argv=argv, steps=20, hooks=Unfused())[0]
    assert fused.losses == pytest.approx(unfused.losses, abs=5e-6)
    assert fused.losses != unfused.losses  # the kernel was in use
