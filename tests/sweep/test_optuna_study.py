"""Sweeps by Optuna's samplers: one study for several processes, resumed after a kill."""

import contextlib
import os
import signal
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest

from megatron_patch.errors import ConfigError
from megatron_patch.runs.read import read_trials
from megatron_patch.runs.trial import Trial
from megatron_patch.sweep.attempt import FINISHED, Outcome
from megatron_patch.sweep.file import Search, read_sweep
from megatron_patch.sweep.optuna_study import OptunaStudy
from tests.support.fake_training import loss_of
from tests.support.sweeps import FAKE, Folder, finish, wait_for

SPACE = {"lr": {"log": [1e-4, 1.0]}, "width": [{"hidden-size": 32}, {"hidden-size": 64}], "seed": {"integer": [1, 3]}}


def search(**changes: Any) -> dict[str, Any]:
    """The entries of a sweep by a sampler."""
    return {"grid": None, "optuna": {"sampler": "tpe", "trials": 6, "seed": 0, "space": SPACE, **changes}}


@pytest.fixture
def sweep(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path)
    folder.write(**search())
    return folder


def study(sweep: Folder) -> optuna.Study:
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{sweep.out}/study.db")


def test_the_study_has_what_was_trained(sweep: Folder) -> None:
    sweep.write({"diverge-above": 0.3}, **search(sampler="random", trials=8))
    code, out, err = sweep.run("--workers", "3")
    assert code == 0, err
    trials = read_trials(str(sweep.out / "trials.csv"))
    recorded = study(sweep).trials
    assert len(trials) == len(recorded) == 8
    assert any(trial.diverged for trial in trials), "the seed is to draw an LR above 0.3"
    for trial, record in zip(trials, recorded, strict=True):
        assert record.state == optuna.trial.TrialState.COMPLETE
        assert trial.lr == record.params["lr"]
        assert (str(trial.hidden_size), trial.seed) == (record.params["width"], record.params["seed"])
        assert record.value == (float("inf") if trial.diverged else loss_of(trial.lr))


def test_a_sampler_learns(sweep: Folder) -> None:
    """TPE, told the losses, comes closer to the optimum 2^-6 than the same number of random draws do on average."""
    sweep.write(**search(trials=24, space={"lr": {"log": [1e-4, 1.0]}}))
    code, out, _ = sweep.run("--workers", "4")
    assert code == 0
    losses = [trial.loss for trial in read_trials(str(sweep.out / "trials.csv"))]
    assert sum(losses[12:]) < sum(losses[:12])
    assert min(losses) < 2.1


def test_processes_share_a_study(sweep: Folder) -> None:
    """Together they train as many trials as asked for, each once and each with another LR."""
    starts = sweep.path / "all-starts"
    shared = f"echo {{name}} >> {starts}; exec {sys.executable} {FAKE} {{config}}"
    sweep.write({"seconds": 0.2}, command=["bash", "-c", shared], **search(trials=9))
    results = [finish(process) for process in [sweep.start("--resume", "--workers", "2") for _ in range(3)]]
    for code, out, err in results:
        assert code == 0, err
        assert "9 trials: 9 finished" in out
    assert set(Counter(starts.read_text().split()).values()) == {1}
    assert len({trial.lr for trial in read_trials(str(sweep.out / "trials.csv"))}) == 9


def test_killed_and_resumed(sweep: Folder) -> None:
    """Open trials are trained with the settings they were given, then new ones up to the number asked for."""
    go = sweep.path / "go"
    sweep.write({"until": str(go)}, **search(trials=4))
    process = sweep.start("--workers", "2")
    wait_for(lambda: len(sweep.statuses()) == 2)
    process.kill()
    finish(process)
    for pid in sweep.pids():
        os.kill(pid, signal.SIGKILL)
    opened = {trial.number: trial.params for trial in study(sweep).trials}
    go.touch()
    code, out, err = sweep.run("--resume")
    assert code == 0, err
    assert "4 trials: 4 finished" in out
    finished = {trial.number: trial.params for trial in study(sweep).trials}
    assert len(finished) == 4
    assert opened.items() <= finished.items()
    sweep.write({"until": str(go)}, **search(trials=5))
    code, out, _ = sweep.run("--resume")
    assert (code, "5 trials: 5 finished" in out, set(sweep.starts().values())) == (0, True, {1})


def test_failed_trials_stay_open(sweep: Folder) -> None:
    sweep.write({"crash-unless": str(sweep.path / "ready")}, **search(trials=2))
    code, out, _ = sweep.run()
    assert (code, "2 trials: 2 failed" in out) == (1, True)
    (sweep.path / "ready").touch()
    code, out, _ = sweep.run("--resume")
    assert (code, "2 trials: 2 finished" in out) == (0, True)
    assert len(study(sweep).trials) == 2


