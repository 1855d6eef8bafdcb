"""What DeepSpeed does to groups and weights without a word, and we say: LRs lost, frozen or flattened, bits dropped."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_patch.errors import AuditError, ConfigError
from megatron_patch.plain import AlignmentMeter, audit, width_groups
from tests.support.plain_models import mixed, proxy
from tests.support.plain_training import PLAN, initialised_engine
from tests.support.pool import Pool

CPU = {"DS_ACCELERATOR": "cpu"}


def said(engine: Any) -> str:
    with pytest.raises(AuditError) as caught:
        audit(engine)
    return str(caught.value)


class Cpu(torch.optim.AdamW):
    """In the place of DeepSpeedCPUAdam, which has to be compiled."""


def second_optimizer() -> str:
    """`offload_optimizer.ratio` below 1 (Twin-Flow): the first group of the second optimizer is a copy."""
    from deepspeed.runtime.zero import stage3

    stage3.DeepSpeedCPUAdam = Cpu
    model = mixed()
    groups = width_groups(model, base=proxy(), **PLAN)
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}, "stage3_param_persistence_threshold": 0}
    config = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    engine = initialised_engine(model, groups, 3, config=config, optimizer=Cpu(groups))
    for group in engine.optimizer.param_groups:
        group["lr"] /= 10
    first, *others = engine.optimizer.backup_optimizer.param_groups
    live = engine.optimizer.param_groups
    assert first["lr"] == pytest.approx(10 * live[0]["lr"]), "DeepSpeed has mended it: allow it"
    assert [group["lr"] for group in others] == [group["lr"] for group in live[1:]]
    return said(engine)


def test_a_second_optimizer_that_keeps_an_lr_is_found(pool: Pool) -> None:
    (text,) = pool.run(second_optimizer, env=CPU)
    assert text.startswith("offload_optimizer.ratio below 1, or super_offload: DeepSpeed updates a part of the weights")


def replaced(stage: int) -> str:
    model = mixed()
    engine = initialised_engine(model, width_groups(model, base=proxy(), **PLAN), stage)
    audit(engine)
    group = engine.optimizer.param_groups[1]
    group["params"] = [torch.zeros_like(group["params"][0])]
    return said(engine)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_group_that_trains_another_tensor_is_found(stage: int, pool: Pool) -> None:
    (text,) = pool.run(replaced, stage=stage, env=CPU)
    assert text.startswith("param group 1 of the engine trains 1 tensors, but not the flat one that ZeRO keeps its")


def loaded_universally(folder: str) -> str:
    """Stage 3 from a universal checkpoint: the loader copies the first group's hyperparameters into all."""
    from deepspeed.checkpoint import ds_to_universal

    def built(**config: Any) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        groups = width_groups(model, base={"2.weight": 16, "4.weight": 16, "*": 8}, output="4", **PLAN)
        return initialised_engine(model, groups, 3, config=config)

    def trained(engine: Any) -> None:
        engine.backward(engine(torch.ones(3, 8)).square().mean())
        engine.step()

    engine = built()
    trained(engine)
    engine.save_checkpoint(folder, tag="step", client_state={"universal_checkpoint_info": {}})
    sys.argv = ["x", "--input_folder", f"{folder}/step", "--output_folder", f"{folder}/universal"]
    ds_to_universal.main(ds_to_universal.parse_arguments())
    resumed = built(checkpoint={"load_universal": True})
    audit(resumed)
    resumed.load_checkpoint(folder, tag="universal")
    return said(resumed)


def test_groups_that_a_universal_checkpoint_has_made_equal_are_found(pool: Pool, tmp_path: Path) -> None:
    (text,) = pool.run(loaded_universally, folder=str(tmp_path), env=CPU)
    assert "the optimizer has " in text


def bf16_masters() -> str:
    from deepspeed.runtime.zero import stage_1_and_2

    stage_1_and_2.DeepSpeedCPUAdam = Cpu
    model = mixed()
    groups = width_groups(model, base=proxy(), **PLAN)
    config = {
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = initialised_engine(model, groups, 2, config=config, optimizer=Cpu(groups))
    with pytest.raises(ConfigError) as caught:
        AlignmentMeter(engine)
    return str(caught.value)


def test_updates_of_masters_in_bf16_are_not_measured(pool: Pool) -> None:
    (text,) = pool.run(bf16_masters, env=CPU)
    assert text.startswith("model an engine with bf16_master_weights_and_grads: expected fp32 weights, from which an u")
