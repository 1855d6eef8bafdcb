"""TensorBoard folders and W&B files of Megatron runs: a real run is read, damaged and unfinished ones are refused."""

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_patch.errors import ConfigError
from megatron_patch.runs.foreign import read_foreign_runs, read_tensorboard, read_wandb
from megatron_patch.runs.read import read_trials

ROOT = Path(__file__).parents[2]
TINY = """
--cpu --mock-data --tokenizer-type NullTokenizer --vocab-size 255 --num-layers 1 --hidden-size 32
--num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 2
--train-iters 3 --lr-decay-iters 3 --lr 0.008 --log-interval 1 --eval-iters 1 --eval-interval 100 --seed 7
--split 8,1,1 --tensorboard-dir tensorboard
""".split()
ARGUMENTS = {
    "hidden_size": 32, "lr": 0.008, "weight_decay": 0.1, "seed": 7, "train_iters": 10, "width_scaling": "sqrt",
    "vector_lr": None, "split": "8,1,1",
}  # fmt: skip


def has_wandb() -> bool:
    try:
        import wandb  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of Megatron that logs to TensorBoard, and to W&B offline where it is installed; with what it printed."""
    folder = tmp_path_factory.mktemp("real")
    words = [
        *TINY,
        *(["--wandb-project", "p", "--wandb-exp-name", "n", "--wandb-save-dir", "w"] if has_wandb() else []),
    ]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_patch", "run", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def printed_loss(text: str, on: str) -> float:
    found = re.search(rf"on {on} set \| lm loss value: (\S+)", text)
    assert found, text[-2000:]
    return float(found[1])


def test_tensorboard_of_a_real_run(real: tuple[Path, str]) -> None:
    """The loss is the validation set's, which Megatron prints before the test set's."""
    folder, text = real
    validation, test = printed_loss(text, "validation"), printed_loss(text, "test")
    assert abs(validation - test) > 1e-5, "or this test could not tell them apart"
    (trial,) = read_trials(str(folder / "tensorboard"))
    assert trial.loss == pytest.approx(validation, abs=1e-5)
    assert (trial.hidden_size, trial.lr, trial.weight_decay, trial.seed) == (32, 0.008, 0.01, 7)
    assert (trial.steps, trial.rule, trial.vector_lr) == (3, "none", None)
    assert trial.arguments["num_layers"] == 1 and trial.arguments["tokenizer_type"] == "NullTokenizer"


@pytest.mark.skipif(not has_wandb(), reason="wandb is an optional extra")
def test_wandb_of_a_real_run(real: tuple[Path, str]) -> None:
    folder, text = real
    (trial,) = read_trials(str(folder / "w"))
    assert trial.loss == pytest.approx(printed_loss(text, "test"), abs=1e-5), "W&B keeps the last of a step"
    assert (trial.hidden_size, trial.lr, trial.steps, trial.seed) == (32, 0.008, 3, 7)
    with pytest.raises(ConfigError, match="one kind"):
        read_trials(str(folder))


@pytest.mark.skipif(not has_wandb(), reason="wandb is an optional extra")
def test_a_damaged_wandb_file(real: tuple[Path, str], tmp_path: Path) -> None:
    (source,) = (real[0] / "w").glob("**/*.wandb")
    content = bytearray(source.read_bytes())
    whole = read_wandb(str(source))
    damaged = tmp_path / "run-x.wandb"
    for place in (0, 40, len(content) // 2):
        wrong = bytearray(content)
        wrong[place] ^= 0xFF
        damaged.write_bytes(wrong)
        with pytest.raises(ConfigError, match=r"run-x\.wandb at byte \d+.*leave this run out"):
            read_wandb(str(damaged))
    damaged.write_bytes(content[: len(content) // 3])
    with pytest.raises(ConfigError, match=r"run-x\.wandb"):
        read_wandb(str(damaged))
    damaged.write_bytes(content)
    assert read_wandb(str(damaged)) == whole.__class__(**{**vars(whole), "source": str(damaged)})


def test_without_wandb_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb.proto.wandb_internal_pb2", None)
    (tmp_path / "run-x.wandb").write_bytes(b":W&B")
    with pytest.raises(ConfigError, match=r"pip install 'megatron-patch\[wandb\]'"):
        read_foreign_runs(str(tmp_path))


def write_events(
    folder: Path, validation: Mapping[int, list[float]], last: int = 10, arguments: Mapping[str, Any] = ARGUMENTS
) -> Path:
    """Write a TensorBoard file as Megatron does, and return it."""
    writer = SummaryWriter(folder)
    for name, value in arguments.items():
        writer.add_text(name, str(value), global_step=0)
    for step in range(1, last + 1):
        writer.add_scalar("lm loss", 3.0, step)
    for step, losses in validation.items():
        for loss in losses:
            writer.add_scalar("lm loss validation", loss, step)
    writer.close()
    return max(folder.glob("events*"), key=lambda path: path.stat().st_mtime_ns)


def test_restarts_are_one_run(tmp_path: Path) -> None:
    write_events(tmp_path, {5: [2.9], 10: [2.75, 2.8]})
    write_events(tmp_path, {10: [2.5, 2.6]}).rename(tmp_path / "events.out.tfevents.9999999999.x")
    trial = read_tensorboard(str(tmp_path))
    assert (trial.loss, trial.rule, trial.weight_decay, trial.vector_lr) == (2.5, "sqrt", 0.1, None)


def test_runs_are_found_at_any_depth(tmp_path: Path) -> None:
    write_events(tmp_path / "a" / "b", {10: [2.5]})
    write_events(tmp_path / "c", {10: [math.nan]})
    first, second = read_trials(str(tmp_path))
    assert first.loss == 2.5 and second.diverged


def test_a_damaged_event_file(tmp_path: Path) -> None:
    path = write_events(tmp_path, {10: [2.5]})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))} at byte \d+.*checksum.*restore"):
        read_tensorboard(str(tmp_path))


@pytest.mark.parametrize(
    ("validation", "last", "says"),
    [
        ({}, 10, "no validation loss"),
        ({5: [2.5]}, 10, "last validation loss at iteration 5; it ends at iteration 10 of 10"),
        ({5: [2.5]}, 5, "it ends at iteration 5 of 10"),
    ],
)
def test_unfinished_runs(tmp_path: Path, validation: Mapping[int, list[float]], last: int, says: str) -> None:
    write_events(tmp_path, validation, last)
    with pytest.raises(ConfigError, match=says):
        read_tensorboard(str(tmp_path))


def test_a_cut_file_is_an_unfinished_run(tmp_path: Path) -> None:
    path = write_events(tmp_path, {10: [2.5]})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="no validation loss"):
        read_tensorboard(str(tmp_path))


def test_logs_of_something_else(tmp_path: Path) -> None:
    write_events(tmp_path / "a", {10: [2.5]}, arguments={"learning": 1})
    with pytest.raises(ConfigError, match="the log of a Megatron training"):
        read_trials(str(tmp_path))
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"run\.json, TensorBoard event files or W&B"):
        read_trials(str(tmp_path))
