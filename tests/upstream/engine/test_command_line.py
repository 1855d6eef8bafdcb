"""A wrong DeepSpeed file as a user meets it: on the command line, everything at once, before anything is written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.pool import ROOT
from tests.support.training import TINY

RULE = "--cpu --mock-data --train-iters 3 --width-scaling independent --base-hidden-size 16".split()


def errors(folder: Path, command: str, content: dict[str, Any], *flags: str) -> list[str]:
    """What a start that must fail says of its mistakes."""
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, **content}))
    words = [*TINY, *RULE, "--deepspeed", "--deepspeed-config", "ds.json", "--save", "save", *flags]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_patch", command, *words],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["ds.json"]
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("command", ["run", "explain"])
def test_every_mistake_has_a_line(command: str, tmp_path: Path) -> None:
    wrong = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 7,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.3}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 100}},
        "zero_optimization": {"stage": 2, "overlap_com": True},
    }
    said = errors(tmp_path, command, wrong, "--use-distributed-optimizer", "--async-save")
    starts = (
        *("--use-distributed-optimizer True", "--async-save True", "ds.json: scheduler WarmupDecayLR"),
        *("ds.json: zero_optimization.overlap_com given", "ds.json: train_batch_size 8: expected 4,"),
        *("ds.json: train_micro_batch_size_per_gpu 4", "ds.json: gradient_accumulation_steps 7: expected 2,"),
        *("ds.json: optimizer.params.lr 0.0001", "ds.json: optimizer.params.weight_decay 0.3: expected 0.01,"),
    )
    assert len(said) == len(starts)
    for start in starts:
        assert sum(line.startswith(f"error: {start}") for line in said) == 1, (start, said)


def test_deepspeeds_mup_is_refused(tmp_path: Path) -> None:
    (said,) = errors(tmp_path, "run", {"optimizer": {"type": "MuAdam", "params": {"lr": 1e-2}}})
    assert said.startswith("error: ds.json: optimizer.type MuAdam: expected Adam or AdamW: DeepSpeed's muP optimizers")
