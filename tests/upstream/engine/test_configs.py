"""configs/deepspeed: accepted at their world sizes, and the same runs as the configs for Megatron's own optimizer."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.entry.run import yaml_arguments
from megatron_patch.files.yaml_flags import load_yaml
from tests.support.pool import Pool

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "configs/deepspeed"
STAGES = {"zero1": (1, "torch"), "zero2": (2, "torch"), "zero3": (3, "torch"), "zero3_offload": (3, "cpu")}
WORLD = {"target_7b_h100_bf16": 64, "target_70b_h100_bf16": 512}
MEGATRONS_ALONE = {
    "use-distributed-optimizer",
    "overlap-grad-reduce",
    "overlap-param-gather",
    "async-save",
    "use-persistent-ckpt-worker",
    "async-strategy",
    "pipeline-model-parallel-size",
    "num-layers-per-virtual-pipeline-stage",
}


def planned(name: str, stage: str) -> tuple[int, str, int, str]:
    """In a worker: stage, AdamW, micro batches and what is said at start, after every check before a process group."""
    import os
    import sys

    from megatron.core.models.common.embeddings import rope_utils
    from megatron.training import arguments

    from megatron_patch.config.arguments import add_arguments
    from megatron_patch.config.deepspeed_file import plan_engine
    from megatron_patch.upstream.flags import validate_around

    parser = add_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    more = ["--deepspeed", "--deepspeed-config", str(FOLDER / f"{stage}.json"), "--save", "/nowhere"]
    more += ["--data-path", "x", "--split", "999,1,0", "--tokenizer-model", "y"]
    sys.argv = ["x", *yaml_arguments(load_yaml(str(FOLDER / f"{name}.yaml")), parser, more), *more]
    os.environ.update(WORLD_SIZE=str(WORLD[name]), RANK="0")
    module: Any = arguments
    module.get_device_arch_version = lambda: 9
    rope: Any = rope_utils
    rope.fused_apply_rotary_pos_emb = object()
    args = arguments.parse_args(add_arguments)
    validate_around(lambda: arguments.validate_args(args), args, parser.get_default)
    plan = plan_engine(args.deepspeed_config, args)
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    return plan.stage, plan.adam, micro_batches, plan.said()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", WORLD)
def test_accepted(pool: Pool, name: str, stage: str) -> None:
    ((zero, adam, micro_batches, said),) = pool.run(planned, distributed=False, name=name, stage=stage)
    assert (zero, adam) == STAGES[stage]
    assert micro_batches == 16
    assert "bf16, gradients summed in fp32" in said


def test_every_file_is_among_them() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(STAGES)
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(WORLD)


@pytest.mark.parametrize("name", WORLD)
def test_the_same_run_as_megatrons(name: str) -> None:
    ours, theirs = load_yaml(str(FOLDER / f"{name}.yaml")), load_yaml(str(ROOT / f"configs/{name}.yaml"))
    assert set(theirs) - set(ours) <= MEGATRONS_ALONE
    assert set(ours) - set(theirs) == {"no-gradient-accumulation-fusion"}
    assert all(theirs[key] == value for key, value in ours.items() if key in theirs)
