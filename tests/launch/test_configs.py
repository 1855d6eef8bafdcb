"""Every file in configs/ is accepted by Megatron's own validation and by ours, at the size its header names.

Nothing here needs a GPU or Transformer Engine. What Megatron 0.19.2 asks of the machine while it validates is answered
for it: the environment of rank 0 in a job of `WORLD_SIZES` ranks; "Hopper" when it asks for the GPU's generation; and,
where Transformer Engine is not installed, that its fused rotary kernel is there. It asks nothing else about Transformer
Engine for these files, not even for FP8, before layers are built.
"""

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.entry.run import yaml_arguments
from megatron_patch.files.yaml_flags import load_yaml
from megatron_patch.upstream.cpu.platform import cpu_arguments
from megatron_patch.upstream.flags import add_arguments, validate

CONFIGS = Path(__file__).parents[2] / "configs"
WORLD_SIZES = {
    "quickstart_proxy": 2,
    "example_proxy_w32": 1,
    "example_target_w256": 1,
    "paper_llama_w128": 8,
    "paper_llama_w256": 8,
    "paper_llama_w512": 8,
    "paper_llama_w1024": 8,
    "paper_llama_w2048": 8,
    "proxy_7b_w256": 8,
    "proxy_70b_w256": 8,
    "target_7b_h100_bf16": 64,
    "target_7b_h100_fp8": 64,
    "target_70b_h100_bf16": 512,
    "target_70b_h100_fp8": 512,
}
TARGETS = [name for name in WORLD_SIZES if name.startswith("target")]


def header(name: str) -> str:
    """The comment a file begins with, without its hashes."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    first_flag = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:first_flag])


def header_flags(name: str) -> list[str]:
    """The flags that the header's first command gives beside --config FILE."""
    found = re.search(r"^ *((?:sbatch|launch/)(?:.*\\\n)*.*)", header(name), re.MULTILINE)
    assert found, f"{name}: no command in the header"
    words = shlex.split(found[1].replace("\\\n", " "))
    at = words.index("--config")
    assert words[at + 1] == f"configs/{name}.yaml"
    return words[at + 2 :]


def accepted(monkeypatch: pytest.MonkeyPatch, path: Path, extra: list[str], world_size: int) -> Any:
    """Megatron's namespace for a file and more flags, after every check that comes before a process group exists."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.training import arguments
    from megatron.training.argument_utils import gpt_config_from_args

    parser = add_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    words = yaml_arguments(load_yaml(str(path)), parser, extra) + extra
    if "--cpu" in words:
        words, _ = cpu_arguments(words)
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *words])
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(arguments, "get_device_arch_version", lambda: 9)
    if rope_utils.fused_apply_rotary_pos_emb is None:
        monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
    args = arguments.parse_args(add_arguments)
    arguments.validate_args(args)
    validate(args)
    args.vocab_size = 4096 if args.cpu else 32000
    gpt_config_from_args(args).finalize()
    return args


def parameters(args: Any) -> float:
    """Number of parameters of an untied, bias-free, gated, dense GPT."""
    kv_groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    q_and_proj = 2 * args.num_attention_heads * args.kv_channels * args.hidden_size
    k_and_v = 2 * kv_groups * args.kv_channels * args.hidden_size
    mlp = 3 * args.hidden_size * args.ffn_hidden_size
    layer = q_and_proj + k_and_v + mlp + 2 * args.hidden_size
    return float(args.num_layers * layer + 2 * args.vocab_size * args.hidden_size + args.hidden_size)


def test_every_config_has_a_size() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("sweep")} == set(WORLD_SIZES)


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_accepted_with_the_command_in_its_header(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    args = accepted(monkeypatch, CONFIGS / f"{name}.yaml", header_flags(name), WORLD_SIZES[name])

    assert args.global_batch_size % (args.micro_batch_size * args.data_parallel_size) == 0
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    if args.virtual_pipeline_model_parallel_size:
        assert micro_batches % args.pipeline_model_parallel_size == 0, "the interleaved schedule needs full rounds"
    assert args.lr_decay_iters == args.train_iters and args.min_lr == 0, "every schedule decays to 0 at the end"


@pytest.mark.parametrize("name", [name for name in WORLD_SIZES if not name.startswith("example")])
def test_header_tells_the_number_of_parameters(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = re.search(r"([\d.]+) (million|billion) parameters", header(name))
    assert found, f"{name}: the header does not say how many parameters the model has"
    unit = {"million": 1e6, "billion": 1e9}[found[2]]
    decimals = len(found[1].partition(".")[2])

    args = accepted(monkeypatch, CONFIGS / f"{name}.yaml", header_flags(name), WORLD_SIZES[name])
    assert round(parameters(args) / unit, decimals) == float(found[1])


@pytest.mark.parametrize("name", TARGETS)
def test_proxy_in_the_header_of_a_target(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It has the base sizes of the target, is accepted on one node, and differs in width and parallelism only."""
    found = re.search(r"flags of this file with (--[^;]*);", header(name))
    assert found, f"{name}: no proxy in the header"
    target = load_yaml(str(CONFIGS / f"{name}.yaml"))

    proxy = accepted(monkeypatch, CONFIGS / f"{name}.yaml", header_flags(name) + found[1].split(), 8)
    assert proxy.hidden_size == target["base-hidden-size"]
    assert proxy.ffn_hidden_size == target["base-ffn-hidden-size"]
    assert proxy.num_attention_heads * proxy.kv_channels == target["base-kv-projection-size"]
    assert proxy.num_layers == target["num-layers"]
    assert proxy.pipeline_model_parallel_size == proxy.tensor_model_parallel_size == 1


