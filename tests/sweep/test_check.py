"""The flags of every trial go through Megatron's own parser and validation before anything starts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_patch.files.yaml_flags import load_yaml
from tests.support.sweeps import FAKE, HANGS, TOOL

ROOT = Path(__file__).parents[2]

BASE: dict[str, Any] = {
    "cpu": True,
    "num-layers": 2,
    "hidden-size": 32,
    "num-attention-heads": 1,
    "ffn-hidden-size": 96,
    "swiglu": True,
    "normalization": "RMSNorm",
    "disable-bias-linear": True,
    "untie-embeddings-and-output-weights": True,
    "position-embedding-type": "rope",
    "seq-length": 32,
    "max-position-embeddings": 32,
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 255,
    "mock-data": True,
    "micro-batch-size": 2,
    "global-batch-size": 4,
    "train-iters": 10,
    "lr": 0.01,
}


def run(folder: Path, *arguments: str, **content: Any) -> tuple[int, str, str]:
    """The tool on a sweep file with these entries."""
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    entries = {"config": "base.yaml", "output": str(folder / "out"), **content}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    words = [sys.executable, TOOL, str(folder / "sweep.yaml"), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANGS, check=False)
    return done.returncode, done.stdout, done.stderr


def flops(hidden: int, ffn: int, samples: int) -> float:
    """Multiplications and additions of a step, forward and twice that backward, for the model above: by hand.

    A matrix costs 2 per weight and token. Attention: queries times keys and weights times values, each
    2 * hidden * sequence a token, half of it masked out. Vocabulary 256: 255 and the end of a document.
    """
    tokens = samples * 32
    matrices = 2 * (4 * hidden**2 + 3 * hidden * ffn) + 256 * hidden
    attention = 2 * 2 * (2 * hidden * 32) / 2
    return 3 * tokens * (2 * matrices + attention)


@pytest.mark.parametrize("arguments", [["--dry-run"], []])
def test_wrong_flags_are_told_before_anything_starts(tmp_path: Path, arguments: list[str]) -> None:
    grid = [
        {"lr": [0.1]},
        {"learning-rate": [0.1, 0.2]},  # no flag
        {"lr": [0.3], "num-attention-heads": ["four"]},  # no number
        {"lr": [0.3], "global-batch-size": [3]},  # refused by Megatron
        {"lr": [0.3], "width-scaling": ["sqrt"]},  # refused by us: no base
    ]
    code, out, err = run(tmp_path, *arguments, grid=grid)
    assert (code, out) == (2, "")
    assert "5 of 6 trials would be refused for 4 different reasons, of which this is the first: " in err
    assert "trial learning-rate=0.1: config.yaml: learning-rate 0.1: expected a flag of Megatron" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_the_cost_of_a_sweep(tmp_path: Path) -> None:
    widths = [{"hidden-size": 32}, {"hidden-size": 64, "ffn-hidden-size": 192}]
    grid = {"width": widths, "train-iters": [10, 20]}
    code, out, err = run(tmp_path, "--dry-run", "--mfu", "0.5", "--gpu-tflops", "1e-9", grid=grid)
    assert code == 0, err
    expected = sum(flops(h, 3 * h, 4 * iterations) for h in (32, 64) for iterations in (10, 20))
    assert "the flags of 4 trials are what Megatron and megatron_patch accept\n" in out
    assert f"cost: {expected:.3g} FLOPs, {expected / (0.5 * 1000 * 3600):.3g} GPU-hours at 50% of 1e-09 TFLOP/s" in out


def test_a_search_and_the_number_of_ranks_are_checked(tmp_path: Path) -> None:
    """Two ranks of tensor parallelism in one process is refused, with a launcher of two it is not."""
    launcher = ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--module", "megatron_patch", "run"]
    plan = {"trials": 7, "space": {"lr": {"log": [0.001, 0.1]}, "tensor-model-parallel-size": [1, 2]}}
    content = {"set": {"num-attention-heads": 2}, "optuna": plan}
    code, _, err = run(tmp_path, "--dry-run", **content)
    assert code == 2
    assert "1 of 3 trials would be refused: trial tensor-model-parallel-size=2: " in err
    code, out, err = run(tmp_path, "--dry-run", command=[*launcher, "--config", "{config}"], **content)
    assert code == 0, err
    assert f"cost: about {7 * flops(32, 96, 40):.3g} FLOPs" in out


def test_a_script_of_ones_own_may_know_more_flags(tmp_path: Path) -> None:
    """What Megatron knows is checked all the same."""
    (tmp_path / "my.py").write_text("raise SystemExit(7)\n")
    command = ["{python}", "-m", "megatron_patch", "run", "--config", "{config}", str(tmp_path / "my.py")]
    content = {"set": {"enable-something": True}, "command": command}
    code, out, err = run(tmp_path, "--dry-run", grid={"lr": [0.1, 0.2]}, **content)
    assert code == 0, err
    assert "note: no FLOPs are counted for a script of your own" in out
    code, _, err = run(tmp_path, "--dry-run", grid={"num-attention-heads": [1, 5]}, **content)
    assert code == 2
    assert "1 of 2 trials would be refused: trial num-attention-heads=5: Megatron" in err


def test_configs_for_gpus_are_checked_without_one(tmp_path: Path) -> None:
    """A model of 70 billion parameters: 6 FLOPs for each and a token, and some for attention."""
    config = ROOT / "configs" / "target_70b_h100_fp8.yaml"
    command = ["sbatch", "launch/slurm.sbatch", "--config", "{config}"]
    flags = {"data-path": "/data/x", "tokenizer-model": "/data/t.model"}
    content = {"config": str(config), "wait": "run.json", "set": flags, "command": command}
    code, out, err = run(tmp_path, "--dry-run", grid={"lr": [0.001]}, **content)
    assert code == 0, err
    assert "note: the tokenizer cannot be read here" in out
    counted = float(out.partition("cost: ")[2].partition(" FLOPs")[0])
    values = load_yaml(str(config))
    tokens = values["train-iters"] * values["global-batch-size"] * values["seq-length"]
    assert 0.9 < counted / (6 * 70e9 * tokens) < 1.2


def test_what_is_not_checked_is_told(tmp_path: Path) -> None:
    command = ["{python}", FAKE, "{config}"]
    code, _, err = run(tmp_path, command=command, grid={"lr": [0.1], "weight-decay": [0], "seed": [1], "odd": [1]})
    assert code == 0
    assert "the flags of the trials are not checked: the command is not `megatron_patch run --config {config}`" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mfu", "40"], "--mfu 40.0: expected a number above 0 and at most 1"),
        (["--gpu-tflops", "nan"], "--gpu-tflops nan: expected a number above 0"),
    ],
)
def test_no_such_machine(tmp_path: Path, arguments: list[str], message: str) -> None:
    code, _, err = run(tmp_path, "--dry-run", *arguments, grid={"lr": [0.1]})
    assert code == 2
    assert message in err
