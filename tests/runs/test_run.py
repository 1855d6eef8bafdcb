"""Run folders are read back as they were written; what is damaged is named, what is missing is noted."""

import json
import math
import os
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_patch.errors import ConfigError
from megatron_patch.files.lines import AlignmentLine, EquilibriumLine, SublayerLine
from megatron_patch.metrics import derive as table
from megatron_patch.metrics.forecast import NormForecast
from megatron_patch.metrics.meter import SLOTS
from megatron_patch.runs.run import read_runs
from megatron_patch.runs.tensorboard import read_events, tensorboard_files
from tests.support.run_folders import (
    CLASSES,
    STEPS,
    alignment_line,
    lr_factor,
    train_loss,
    write_events,
    write_metrics,
    write_record,
    write_run,
)


def test_everything_that_was_written_is_read(tmp_path: Path) -> None:
    (run,) = read_runs([str(write_run(tmp_path / "a"))])
    assert (run.name, run.status, run.iteration, run.train_iterations) == ("a", "finished", STEPS, STEPS)
    assert (run.seconds, run.rule, run.m) == (125.0, "sqrt", 4.0)
    assert (run.final_loss, run.best, run.notes) == (2.1875, (2.1625, 20), ())
    assert run.evaluated("validation").iterations == (10, 20, 40)
    assert run.evaluated("test").values == (2.203125,)
    assert run.train_loss.iterations == tuple(range(1, STEPS + 1))
    assert run.train_loss.values == pytest.approx([train_loss(i) for i in range(1, STEPS + 1)], rel=1e-6)
    rates = run.per_class("lr")
    assert set(rates) == set(run.per_class("weight_decay")) == set(CLASSES)
    assert rates["matrix"].values[9] == pytest.approx(0.005 * lr_factor(10), rel=1e-6)
    assert run.hyperparameters is not None
    assert [(p.role, p.m, p.lr, p.weight_decay) for p in run.hyperparameters.parameters] == [
        ("embedding", 1, 0.01, 0.1),
        ("matrix", 4, 0.005, 0.2),
        ("vector", 1, 0.01, 0.0),
    ]
    assert len(run.alignment) == len(run.equilibrium) == STEPS / 2 * 13
    assert run.alignment[0].alignment_ratio == alignment_line(2, "x", 64)["alignment_ratio"]
    assert run.alignment[-1].update_alignment is None


def test_keys_are_those_that_the_metrics_write() -> None:
    assert {f.name for f in fields(AlignmentLine)} == set(table.KEYS)
    forecast = NormForecast({"x": "group"}, {"x": 0.02})
    line = alignment_line(2, "x", 64)
    assert {f.name for f in fields(EquilibriumLine)} <= set(table.equilibrium_line(line, forecast, hidden_size=64))
    gain = table.sublayer_line(2, "x", 64, [1.0, 1.0], [1.0] * len(SLOTS))
    assert {f.name for f in fields(SublayerLine)} <= set(gain)


def test_runs_are_found_once_below_any_folder_and_named_apart(tmp_path: Path) -> None:
    for name in ("b/lr2", "b/lr1", "c"):
        write_run(tmp_path / name, alignment=False, tensorboard=False)
    runs = read_runs([str(tmp_path), str(tmp_path / "c" / "transfer")])
    assert [run.name for run in runs] == ["b/lr1", "b/lr2", "c"]
    assert [run.name for run in read_runs([str(tmp_path / "b" / "lr1" / "transfer")])] == ["lr1"]


def test_a_path_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"with a run\.json in it or below it; give the run's --save folder"):
        read_runs([str(tmp_path)])
    with pytest.raises(ConfigError, match="there is no such folder"):
        read_runs([str(tmp_path / "typo")])


def test_an_unfinished_last_line_is_left_out_and_noted(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a") / "transfer" / "alignment.jsonl"
    whole = read_runs([str(tmp_path)])[0].alignment
    os.truncate(path, path.stat().st_size - 30)
    (run,) = read_runs([str(tmp_path)])
    assert run.alignment == whole[:-1]
    assert run.notes == ("the last line of alignment.jsonl is unfinished and was left out",)


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        ("{half", "Expecting property name"),
        ("[1, 2]", "not an object"),
        ('{"iteration": 3}', "no 'layer'"),
        (json.dumps(alignment_line(4, "x", 64, lr="high")), "lr is 'high'"),
        (json.dumps(alignment_line(4, "x", 64, lr=None)), "lr is None"),
        ("", "Expecting value"),
    ],
)
def test_a_damaged_line_is_an_error_that_names_it(tmp_path: Path, line: str, detail: str) -> None:
    path = write_run(tmp_path / "a", tensorboard=False) / "transfer" / "alignment.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(ConfigError) as caught:
        read_runs([str(tmp_path)])
    assert f"{path} line 3" in str(caught.value)
    assert detail in str(caught.value)
    assert "delete the line" in str(caught.value)


