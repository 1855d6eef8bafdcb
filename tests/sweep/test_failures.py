"""When trials fail: the same failure of the first ones stops a sweep, and what is said at an interrupt is true."""

import signal
from pathlib import Path

import pytest

from tests.support.sweeps import LRS, Folder, finish, wait_for


@pytest.fixture
def sweep(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_the_same_failure_of_the_first_trials_stops_the_sweep(sweep: Folder) -> None:
    sweep.write({"crash-above": 0})
    code, out, err = sweep.run()
    assert code == 1
    assert len(sweep.starts()) == 3
    reason = "exit code 3, status running at iteration 100"
    assert f"stopped: the first 3 trials all failed in the same way ({reason}), and the others would too; " in err
    assert "3 were not started" in err
    assert "--resume; --keep-going trains the others all the same" in err
    sweep.write()
    assert sweep.run("--resume")[0] == 0


def test_keep_going_trains_the_others(sweep: Folder) -> None:
    sweep.write({"crash-above": 0})
    code, out, err = sweep.run("--keep-going")
    assert (code, len(sweep.starts())) == (1, 6)
    assert "6 trials: 6 failed; table: " in out
    assert "stopped" not in err


def test_what_runs_at_that_time_decides(sweep: Folder) -> None:
    """Three fail alike while a fourth is still training: none is started until it ends, and it ends well."""
    go = sweep.path / "go"
    sweep.write(
        grid=[{"lr": [0.25], "until": [str(go)]}, {"lr": [0.3, 0.4, 0.5], "crash-above": [0]}, {"lr": [0.6, 0.7]}]
    )
    process = sweep.start("--workers", "2")
    failed = "trials/lr=*_crash-above=0/failed.json"
    wait_for(lambda: len(list(sweep.out.glob(failed))) == 3)
    go.touch()
    code, out, err = finish(process)
    assert code == 1
    assert "6 trials: 3 finished, 3 failed" in out


def test_different_failures_do_not_stop_the_sweep(sweep: Folder) -> None:
    command = ": {config}; echo $RANDOM of them: $(cat {folder}/../../../kinds/{name}); exit 1"
    (sweep.path / "kinds").mkdir()
    for lr, kind in zip(LRS, ("a", "b", "a", "b", "a", "b"), strict=True):
        (sweep.path / "kinds" / f"lr={lr:.10g}").write_text(kind)
    sweep.write(command=["bash", "-c", command])
    code, out, _ = sweep.run()
    assert code == 1
    assert "6 trials: 6 failed" in out


def test_interrupted_after_failures(sweep: Folder) -> None:
    """A failed trial is not called done."""
    sweep.write(grid=[{"lr": [0.25, 0.5], "crash-above": [0]}, {"lr": [1, 2], "until": [str(sweep.path / "never")]}])
    process = sweep.start()
    wait_for(lambda: len(sweep.statuses()) == 3)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "interrupted: of 4 trials 2 failed; 1 running ended and removed, to be trained from the start" in err
    assert "--resume (it trains failed ones again)" in err
