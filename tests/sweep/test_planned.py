"""What a sweep is going to run, read from its command and its plan."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_patch.sweep.file import SweepFile, read_sweep
from megatron_patch.sweep.planned import Run, run_of, to_check

C = "out/config.yaml"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["python", "-m", "megatron_patch", "run", "--config", C], Run((), 1)),
        (["/venv/bin/megatron-patch", "run", f"--config={C}", "my.py", "--bf16"], Run(("my.py", "--bf16"), 1)),
        (["deepspeed", "--num_gpus=8", "--module", "megatron_patch", "run", "--config", C], Run((), 8)),
        (["deepspeed", "--hostfile", "h", "--module", "megatron_patch", "run", "--config", C], Run((), None)),
        (["torchrun", "--nproc-per-node", "2", "-m", "megatron_patch", "run", "--config", C], Run((), 2)),
        (
            ["torchrun", "--nnodes=2", "--nproc-per-node", "2", "-m", "megatron_patch", "run", "--config", C],
            Run((), None),
        ),
        (["python", "-m", "torch.distributed.run", "-m", "megatron_patch", "run", "--config", C], Run((), None)),
        (["srun", "--ntasks", "4", "--gpus", "1", "p", "-m", "megatron_patch", "run", "--config", C], Run((), 4)),
        (["launch/pretrain.sh", "--num-gpus", "2", "--config", C, "--bf16"], Run(("--bf16",), 2)),
        (["launch/pretrain.sh", "--gpus=2,3", f"--config={C}", "my.py", "--lr", "1"], Run(("my.py", "--lr", "1"), 2)),
        (["sbatch", "--nodes", "2", "launch/slurm.sbatch", "--config", C, "--slots", "4"], Run((), None)),
        (["launch/pretrain_multinode.sh", "--no-ssh", "--node-rank", "0", "--config", C], Run((), None)),
        (["python", "-m", "megatron_patch", "run", "--config", "other.yaml"], None),
        (["python", "-m", "megatron_patch", "explain", "--config", C], None),
        (["python", "train.py", C], None),
    ],
)
def test_what_a_command_runs(words: list[str], expected: Run | None) -> None:
    assert run_of(words, C) == expected


def sweep(path: Path, **plan: Any) -> SweepFile:
    (path / "base.yaml").write_text("lr: 0.1\n")
    (path / "sweep.yaml").write_text(yaml.safe_dump({"config": "base.yaml", "output": str(path / "out"), **plan}))
    return read_sweep(str(path / "sweep.yaml"))


def test_all_trials_of_a_grid_are_checked(tmp_path: Path) -> None:
    file = sweep(tmp_path, grid={"lr": [1, 2], "seed": [3, 4]})
    assert [dict(t.changes) for t in to_check(file)] == [{"lr": lr, "seed": s} for lr in (1, 2) for s in (3, 4)]


def test_the_second_phase_is_checked_with_a_vector_lr(tmp_path: Path) -> None:
    phases = {"phase-1": {"lr": [1, 2]}, "phase-2": {"lr": [4], "num-layers": [8]}}
    last = to_check(sweep(tmp_path, **{"two-phase": phases}))[-1]
    assert dict(last.changes) == {"lr": 4, "num-layers": 8, "vector-lr": 4.0}


def test_of_a_search_every_category_and_both_ends_are_checked(tmp_path: Path) -> None:
    space = {"lr": {"log": [0.5, 1]}, "num-layers": {"integer": [2, 6]}, "width": [{"hidden-size": h} for h in (8, 16)]}
    trials = to_check(sweep(tmp_path, optuna={"trials": 100, "space": space}))
    assert [dict(t.changes) for t in trials] == [
        {"lr": 0.5, "num-layers": 2, "hidden-size": 8},
        {"lr": 1.0, "num-layers": 2, "hidden-size": 8},
        {"lr": 0.5, "num-layers": 6, "hidden-size": 8},
        {"lr": 0.5, "num-layers": 2, "hidden-size": 16},
    ]
    assert isinstance(trials[0].changes["num-layers"], int)
