"""DeepSpeed's JSON file: every key is honoured, held to the command line, or refused in one line that says why."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_patch.config.deepspeed_file import EnginePlan, mistakes, plan_engine
from megatron_patch.config.deepspeed_keys import PASSED, REFUSED, SAID_TWICE
from megatron_patch.errors import ConfigError, ConfigErrors
from tests.support.pool import Pool

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
        (
            {"optimizer": {"type": "Adam", "legacy_fusion": True}},
            {},
            "optimizer.legacy_fusion True: expected no leg",
        ),
        (adamw(adam_w_mode=False), {}, "adam_w_mode False: expected true: the width rules are derived for AdamW"),
        (adamw(amsgrad=True), {}, "optimizer.params.amsgrad given: expected one of lr, weight_decay"),
        ({"managed_gradient_accumulation": True}, {}, "has divided the loss by the number of micro batches already"),
        ({"gradient_allreduce_op": "sum"}, {}, "gradients are averaged over the ranks"),
        ({"torch_autocast": {"enabled": True}}, {}, "torch_autocast given: expected no torch_autocast"),
        ({"activation_checkpointing": {}}, {}, "--recompute-granularity does it"),
        ({"zero_optimisation": {"stage": 1}}, {}, "zero_optimisation given: expected a key that this package knows"),
        ({"zero_optimization": {"stage": 4}}, {}, "stage 4: expected 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, {}, "zero_optimization.stage true: expected a number"),
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
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "overlap_com given: expected a key that this packa"),
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "; did you mean overlap_comm?"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "expected one of grad_accum_dtype; did you mean grad_accum_dty"),
        ({"checkpoint": {"load_universl": True}}, "expected one of tag_validation, load_universal; did you mean load_"),
        (
            {"bf16": {"enable": True}},
            "bf16.enable given: expected one of enabled, check_grad_overflow; did you mean en",
        ),
        (
            {"gradient_cliping": 1.0},
            "gradient_cliping given: expected a key that this package knows the consequences o",
        ),
        ({"gradient_cliping": 1.0}, "did you mean gradient_clipping?"),
        (adamw(learning_rate=1e-2), "optimizer.params.learning_rate given: expected one of lr, weight_decay, betas"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "5e8"}}, 'size "5e8": expected a number; correct it'),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": -1}}, "size -1: expected a number >= 0"),
        ({"zero_optimization": {"stage": "1"}}, 'zero_optimization.stage "1": expected a number'),
        ({"checkpoint": {"load_universal": "false"}}, 'load_universal "false": expected true or false'),
        ({"data_types": {"grad_accum_dtype": "half"}}, "grad_accum_dtype half: expected fp32 or bf16; correct it"),
        (
            {"data_types": {"param_dtype": "fp32"}},
            "param_dtype fp32: expected no param_dtype: Megatron's --bf16 decides",
        ),
        (
            {"bf16": {"bf16_master_weights_and_grads": True}},
            "expected false: without fp32 weights small updates are lo",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "offload_optimizer.ratio 0.5: expected 1: below it DeepSpeed 0.19 updates a part of the weights by a",
        ),
        ({"zero_optimization": {"stage": 1, "load_from_fp32_weights": False}}, "False: expected true: a resumed run"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "False: expected true: the norm is logged"),
        ({"python_gc": True}, "python_gc True: expected the key disable_python_gc, as DeepSpeed spells it; rename it"),
    ],
)
def test_what_deepspeed_would_ignore_or_fail_over_later(tmp_path: Path, content: dict[str, Any], text: str) -> None:
    assert text in said(tmp_path, {**ZERO1, **content})


def test_sums_in_fp32_asked_for_on_the_command_line_are_asked_for_in_the_file(tmp_path: Path) -> None:
    """Megatron sets the flag itself with --bf16, in its validation: what counts is what was typed."""
    typed = {key: value for key, value in ARGS.items() if key != "data_parallel_size"}
    typed |= {"world_size": 8, "accumulate_allreduce_grads_in_fp32": True}
    path = tmp_path / "ds.json"
    for sums, number in ({}, 1), ({"grad_accum_dtype": "bf16"}, 1), ({"grad_accum_dtype": "fp32"}, 0):
        path.write_text(json.dumps({**ZERO1, "data_types": sums}))
        found = mistakes(str(path), SimpleNamespace(**typed))
        assert len(found) == number
        assert all("expected fp32, as --accumulate-allreduce-grads-in-fp32 says" in str(error) for error in found)
        assert mistakes(str(path), SimpleNamespace(**typed, data_parallel_size=4)) == []


def test_what_says_nothing_is_not_refused(tmp_path: Path) -> None:
    quiet = {
        "torch_autocast": {"enabled": False},
        "gradient_allreduce_op": "mean",
        "sequence_parallel_size": 1,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": "auto",
            "zero_hpz_partition_size": 1,
            "round_robin_gradients": False,
            "load_from_fp32_weights": True,
            "offload_optimizer": {"device": "none", "ratio": 1.0, "nvme_path": None},
        },
    }
    assert plan(tmp_path, quiet).stage == 3
    assert plan(tmp_path, {**ZERO1, "zero_optimization": None}, bf16=False).stage == 0


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    """A file as one finds them, with the mistakes of several people."""
    wrong = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 7,
        "optimizer": {"type": "MuAdamW", "params": {"lr": 1e-4, "weight_decay": 0.3, "amsgrad": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 100}},
        "bf16": {"enabled": False},
        "zero_optimisation": {"stage": 2},
        "zero_optimization": {"stage": 2, "overlap_com": True, "round_robin_gradients": True},
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(wrong))
    with pytest.raises(ConfigErrors) as caught:
        plan_engine(str(path), SimpleNamespace(**ARGS))
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.errors) == len(set(lines)) == 12
    assert all(line.startswith(f"{path}: ") and ": expected " in line and "; " in line for line in lines)
    for key in (
        *("train_batch_size 8", "train_micro_batch_size_per_gpu 4", "gradient_accumulation_steps 7", "bf16.enabled"),
        *("optimizer.type MuAdamW", "optimizer.params.lr 0.0001", "optimizer.params.weight_decay 0.3"),
        *("optimizer.params.amsgrad", "scheduler WarmupDecayLR", "zero_optimisation given"),
        *("zero_optimization.overlap_com", "zero_optimization.round_robin_gradients True"),
    ):
        assert sum(f": {key}" in line for line in lines) == 1, key


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


class Asked(dict[str, Any]):
    """A block of the file that notes which of its keys are asked for."""

    def __init__(self, content: dict[str, Any], asked: set[str], above: str = "") -> None:
        super().__init__(content)
        self.asked, self.above = asked, above

    def note(self, key: object) -> None:
        self.asked.add(f"{self.above}{key}")

    def get(self, key: Any, default: Any = None) -> Any:
        self.note(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.note(key)
        return super().__contains__(key)

    def keys(self) -> Any:
        return self


def deepspeeds_keys() -> set[str]:
    """In a worker: every key that DeepSpeed reads, dotted; of blocks that are models, every field and alias."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    asked: set[str] = set()
    file = Asked({"train_batch_size": 1}, asked)
    for block, content in {
        "checkpoint": {},
        "data_types": {},
        "flops_profiler": {},
        "optimizer": {"type": "x"},
    }.items():
        file[block] = Asked(content, asked, f"{block}.")
    DeepSpeedConfig(file)
    for block, model in {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "tensorboard": TensorBoardConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
        "comet": CometConfig,
    }.items():
        for name, of in model.model_fields.items():
            asked |= {f"{block}.{key}" for key in (name, of.alias) if key}
    return asked


def dotted(keys: Any, above: str = "") -> set[str]:
    found = set()
    for key, kind in keys.items():
        found |= {f"{above}{key}"} | (set() if isinstance(kind, str) else dotted(kind, f"{above}{key}."))
    return found


def test_the_tables_have_deepspeeds_keys_and_no_others(pool: Pool) -> None:
    """A DeepSpeed with a new key is to be looked at; one that no longer reads a key would ignore it."""
    (theirs,) = pool.run(deepspeeds_keys, distributed=False)
    ours = dotted(PASSED) | dotted(SAID_TWICE)
    blocks = ("optimizer.params.", "fp16.", "timers.throughput")  # read in other places
    assert {key for key in theirs - ours - set(REFUSED) if not key.startswith(blocks)} == set()
    assert {key for key in ours - theirs if not key.startswith(blocks)} == set()
    assert ours & set(REFUSED) == set()