PAIRS = {
    "example_target_w256": "example_proxy_w32",
    "paper_llama_w2048": "paper_llama_w128",
    "target_7b_h100_bf16": "proxy_7b_w256",
    "target_7b_h100_fp8": "proxy_7b_w256",
    "target_70b_h100_bf16": "proxy_70b_w256",
    "target_70b_h100_fp8": "proxy_70b_w256",
}


@pytest.mark.parametrize("target", PAIRS)
def test_a_pair_goes_together_without_force(target: str, tool: Callable[..., int], tmp_path: Path) -> None:
    """A sweep of the proxy with a clear optimum at 2^-9 becomes the target's config; nothing has to be overruled."""
    proxy = load_yaml(str(CONFIGS / f"{PAIRS[target]}.yaml"))
    rows = ["hidden_size,lr,loss,weight_decay,steps"]
    for k in range(-12, -5):
        loss = 3 + 0.01 * (k + 9) ** 2
        rows.append(f"{proxy['hidden-size']},{2.0**k},{loss},{proxy['weight-decay']},{proxy['train-iters']}")
    (tmp_path / "sweep.csv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "tuned.yaml"
    words = ["--sweep", tmp_path / "sweep.csv", "--proxy", CONFIGS / f"{PAIRS[target]}.yaml", "--output", out]
    assert tool("transfer_config", *words, "--target", CONFIGS / f"{target}.yaml") == 0
    tuned, before = load_yaml(str(out)), load_yaml(str(CONFIGS / f"{target}.yaml"))
    assert tuned["lr"] == pytest.approx(2.0**-9, rel=1e-2)
    changed = {key for key in tuned if tuned[key] != before.get(key)}
    assert {key for key in changed if not key.startswith("base-")} <= {"lr", "weight-decay", "vector-lr"}


@pytest.mark.parametrize("size", ["7b", "70b"])
def test_a_proxy_file_is_what_the_header_of_its_target_says(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    """Written down twice, as a file and as flags on top of the target's: the models and the schedules are the same."""
    target = f"target_{size}_h100_bf16"
    found = re.search(r"flags of this file with (--[^;]*);", header(target))
    assert found
    by_flags = accepted(monkeypatch, CONFIGS / f"{target}.yaml", header_flags(target) + found[1].split(), 8)
    name = f"proxy_{size}_w256"
    by_file = accepted(monkeypatch, CONFIGS / f"{name}.yaml", header_flags(name), 8)
    differing = {key for key, value in vars(by_flags).items() if value != getattr(by_file, key)}
    ours = {"width_scaling", "base_hidden_size", "base_ffn_hidden_size", "base_kv_projection_size"}
    machine = {"micro_batch_size", "eval_micro_batch_size", "num_layers_per_virtual_pipeline_stage"}
    machine.add("exit_duration_in_mins")
    assert differing <= ours | machine | {"extra_warmup", "extra_warmup_fraction"}


def test_family_differs_in_width_only() -> None:
    """Width with its heads and MLP, and the micro batch: all else is the same in the five files."""
    family = [load_yaml(str(CONFIGS / f"{name}.yaml")) for name in WORLD_SIZES if name.startswith("paper")]
    assert len(family) == 5
    for flags in family:
        width = flags.pop("hidden-size")
        assert flags.pop("num-attention-heads") * flags["kv-channels"] == width
        assert flags.pop("ffn-hidden-size") == 3 * width
        flags.pop("micro-batch-size")
    assert all(flags == family[0] for flags in family)


@pytest.mark.parametrize("size", ["7b", "70b"])
def test_fp8_differs_from_bf16_in_precision_only(size: str) -> None:
    bf16, fp8 = (load_yaml(str(CONFIGS / f"target_{size}_h100_{precision}.yaml")) for precision in ("bf16", "fp8"))
    added = {"fp8-format": "hybrid", "fp8-recipe": "tensorwise", "no-stream-ckpt-dequant": True}
    assert fp8 == bf16 | added


def test_unknown_key_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text((CONFIGS / "paper_llama_w128.yaml").read_text() + "weight-decai: 0.1\n")
    with pytest.raises(SystemExit):
        accepted(monkeypatch, misspelt, header_flags("paper_llama_w128"), 8)
    assert "unrecognized arguments: --weight-decai 0.1" in capsys.readouterr().err
