"""fp32 weights in the state of Transformer Engine's FusedAdam, which needs a GPU: a stand-in has its names."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_patch.errors import ConfigError
from megatron_patch.upstream.monitor.masters import _state_reader, with_remainder


def split_as_adam_cu_does(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper half, rounded up where the lower half is negative as an int16, and the lower half."""
    bits = master.view(torch.int32)
    lower = (bits & 0xFFFF).to(torch.int32)
    lower = torch.where(lower >= 1 << 15, lower - (1 << 16), lower).to(torch.int16)
    upper = (bits >> 16) + (lower < 0).to(torch.int32)
    return upper.to(torch.int16).view(torch.bfloat16), lower


def test_a_bf16_weight_and_its_remainder_are_the_fp32_weight_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    master = torch.cat(
        [torch.randn(4096, generator=generator) * 10.0**power for power in range(-30, 30, 6)]
        + [torch.tensor([0.0, -0.0, 1.0, -1.0, 1.00390625, 65504.0])]
    )
    weight, remainder = split_as_adam_cu_does(master)
    assert (weight.float() - master).abs().max() > 0
    assert with_remainder(weight, remainder).view(torch.int32).equal(master.view(torch.int32))


@pytest.mark.parametrize("kept", ["nothing yet", "fp32", "int16"])
def test_the_reader_finds_what_the_optimizer_keeps(kept: str) -> None:
    master = torch.randn(24, generator=torch.Generator().manual_seed(1))
    weight, remainder = split_as_adam_cu_does(master)
    shard, parameter = torch.nn.Parameter(weight), torch.nn.Parameter(torch.zeros(1))
    state = {"nothing yet": {}, "fp32": {"master_param": master}, "int16": {"master_param": remainder}}[kept]
    child = adam(shard, parameter, state)
    expected = weight.float() if kept == "nothing yet" else master
    assert _state_reader(child, parameter)().equal(expected)


def test_coarser_weights_are_no_truth() -> None:
    shard, parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)), torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigError, match=r"--use-precision-aware-optimizer keeps weights in torch\.float16"):
        _state_reader(adam(shard, parameter, {"master_param": torch.zeros(4, dtype=torch.float16)}), parameter)()


def adam(shard: Any, parameter: Any, state: dict[str, torch.Tensor]) -> Any:
    """A distributed optimizer around FusedAdam, as far as Megatron's own accessor looks at it, which is used."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    inner = SimpleNamespace(
        param_groups=[{"params": [shard]}],
        state={shard: state} if state else {},
        get_unscaled_state=lambda one, name: inner.state[one][name],
    )
    child = SimpleNamespace(
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=True),
        model_param_group_index_map={parameter: (0, 0)},
        optimizer=inner,
    )
    accessor = DistributedOptimizer._get_main_param_and_optimizer_states
    child._get_main_param_and_optimizer_states = lambda one: accessor(child, one)
    return child