@pytest.mark.parametrize("name", ["run.json", "hyperparameters.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"status": 3}'])
def test_a_damaged_json_file_is_an_error_that_names_it(tmp_path: Path, name: str, content: str) -> None:
    path = write_run(tmp_path / "a", tensorboard=False, alignment=False) / "transfer" / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"{name}.*restore it, or leave this run out"):
        read_runs([str(tmp_path)])


def test_what_is_missing_is_noted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", tensorboard=False, alignment=False) / "transfer"
    (folder / "hyperparameters.json").unlink()
    (run,) = read_runs([str(tmp_path)])
    assert not (run.alignment or run.equilibrium)
    assert run.series == {}
    assert run.hyperparameters is None
    assert [note.partition(":")[0] for note in run.notes] == [
        "alignment was not measured; --alignment-interval switches it on",
        "hyperparameters.json is missing",
        f"no TensorBoard files in {tmp_path}/a/tensorboard",
    ]
    write_record(folder, tensorboard_dir=None)
    assert "trained without --tensorboard-dir" in read_runs([str(tmp_path)])[0].notes[-1]


def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    write_events(tmp_path / "first", range(1, 31), offset=1.0)
    write_events(tmp_path / "second", range(21, 26))
    files = [str(path) for name in ("first", "second") for path in (tmp_path / name).iterdir()]
    loss = read_events(files)["lm loss"]
    assert loss.iterations == tuple(range(1, 26))
    assert loss.values[:20] == pytest.approx([train_loss(i) + 1 for i in range(1, 21)])
    assert loss.values[20:] == pytest.approx([train_loss(i) for i in range(21, 26)])


def test_a_damaged_event_file_ends_where_it_breaks_and_is_noted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", alignment=False)
    (path,) = (run / "tensorboard").iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    (read,) = read_runs([str(run)])
    last = read.train_loss.iterations[-1]
    assert 0 < last < STEPS
    assert read.train_loss.values == pytest.approx([train_loss(i) for i in range(1, last + 1)], rel=1e-6)
    assert f"TensorBoard's files end at iteration {last}, the run at {STEPS}" in read.notes[-1]


@pytest.mark.parametrize("content", [b"", b"not TensorBoard at all"])
def test_what_is_no_event_file_has_no_curves(tmp_path: Path, content: bytes) -> None:
    run = write_run(tmp_path / "a", alignment=False)
    (path,) = (run / "tensorboard").iterdir()
    path.write_bytes(content)
    assert read_runs([str(run)])[0].series == {}


def test_tensorboard_files_are_found_wherever_the_run_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorded paths may be relative to another folder, or those of another machine."""
    folder = tmp_path / "moved" / "metrics"
    folder.mkdir(parents=True)
    write_events(tmp_path / "moved" / "tb", [1])
    monkeypatch.chdir(tmp_path)
    for recorded in (
        {"tensorboard_dir": "runs/x/tb", "metrics_dir": "runs/x/metrics"},
        {"tensorboard_dir": "/cluster/x/tb", "metrics_dir": "/cluster/x/metrics"},
        {"tensorboard_dir": str(tmp_path / "moved" / "tb"), "metrics_dir": "elsewhere"},
        {"tensorboard_dir": "moved/tb", "metrics_dir": "/elsewhere"},
    ):
        assert len(tensorboard_files(str(folder), recorded)) == 1, recorded
    assert tensorboard_files(str(folder), {"tensorboard_dir": "/cluster/y"}) == []
    assert tensorboard_files(str(folder), {"tensorboard_dir": None}) == []


@pytest.mark.parametrize("recorded", [{"save": "/gone/x"}, {"save": None, "tensorboard_dir": "/gone/x"}])
def test_the_default_metrics_folder_leads_to_tensorboard(tmp_path: Path, recorded: dict[str, str]) -> None:
    write_events(tmp_path / "x", [1])
    (tmp_path / "x" / "transfer").mkdir()
    assert tensorboard_files(str(tmp_path / "x" / "transfer"), {"tensorboard_dir": "/gone/x", **recorded})


def test_a_copied_run_reads_its_own_curves(tmp_path: Path) -> None:
    shutil.copytree(write_run(tmp_path / "a"), tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert len(read_runs([str(tmp_path / "b")])[0].train_loss.values) == STEPS


def test_a_diverged_run_has_the_best_of_its_finite_losses(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", tensorboard=False, alignment=False) / "transfer"
    losses = ((10, math.nan), (20, 3.0), (30, math.inf))
    evaluations = [{"iteration": i, "set": "validation", "lm loss": loss} for i, loss in losses]
    write_record(folder, {"evaluations": evaluations, "final_loss": math.inf})
    (run,) = read_runs([str(tmp_path)])
    assert run.best == (3.0, 20)
    assert run.final_loss == math.inf


def test_a_run_that_has_just_begun_can_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "transfer"
    folder.mkdir()
    empty = {"status": "running", "iteration": 0, "final_loss": None, "train_loss": None, "evaluations": []}
    write_record(folder, empty, tensorboard_dir=str(tmp_path))
    SummaryWriter(tmp_path).close()
    write_metrics(folder, [])
    (run,) = read_runs([str(tmp_path)])
    assert (run.best, run.last_train_loss, run.train_loss.values) == (None, None, ())
