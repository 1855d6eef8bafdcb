"""Running sweeps with a training that takes a moment: outcomes, resuming after every kind of death, sharing."""

import csv
import math
import os
import signal
import socket
import stat
import sys
import threading
from pathlib import Path

import pytest

from megatron_patch.runs.read import read_trials
from megatron_patch.sweep import engine
from megatron_patch.sweep.file import read_sweep
from tests.support.fake_training import loss_of
from tests.support.sweeps import FAKE, LRS, Folder, alive, finish, wait_for


@pytest.fixture
def sweep(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# --- outcomes --------------------------------------------------------------------------------------------------------


def test_a_grid(sweep: Folder) -> None:
    code, out, err = sweep.run("--workers", "3")
    assert code == 0, err
    assert "6 trials: 6 finished; table: " in out
    assert "width 32 (none): best LR 0.015" in out
    assert f"megatron-patch transfer --sweep {sweep.out} --target TARGET.yaml --output tuned.yaml" in out
    trials = sorted(read_trials(str(sweep.out / "trials.csv")), key=lambda trial: trial.lr)
    assert [(t.lr, t.loss) for t in trials] == [(lr, loss_of(lr)) for lr in LRS]
    from_folders = sorted(read_trials(str(sweep.out)), key=lambda trial: trial.lr)
    assert [(t.lr, t.loss, t.steps) for t in from_folders] == [(t.lr, t.loss, t.steps) for t in trials]
    trial = sweep.out / "trials" / "lr=0.015625"
    assert sorted(path.name for path in trial.iterdir()) == ["config.yaml", "log.txt", "transfer"]
    assert (trial / "log.txt").read_text().startswith(f"+ {sys.executable} {FAKE} {trial}/config.yaml\n")
    lines = [line for line in err.splitlines() if line.startswith("[")]
    assert len(lines) == 6
    assert "[3/6]" in lines[2] and "running" in lines[2] and "left" in lines[2]


def test_diverged_is_an_outcome_and_failed_is_not(sweep: Folder) -> None:
    sweep.write({"diverge-above": 0.05, "crash-above": 0.1})
    code, out, err = sweep.run("--workers", "2")
    assert code == 1
    assert "6 trials: 4 finished, 1 diverged, 1 failed" in out
    assert "failed: lr=0.125 (exit code 3, status running at iteration 100); see " in out
    assert "    | the machine is on fire\n    | Killed by the flames\n" in err
    with open(sweep.out / "trials.csv") as file:
        losses = {float(row["lr"]): float(row["loss"]) for row in csv.DictReader(file)}
    assert sorted(losses) == LRS[:-1]
    assert math.isnan(losses[LRS[-2]])


def test_resume_trains_only_what_failed(sweep: Folder) -> None:
    ready = sweep.path / "ready"
    sweep.write({"crash-unless": str(ready)}, grid=[{"lr": [0.25], "crash-unless": ["/"]}, {"lr": [0.5]}])
    assert sweep.run()[0] == 1
    before = {name: path.stat().st_mtime_ns for name in sweep.starts() if (path := sweep.out / "trials" / name)}
    code, _, err = sweep.run()
    assert code == 2
    assert f"error: output {sweep.out}: expected a folder without trials; add --resume to go on with them" in err
    ready.touch()
    code, out, _ = sweep.run("--resume")
    assert code == 0
    assert "2 trials: 2 finished" in out
    after = {name: (sweep.out / "trials" / name).stat().st_mtime_ns for name in before}
    assert [name for name in before if before[name] != after[name]] == ["lr=0.5"]
    code, out, _ = sweep.run("--resume")
    assert (code, sweep.starts()) == (0, dict.fromkeys(before, 1))


def test_growing_and_changing(sweep: Folder) -> None:
    """New points are trained, old ones stay; a changed flag of a finished trial is refused and nothing is written."""
    sweep.write(grid={"lr": [0.25, 0.5]})
    assert sweep.run()[0] == 0
    sweep.write(grid={"lr": [0.125, 0.25, 0.5]})
    code, out, _ = sweep.run("--resume")
    assert (code, list(sweep.starts().values())) == (0, [1, 1, 1])
    table = (sweep.out / "trials.csv").read_bytes()
    sweep.write({"weight-decay": 0.3}, grid={"lr": [0.125, 0.25, 0.5, 1]})
    code, out, err = sweep.run("--resume")
    assert code == 2
    assert err == (
        "error: trial lr=0.125: weight-decay 0.3: expected 0.1, with which the trial was trained; restore it, choose "
        "another output, or remove the trial's folder\n"
    )
    assert len(sweep.starts()) == 3
    assert (sweep.out / "trials.csv").read_bytes() == table


def test_a_finished_run_of_unknown_flags_is_left_alone(sweep: Folder) -> None:
    sweep.write(grid={"lr": [0.5]})
    assert sweep.run()[0] == 0
    (sweep.out / "trials/lr=0.5/config.yaml").unlink()
    code, _, err = sweep.run("--resume")
    assert code == 2
    assert "a run without config.yaml" in err
    assert sweep.statuses() == {"lr=0.5": "finished"}


def test_a_run_that_never_evaluated_has_failed(sweep: Folder) -> None:
    sweep.write({"evaluations": 0}, grid={"lr": [0.5]})
    code, out, _ = sweep.run()
    assert code == 1
    assert "expected a run that evaluated; train it with --eval-iters above 0" in out


def test_a_command_that_is_not_there(sweep: Folder) -> None:
    sweep.write(command=["no-such-program", "{config}"])
    code, _, err = sweep.run("--workers", "2")
    assert (code, err) == (
        2,
        "error: command no-such-program: expected a program that can be started; No such file or directory\n",
    )
    assert list((sweep.out / "trials").iterdir()) == []


def test_workers_have_numbers_and_trials_ports(sweep: Folder) -> None:
    ports = "echo {port} > {folder}/port"
    sweep.write(
        {"seconds": 0.3},
        environment={"SLOT": "{worker}"},
        command=["bash", "-c", f"{ports}; {sys.executable} {FAKE} {{config}}"],
    )
    assert sweep.run("--workers", "3")[0] == 0
    slots = [file.read_text().split()[1] for file in sweep.out.glob("trials/*/transfer/starts")]
    assert set(slots) == {"0", "1", "2"}
    assert len({file.read_text() for file in sweep.out.glob("trials/*/port")}) == 6


def test_a_trial_keeps_its_port(tmp_path: Path) -> None:
    """Until it ends nobody who asks for any port is given it, and torch's store may listen there."""
    import torch.distributed

    from megatron_patch.sweep.attempt import _reserve_port

    with _reserve_port() as reserved:
        port = reserved.getsockname()[1]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        store = torch.distributed.TCPStore("127.0.0.1", port, 1, True)
        store.set("key", "value")
        assert store.get("key") == b"value"
        del store


def test_dry_run_writes_nothing(sweep: Folder) -> None:
    before = sorted(sweep.path.rglob("*"))
    code, out, _ = sweep.run("--dry-run")
    assert code == 0
    assert "lr=0.125 (to do): lr 0.125\n" in out
    assert f"  {sys.executable} {FAKE} {sweep.out}/trials/lr=0.125/config.yaml\n" in out
    assert f"6 trials in {sweep.out}/trials\nthe flags of the trials are not checked, nor is their cost known: " in out
    assert sorted(sweep.path.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--workers", "-1"]])
def test_no_workers(sweep: Folder, arguments: list[str]) -> None:
    code, _, err = sweep.run(*arguments)
    assert code == 2
    assert err.startswith("error: --workers ")
    assert not sweep.out.exists()


# --- dying and sharing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(sweep: Folder, number: signal.Signals) -> None:
    """Two trainings are ended and leave nothing; what was done stays; --resume does the rest."""
    go = sweep.path / "go"
    sweep.write(grid=[{"lr": [0.25]}, {"lr": [0.5, 1, 2], "until": [str(go)]}])
    process = sweep.start("--workers", "2")
    wait_for(lambda: len(sweep.statuses()) == 3 and (sweep.out / "trials.csv").exists())
    pids = sweep.pids()
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 130
    assert "interrupted: of 4 trials 1 finished; 2 running ended and removed, to be trained from the start" in err
    assert f"go on with: megatron-patch sweep {sweep.path}/sweep.yaml --resume" in err
    assert not any(alive(pid) for pid in pids)
    assert sweep.statuses() == {"lr=0.25": "finished"}
    assert not list(sweep.out.rglob("*.tmp"))
    go.touch()
    code, out, _ = sweep.run("--resume", "--workers", "3")
    assert code == 0
    assert "4 trials: 4 finished" in out
    assert set(sweep.starts().values()) == {1}


def test_a_training_that_ignores_sigterm_is_killed(sweep: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "GRACE_SECONDS", 0.2)
    sweep.write({"stubborn": True, "until": str(sweep.path / "never")}, grid={"lr": [0.5]})
    pids: list[int] = []
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell started the tests in the background

    def interrupt() -> None:
        wait_for(lambda: len(sweep.statuses()) == 1)
        pids.extend(sweep.pids())
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    assert engine.run_sweep(read_sweep(str(sweep.path / "sweep.yaml"))) == 130
    watcher.join()
    assert not alive(pids[0])
    assert signal.getsignal(signal.SIGINT) is before


def test_killed_and_resumed(sweep: Folder) -> None:
    """kill -9 leaves trainings behind. One that lives is waited for, one that died is trained again from its start."""
    go = sweep.path / "go"
    sweep.write({"until": str(go)}, grid={"lr": [0.25, 0.5, 1]})
    process = sweep.start("--workers", "2")
    wait_for(lambda: len(sweep.statuses()) == 2)
    dead, living = sweep.pids()
    process.kill()
    finish(process)
    assert alive(dead) and alive(living)
    os.kill(dead, signal.SIGKILL)
    process = sweep.start("--resume", "--workers", "3")
    wait_for(lambda: len(sweep.pids()) == 3 and dead not in sweep.pids())
    go.touch()
    code, out, _ = finish(process)
    assert code == 0
    assert "3 trials: 3 finished" in out
    assert set(sweep.starts().values()) == {1}
    assert living in sweep.pids()


def test_two_processes_share(sweep: Folder) -> None:
    """Each trial is trained once; both know the outcome of all, failures included."""
    starts = sweep.path / "all-starts"
    shared = f"echo {{name}} >> {starts}; exec {sys.executable} {FAKE} {{config}}"
    sweep.write({"seconds": 0.3, "diverge-above": 0.05, "crash-above": 0.1}, command=["bash", "-c", shared])
    processes = [sweep.start("--resume", "--workers", "2") for _ in range(2)]
    results = [finish(process) for process in processes]
    assert [code for code, _, _ in results] == [1, 1]
    for _, out, _ in results:
        assert "6 trials: 4 finished, 1 diverged, 1 failed" in out
    assert sorted(starts.read_text().split()) == sorted(f"lr={lr:.10g}" for lr in LRS)
    assert len(read_trials(str(sweep.out / "trials.csv"))) == 5


def test_one_takes_over_from_the_other(sweep: Folder) -> None:
    """A process that dies frees its trial as soon as its training is dead too."""
    go = sweep.path / "go"
    sweep.write({"until": str(go)}, grid={"lr": [0.25, 0.5]})
    first = sweep.start("--resume")
    wait_for(lambda: len(sweep.statuses()) == 1)
    (pid,) = sweep.pids()
    second = sweep.start("--resume")
    wait_for(lambda: len(sweep.statuses()) == 2)
    first.kill()
    finish(first)
    os.kill(pid, signal.SIGKILL)
    go.touch()
    code, out, _ = finish(second)
    assert code == 0
    assert "2 trials: 2 finished" in out
    assert pid not in sweep.pids()


# --- a queue ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def queue(sweep: Folder) -> Folder:
    """A sweep through a command that submits and returns at once."""
    sbatch = sweep.path / "sbatch"
    sbatch.write_text(f'#!/bin/bash\necho Submitted batch job 7\nsetsid {sys.executable} {FAKE} "$1" > "$2" 2>&1 &\n')
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    sweep.queue = {"wait": "run.json", "timeout": 1800, "command": [str(sbatch), "{config}", "{folder}/job.txt"]}
    sweep.write({"seconds": 0.5, "diverge-above": 0.05}, **sweep.queue)
    return sweep


def test_submitted_trials_are_waited_for(queue: Folder) -> None:
    code, out, err = queue.run("--workers", "3")
    assert code == 0, err
    assert "6 trials: 4 finished, 2 diverged" in out
    assert "Submitted batch job 7" in (queue.out / "trials/lr=0.125/log.txt").read_text()


def test_submitted_trials_outlive_the_sweep(queue: Folder) -> None:
    """Ctrl-C leaves them to the queue; --resume waits for them instead of submitting them again."""
    go = queue.path / "go"
    queue.write({"until": str(go)}, grid={"lr": [0.25, 0.5]}, **queue.queue)
    process = queue.start("--workers", "2")
    wait_for(lambda: len(queue.statuses()) == 2)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "interrupted: of 2 trials none ended; 2 submitted go on" in err
    process = queue.start("--resume")
    assert process.stderr is not None
    assert "lr=0.25: was submitted before; waiting for its run.json" in process.stderr.readline()
    go.touch()
    assert finish(process)[0] == 0
    assert queue.starts() == {"lr=0.25": 1, "lr=0.5": 1}


def test_a_job_without_a_sign_of_life(queue: Folder) -> None:
    queue.write(grid={"lr": [0.5]}, **{**queue.queue, "timeout": 0.5, "command": ["true", "{config}"]})
    code, out, _ = queue.run()
    assert code == 1
    assert "failed: lr=0.5 (no run.json for 0.5 s (timeout)); see " in out
    queue.write(grid={"lr": [0.5]}, **{**queue.queue, "command": ["false", "{config}"]})
    code, out, _ = queue.run("--resume")
    assert code == 1
    assert "failed: lr=0.5 (exit code 1, no run.json)" in out


# --- two phases ------------------------------------------------------------------------------------------------------


def test_two_phases(sweep: Folder) -> None:
    """The second phase freezes the vector LR where the first one's loss was lowest, and resumes to the same."""
    phases = {
        "phase-1": {"lr": {"log2": [-8, -3]}, "seed": [1, 2]},
        "phase-2": {"width": [{"hidden-size": 32}, {"hidden-size": 64}], "lr": {"log2": [-7, -5]}},
    }
    sweep.write({"diverge-above": 0.1}, grid=None, two_phase=phases)
    code, out, err = sweep.run("--workers", "4")
    assert code == 0, err
    assert "phase 1: the best LR is 0.015625 (loss 2.0000), the vector LR of phase 2" in out
    assert "WARNING" not in out
    assert "18 trials: 16 finished, 2 diverged" in out
    trials = read_trials(str(sweep.out / "trials.csv"))
    assert [trial.vector_lr for trial in trials] == [None] * 12 + [2**-6] * 6
    assert "phase2_width=64_lr=0.03125_vector-lr=0.015625" in sweep.statuses()
    code, out, _ = sweep.run("--resume")
    assert "18 trials: 16 finished, 2 diverged" in out
    assert set(sweep.starts().values()) == {1}


def test_an_optimum_at_the_end_of_phase_1_is_told(sweep: Folder) -> None:
    phases = {"phase-1": {"lr": {"log2": [-6, -5]}}, "phase-2": {"lr": [0.5]}}
    sweep.write(grid=None, two_phase=phases)
    code, out, _ = sweep.run()
    assert code == 0
    assert "WARNING: that is the end of phase 1's LRs" in out


def test_no_second_phase_after_a_failure(sweep: Folder) -> None:
    phases = {"phase-1": {"lr": {"log2": [-6, -5]}}, "phase-2": {"lr": [0.5]}}
    sweep.write({"crash-above": 0.02}, grid=None, two_phase=phases)
    code, out, _ = sweep.run()
    assert code == 1
    assert "phase 2 was not started, since phase1_lr=0.03125 of phase 1 failed" in out
    assert not any(name.startswith("phase2") for name in sweep.starts())
