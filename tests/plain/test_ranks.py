"""Two ranks are one: DDP, FSDP2, HSDP and ZeRO 0 to 3 measure, and hold in their groups, what one process does."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_patch.errors import AuditError, ConfigError
from megatron_patch.plain import AlignmentMeter, audit, width_groups
from tests.support.plain_models import MIXED, Mixed, mixed, proxy
from tests.support.plain_training import PLAN, batch, initialised_engine, train
from tests.support.pool import Pool, RankFailure

LAYOUTS = ("ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_measure_what_one_process_does(layout: str, pool: Pool) -> None:
    one = train("one")
    for rank, result in enumerate(pool.run(train, ranks=2, layout=layout, env={"DS_ACCELERATOR": "cpu"})):
        assert result["values"] == one["values"]
        assert sorted(result["values"]) == sorted(MIXED)
        assert result["unmeasured"] == one["unmeasured"] == ("embedding.weight",)
        assert len(result["lines"]) == len(one["lines"]) == 12
        for found, expected in zip(result["lines"], one["lines"], strict=True):
            for key, value in expected.items():
                if isinstance(value, float) and key != "top_singular_value_error":
                    # The iteration stops within 1e-3, wherever rounding lets it.
                    tolerance = 1e-3 if key == "top_singular_value" else 1e-5
                    assert found[key] == pytest.approx(value, rel=tolerance), (expected["layer"], key)
                else:
                    assert key == "top_singular_value_error" or found[key] == value, (expected["layer"], key)
        # A rank holds its rows alone, at most one more than half of them.
        weights = [p for name, p in mixed().named_parameters() if MIXED[name][0] in ("matrix", "output")]
        rows = [((len(p) + 1) // 2, len(p) // 2)[rank] for p in weights]
        assert result["held"] == 2 * [4 * sum(r * p[0].numel() for r, p in zip(rows, weights, strict=True))]


BF16: dict[str, dict[str, Any]] = {
    "zero1": {"bf16": {"enabled": True}},
    "zero2": {"bf16": {"enabled": True}},
    "zero3": {"bf16": {"enabled": True}},
    "zero1 BF16_Optimizer": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


@pytest.mark.parametrize("kind", BF16)
def test_updates_of_bf16_weights_are_those_of_their_fp32_masters(kind: str, pool: Pool) -> None:
    one = train("one")
    (result, same) = pool.run(train, ranks=2, layout=kind[:5], config=BF16[kind], env={"DS_ACCELERATOR": "cpu"})
    assert result["lines"] == same["lines"]
    assert kind[6:] in result["optimizer"]
    for found, expected in zip(result["lines"], one["lines"], strict=True):
        assert found["weight_norm"] == pytest.approx(expected["weight_norm"], rel=5e-3)
        assert found["update_norm"] == pytest.approx(expected["update_norm"], rel=0.05)
        assert found["alignment_ratio"] == pytest.approx(expected["alignment_ratio"], rel=0.1)


def sharded_too_late() -> str:
    """What the audit says where `fully_shard` came after `width_groups`; nothing where it came before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(mixed(), mesh=mesh)
    optimizer = torch.optim.AdamW(width_groups(model, base=proxy(), **PLAN))
    audit(optimizer)
    with torch.no_grad():
        model(batch(1))
    audit(optimizer)
    late = mixed()
    optimizer = torch.optim.AdamW(width_groups(late, base=proxy(), **PLAN))
    fully_shard(late, mesh=mesh)
    with pytest.raises(AuditError) as caught:
        audit(optimizer)
    return str(caught.value)


def test_sharding_after_the_optimizer_is_built_is_found(pool: Pool) -> None:
    for said in pool.run(sharded_too_late, ranks=2):
        assert "the model's scale is another parameter since width_groups was called, as fully_shard" in said