def test_pruner(sweep: Folder) -> None:
    """Trials far above the median are ended early, are so recorded, and leave no half-done run."""
    optimum = {"lr": [2**-6], "seed": {"integer": [1, 1000]}}
    sweep.write({"evaluations": 2}, **search(space=optimum, trials=6, pruner="median"))
    assert sweep.run("--workers", "3")[0] == 0
    hopeless = {"evaluations": 3, "seconds": 60}
    with sqlite3.connect(sweep.out / "study.db") as database:  # what the next trial will be compared with
        database.execute("update trial_intermediate_values set intermediate_value = 1.0, step = 33 where step = 50")
    sweep.write(hopeless, **search(space=optimum, trials=7, pruner="median"))
    for config in sweep.out.glob("trials/*/config.yaml"):
        config.write_text(config.read_text().replace("evaluations: 2", "evaluations: 3\nseconds: 60"))
    code, out, err = sweep.run("--resume")
    assert code == 0, err
    assert "7 trials: 6 finished, 1 pruned" in out
    assert len(sweep.statuses()) == 6
    assert [t.state.name for t in study(sweep).trials] == ["COMPLETE"] * 6 + ["PRUNED"]


def test_another_space_is_refused(sweep: Folder) -> None:
    sweep.write(**search(trials=1))
    assert sweep.run()[0] == 0
    sweep.write(**search(trials=2, space={"lr": {"log": [1e-3, 1.0]}}))
    code, _, err = sweep.run("--resume")
    assert code == 2
    assert err.startswith("error: ")
    assert "made with another space" in err
    assert err.count("\n") == 1


def damage(content: bytes, what: str) -> bytes:
    """A study's file, damaged."""
    half = len(content) // 2
    return {
        "other": b"something else entirely" * 100,
        "cut off": content[:half],
        "hole": content[:8192] + bytes(half) + content[8192 + half :],
        "tail": content[:-9000] + b"\xff" * 9000,
        "empty": b"",
    }[what]


def assert_refused(sweep: Folder) -> None:
    before = (sweep.out / "study.db").read_bytes()
    code, out, err = sweep.run("--resume")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {sweep.out}/study.db (")
    assert "expected the study of this sweep, whole; restore it from a copy" in err
    assert err.count("\n") == 1
    assert (sweep.out / "study.db").read_bytes() == before


def test_a_damaged_study_is_refused(sweep: Folder) -> None:
    sweep.write(**search(trials=12))
    assert sweep.run("--workers", "4")[0] == 0
    whole = (sweep.out / "study.db").read_bytes()
    for what in ("other", "cut off", "hole", "tail", "empty"):
        (sweep.out / "study.db").write_bytes(damage(whole, what))
        assert_refused(sweep)
    for statement in (
        "alter table trials drop column state",
        "update alembic_version set version_num = 'v99'",
        "update trials set state = 'WHAT'",
        "update trial_params set distribution_json = '{'",
    ):
        (sweep.out / "study.db").write_bytes(whole)
        with contextlib.closing(sqlite3.connect(sweep.out / "study.db")) as database, database:
            database.execute(statement)
        assert_refused(sweep)
    (sweep.out / "study.db").write_bytes(whole)
    assert sweep.run("--resume")[0] == 0


def drawn(sweep: Folder, output: str) -> list[dict[str, Any]]:
    """The settings of the trials that a sampler chooses when it is told the losses one by one."""
    sweep.write(**search(trials=9), output=str(sweep.path / output))
    file = read_sweep(str(sweep.path / "sweep.yaml"))
    assert isinstance(file.plan, Search)
    study = OptunaStudy(file, file.plan)
    changes = []
    while trial := study.new():
        loss = loss_of(trial.changes["lr"])
        study.settle(trial, Outcome(FINISHED, Trial(hidden_size=32, lr=trial.changes["lr"], loss=loss)))
        changes.append(dict(trial.changes))
    return changes


def test_a_seed_makes_a_study_repeatable(sweep: Folder) -> None:
    first = drawn(sweep, "a")
    assert len(first) == 9
    assert drawn(sweep, "b") == first


def test_quasi_random_numbers_are_one_sequence(sweep: Folder) -> None:
    """Every trial is asked of a new sampler object, and none draws what another drew."""
    pytest.importorskip("scipy")
    sweep.write(**search(sampler="qmc", trials=3, space={"lr": {"log": [1e-4, 1.0]}}))
    code, _, err = sweep.run()
    assert code == 0, err
    assert len({trial.lr for trial in read_trials(str(sweep.out / "trials.csv"))}) == 3


def test_a_sampler_without_its_package(sweep: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sweep.write(**search(sampler="cmaes"))
    file = read_sweep(str(sweep.path / "sweep.yaml"))
    assert isinstance(file.plan, Search)
    with pytest.raises(ConfigError, match=r"^sampler cmaes: expected the package cmaes, which it needs; pip install"):
        OptunaStudy(file, file.plan)
    assert not sweep.out.exists()
