"""DeepSpeed's JSON file: every key is honoured, held to the command line, or refused in one line that says why."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_patch.errors import ConfigError
from megatron_patch.upstream.engine.ds_config import EnginePlan, plan_engine

ARGS: dict[str, Any] = {
    "global_batch_size": 16,
    "micro_batch_size": 2,
    "data_parallel_size": 4,
    "clip_grad": 1.0,
    "bf16": True,
    "fp16": False,
    "lr": 1e-2,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "tensor_model_parallel_size": 2,
}
ZERO1: dict[str, Any] = {"zero_optimization": {"stage": 1}}


def plan(folder: Path, content: Any, **args: Any) -> EnginePlan:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return plan_engine(str(path), SimpleNamespace(**{**ARGS, **args}))


def said(folder: Path, content: Any, **args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(folder, content, **args)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{folder}/", "")


def adamw(**params: Any) -> dict[str, Any]:
    return {**ZERO1, "optimizer": {"type": "AdamW", "params": params}}


@pytest.mark.parametrize(
    ("content", "args", "text"),
    [
        (
            {"train_batch_size": 8},
            {},
            "ds.json: train_batch_size 8: expected 16, as --global-batch-size says; give both the same, or leave "
            "train_batch_size out of the file",
        ),
        ({"train_micro_batch_size_per_gpu": 4}, {}, "4: expected 2, as --micro-batch-size says"),
        (
            {"gradient_accumulation_steps": 1},
            {},
            "1: expected 2, as --global-batch-size, --micro-batch-size and the data-parallel size says",
        ),
        ({"gradient_clipping": 0.5}, {}, "gradient_clipping 0.5: expected 1.0, as --clip-grad says"),
        ({"bf16": {"enabled": False}}, {}, "bf16.enabled False: expected True, as --bf16 says"),
        ({"bf16": {"enabled": True}}, {"bf16": False}, "bf16.enabled True: expected False, as --bf16 says"),
        ({"fp16": {"enabled": True}}, {}, "fp16.enabled True: expected False, as --fp16 says"),
        (adamw(lr=1e-3), {}, "optimizer.params.lr 0.001: expected 0.01, as --lr says"),
        (adamw(weight_decay=0.01), {}, "weight_decay 0.01: expected 0.1, as --weight-decay says"),
        (adamw(betas=[0.9, 0.999]), {}, "betas [0.9, 0.999]: expected [0.9, 0.95], as --adam-beta1 and --adam-beta2"),
        (adamw(eps=1e-6), {}, "optimizer.params.eps 1e-06: expected 1e-08, as --adam-eps says"),
    ],
)
def test_what_is_said_twice_must_be_the_same(
    tmp_path: Path, content: dict[str, Any], args: dict[str, Any], text: str
) -> None:
    assert text in said(tmp_path, {**ZERO1, **content}, **args)


@pytest.mark.parametrize(
    ("content", "args", "text"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, {}, "ds.json: scheduler WarmupLR: expected no scheduler: DeepSpeed's"),
        ({"scheduler": {"type": "OneCycle"}}, {}, "would write LRs of its own into the param groups"),
        (
            {"optimizer": {"type": "MuAdamW", "params": {"lr": 1e-2}}},
            {},
            "optimizer.type MuAdamW: expected Adam or AdamW: DeepSpeed's muP optimizers scale LR and weight decay",
        ),
        ({"optimizer": {"type": "Lamb"}}, {}, "optimizer.type Lamb: expected Adam or AdamW: the width rules"),
        ({"optimizer": {"params": {}}}, {}, "optimizer.type not given: expected Adam or AdamW"),
        ({"optimizer": {"type": "Adam", "legacy_fusion": True}}, {}, "optimizer.legacy_fusion given"),
        (adamw(adam_w_mode=False), {}, "adam_w_mode False: expected true: the width rules are derived for AdamW"),
        (adamw(amsgrad=True), {}, "amsgrad True: expected one of lr, weight_decay"),
        ({"managed_gradient_accumulation": True}, {}, "has divided the loss by the number of micro batches already"),
        ({"gradient_allreduce_op": "sum"}, {}, "gradients are averaged over the ranks"),
        ({"torch_autocast": {"enabled": True}}, {}, "torch_autocast given: expected no torch_autocast"),
        ({"activation_checkpointing": {}}, {}, "--recompute-granularity does it"),
        ({"zero_optimisation": {"stage": 1}}, {}, "zero_optimisation given: expected a key that this package knows"),
        ({"zero_optimization": {"stage": 4}}, {}, "stage 4: expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, {}, "stage True: expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, {}, "stage 0: expected 1, 2 or 3 with --bf16"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, {}, "overlap_comm True: expected false below"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            {},
            "offload_param cpu: expected ZeRO stage 3 or more",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            {},
            "offload_optimizer.device nvme: expected cpu or none",
        ),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, {}, "expected no ZeRO++"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, {}, "takes other fp32 weights for a par"),
        ({"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}, {}, "expected no elastic_checkpoint"),
        ({"optimizer": {"type": "AdamW", "params": 3}}, {}, "optimizer.params 3: expected a block {...}"),
        ({"bf16": True}, {}, "bf16 True: expected a block {...}"),
        (
            {"zero_optimization": {"stage": 3}, "checkpoint": {"load_universal": True}},
            {},
            "checkpoint.load_universal True: expected ZeRO stage 1 or 2, or 3 without tensor parallelism",
        ),
        ({"zero_optimization": True}, {}, "zero_optimization True: expected a block {...}"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_reason(
    tmp_path: Path, content: dict[str, Any], args: dict[str, Any], text: str
) -> None:
    assert text in said(tmp_path, {**ZERO1, **content}, **args)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "expected DeepSpeed's JSON; correct it: Expecting property name"),
        ("[]", "expected a JSON object"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "ds.json: stage twice: expected each key once in a block"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(tmp_path: Path, content: str, text: str) -> None:
    assert text in said(tmp_path, content)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--deepspeed-config .*no.json: expected a file that can be read"):
        plan_engine(str(tmp_path / "no.json"), SimpleNamespace(**ARGS))


def test_what_agrees_and_what_is_auto_is_taken_from_the_command_line(tmp_path: Path) -> None:
    every = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        **adamw(lr="auto", weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8),
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "steps_per_print": 100,
    }
    found = plan(tmp_path, every)
    assert (found.stage, found.adam, found.clip, found.universal) == (2, "fused", 1.0, False)
    assert found.config == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 100,
    }
    assert json.loads((tmp_path / "ds.json").read_text()) == every


OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("content", "adam"),
    [
        (ZERO1, "torch"),
        (adamw(torch_adam=True), "torch"),
        (adamw(), "fused"),
        (OFFLOAD, "cpu"),
        ({**OFFLOAD, "zero_force_ds_cpu_optimizer": False}, "torch"),
        ({**adamw(), **OFFLOAD}, "cpu"),
        ({**adamw(torch_adam=True), **OFFLOAD, "zero_force_ds_cpu_optimizer": False}, "torch"),
    ],
)
def test_whose_adam(tmp_path: Path, content: dict[str, Any], adam: str) -> None:
    found = plan(tmp_path, content)
    assert found.adam == adam
    assert {"torch": "torch's AdamW", "fused": "FusedAdam", "cpu": "DeepSpeedCPUAdam"}[adam] in found.said()


def test_no_clipping_and_no_precision_said(tmp_path: Path) -> None:
    found = plan(tmp_path, {}, clip_grad=0.0, bf16=False)
    assert (found.stage, found.clip, found.config["gradient_clipping"]) == (0, 0.0, 0.0)
    assert found.said().startswith("> DeepSpeed engine: ZeRO stage 0, torch's AdamW, fp32, gradients summed in fp32, ")
    assert "no clipping" in found.said()