def built_by_zero() -> dict[str, tuple[float, float]]:
    """LR and weight decay by name, of a model that ZeRO-3 has built in pieces."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with deepspeed.zero.Init(
        config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    ):
        model = Mixed()
    assert model.fc1.weight.numel() == 0
    engine = initialised_engine(model, width_groups(model, base=proxy(), **PLAN), 3)
    audit(engine)
    groups = engine.optimizer.param_groups
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def test_a_model_that_zero_has_built_in_pieces(pool: Pool) -> None:
    groups = width_groups(mixed(), base=proxy(), **PLAN)
    expected = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert pool.run(built_by_zero, ranks=2, env={"DS_ACCELERATOR": "cpu"}) == [expected] * 2


def transposed() -> list[dict[str, Any]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers.pytorch_utils import Conv1D

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(3)
    model = nn.Sequential(Conv1D(7, 5), nn.GELU(), Conv1D(3, 7))
    if ranks > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
    meter = AlignmentMeter(model, optimizer)
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(4))
    with meter.measure(1) as measured:
        mine = inputs.chunk(ranks)[dist.get_rank()] if ranks > 1 else inputs
        (10 * model(mine).square().mean()).backward()
        optimizer.step()
    return measured.lines


def test_transposed_weights_that_fully_shard_cuts_over_the_fan_in(pool: Pool) -> None:
    for lines in pool.run(transposed, ranks=2):
        for found, expected in zip(lines, transposed(), strict=True):
            for key in ("weight_norm", "update_norm", "weight_alignment", "update_alignment", "tokens"):
                assert found[key] == pytest.approx(expected[key], rel=1e-5), key


def refused() -> list[str]:
    """What a rank is told of mistakes that it, or another, makes."""
    rank = dist.get_rank()
    said = []

    def catch(call: Callable[[], Any]) -> None:
        with pytest.raises(ConfigError) as caught:
            call()
        said.append(str(caught.value))

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    other = copy.deepcopy(model)
    for p in other[1].parameters():
        dist.broadcast(p.detach(), 0)
    with torch.no_grad():
        other[0].weight.fill_(rank)
    dist.broadcast(model[0].weight.detach(), 0)
    dist.broadcast(model[1].weight.detach(), 0)
    catch(lambda: AlignmentMeter(other, torch.optim.AdamW(other.parameters())))
    meter = AlignmentMeter(model, torch.optim.AdamW(model.parameters()))
    meter.begin(1)
    model[0](torch.ones(2, 4)) if rank else model(torch.ones(2, 4))
    catch(meter.end)
    engine = initialised_engine(
        mixed(), width_groups(mixed(), base=proxy(), **PLAN), 0, config={"bf16": {"enabled": True}}
    )
    catch(lambda: AlignmentMeter(engine))
    model = mixed()
    engine = initialised_engine(model, width_groups(model, base=proxy(), **PLAN), 1)
    catch(lambda: AlignmentMeter(model, engine.optimizer))
    return said


def test_a_mistake_of_one_rank_is_told_on_all(pool: Pool) -> None:
    first, second = pool.run(refused, ranks=2, env={"DS_ACCELERATOR": "cpu"})
    assert first == second
    for said, complaint in zip(
        first,
        (
            "model with another 0 on each rank: expected the same weights on all ranks",
            "layers '.*': expected layers that the forward pass calls: 1 was not called since begin() on rank 1;",
            "model fc1 in torch.bfloat16: expected fp32 weights",
            "optimizer DeepSpeedZeroOptimizer: expected a torch optimizer, or DeepSpeed's engine as the model",
        ),
        strict=True,
    ):
        assert said.startswith(complaint)


def test_an_engine_that_mixes_up_its_fp32_weights_is_refused(pool: Pool) -> None:
    """With round_robin_gradients DeepSpeed 0.19.8 gives another parameter's."""
    config = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    with pytest.raises(RankFailure) as caught:
        pool.run(train, ranks=2, layout="zero2", config=config)
    for text in caught.value.errors.values():
        assert "model an engine with round_robin_gradients: expected" in text
