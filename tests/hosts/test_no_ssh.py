"""A launch that is started on each host, without ssh: its hosts begin, restart and end together, and agree on how."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.support.faulty_hosts import ENDLESS, Start, prepare
from tests.support.two_hosts import LAUNCH, TwoHosts, environment, wait_for

SAVE = ["--save", "s", "--load", "s"]


def both(hosts: TwoHosts, folder: Path, *flags: str, first: int = 0) -> tuple[Start, Start]:
    """Start it on each host, on `first` first; return that of nodea first."""
    starts = {node: Start(hosts, folder, *flags, node=node) for node in (first, 1 - first)}
    return starts[0], starts[1]


def trains(*starts: Start) -> None:
    """Wait until all ranks are at work."""
    for start in starts:
        start.trains()


def end(starts: tuple[Start, Start]) -> list[int]:
    """Wait for both; nothing may be left."""
    codes = [start.ends() for start in starts]
    starts[0].clean()
    return codes


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.extra)])
def test_they_begin_as_one_job_and_finish(hosts: TwoHosts, tmp_path: Path, first: int) -> None:
    starts = both(hosts, tmp_path, *SAVE, first=first)
    assert end(starts) == [0, 0], starts[0].output + starts[1].output
    record = json.loads((tmp_path / "s/transfer/run.json").read_text())
    assert f"> job {record['job']} on nodea nodeb" in starts[0].output, (
        "the last rank, on nodeb, has the first one's id"
    )
    assert not (tmp_path / "s/launch.lock").exists()


def test_the_record_decides_here_too(hosts: TwoHosts, tmp_path: Path) -> None:
    (tmp_path / "unfinished").touch()
    starts = both(hosts, tmp_path, *SAVE)
    assert end(starts) == [1, 1]
    assert all("run.json: status running" in start.last for start in starts)


def test_all_restart_from_the_same_checkpoint(hosts: TwoHosts, tmp_path: Path) -> None:
    flags = [*SAVE, "--train-iters", "30", "--hang-timeout", "10", "--hangs-at", "1:25", "--restarts", "2"]
    starts = both(hosts, tmp_path, *flags)
    assert end(starts) == [0, 0], starts[0].output + starts[1].output
    for start in starts:
        assert "restart 1 of 2 in 10 s, from checkpoint 20" in start.output
        assert re.findall(r" iteration (2[01])\n", start.output) == ["20", "21", "21"]
    assert "nodeb: rank 1 hangs in a training step, iteration 25: loop (" in starts[0].output


@pytest.mark.parametrize("where", [pytest.param(0, marks=pytest.mark.extra), 1])
def test_a_killed_rank_ends_all(hosts: TwoHosts, tmp_path: Path, where: int) -> None:
    starts = both(hosts, tmp_path, *SAVE, *ENDLESS)
    trains(*starts)
    os.kill(starts[where].pid("rank"), signal.SIGKILL)
    codes = end(starts)
    assert codes[0] == codes[1] != 0
    for start in starts:
        assert f"node{'ab'[where]}: a rank was ended by SIGKILL" in start.last, start.output


@pytest.mark.parametrize("where", [pytest.param(0, marks=pytest.mark.extra), 1])
def test_a_killed_script_ends_all(hosts: TwoHosts, tmp_path: Path, where: int) -> None:
    starts = both(hosts, tmp_path, *SAVE, *ENDLESS)
    trains(*starts)
    starts[where].kill("script")
    codes = end(starts)
    assert codes[where] == -signal.SIGKILL and codes[1 - where] == 1
    expected = "nodeb: lost: the connection is closed" if where else "the first host is lost"
    assert expected in starts[1 - where].last, starts[1 - where].output


@pytest.mark.parametrize("where", [pytest.param(0, marks=pytest.mark.extra), 1])
def test_a_signal_on_one_host_ends_all(hosts: TwoHosts, tmp_path: Path, where: int) -> None:
    """As `scancel` and Ctrl-C do; it is not gone on from."""
    starts = both(hosts, tmp_path, *SAVE, *ENDLESS, "--restarts", "3")
    trains(*starts)
    starts[where].kill("script", number=signal.SIGTERM)
    assert end(starts) == [143, 143]
    assert all("not restarted: it was asked to end" in start.output for start in starts)


def test_a_cut_link_ends_both(hosts: TwoHosts, tmp_path: Path) -> None:
    starts = both(hosts, tmp_path, *SAVE, *ENDLESS)
    trains(*starts)
    hosts.cut()
    assert end(starts) == [1, 1]
    assert "nodeb: lost: " in starts[0].last and "the first host is lost" in starts[1].last


def test_who_is_missing_is_said(hosts: TwoHosts, tmp_path: Path) -> None:
    first = Start(hosts, tmp_path, *SAVE, node=0)
    wait_for(lambda: "waiting for the same command with --node-rank 1 (nodeb)" in first.output, "a word")
    assert (tmp_path / "s/launch.lock").stat().st_mode & 0o777 == 0o600, "it holds a secret"
    first.kill("script", number=signal.SIGTERM)
    assert first.ends() != 0
    first.clean()
    other = Start(hosts, tmp_path, *SAVE, node=1)
    wait_for(
        lambda: "waiting for the same command with --node-rank 0 (there is no launch.lock" in other.output, "a word"
    )
    other.kill("script", number=signal.SIGTERM)
    assert other.ends() != 0


def test_a_second_start_is_refused_on_both_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    starts = both(hosts, tmp_path, *SAVE, *ENDLESS)
    trains(*starts)
    again = both(hosts, tmp_path, *SAVE, "--master-port", "29600")
    assert [start.ends() for start in again] == [2, 2]
    assert "expected a folder that no other run writes to" in again[0].last
    assert "--node-rank 1: expected a node rank of its own: nodeb is 1 already" in again[1].last
    assert [start.process.poll() for start in starts] == [None, None]
    starts[0].kill("script", number=signal.SIGTERM)
    assert end(starts) == [143, 143]


@pytest.mark.extra
def test_a_host_whose_script_died_may_come_back(hosts: TwoHosts, tmp_path: Path) -> None:
    """As where a machine was started again, and with it whatever starts the script there."""
    flags = [*SAVE, "--train-iters", "200", "--restarts", "3"]
    starts = both(hosts, tmp_path, *flags)
    trains(*starts)
    starts[1].kill("script")
    assert starts[1].ends() == -signal.SIGKILL
    back = Start(hosts, tmp_path, *flags, node=1)
    assert end((starts[0], back)) == [0, 0], starts[0].output + back.output


def test_other_data_on_one_host_is_refused(hosts: TwoHosts, tmp_path: Path) -> None:
    for name in ("d.idx", "d.bin", "other"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    hosts.b.run("mount", "--bind", str(tmp_path / "other"), str(tmp_path / "d.bin"))
    starts = both(hosts, tmp_path, *SAVE, "--data-path", "d")
    assert end(starts) == [2, 2]
    assert all("the file d.bin of --data-path is not that of nodea" in start.last for start in starts)


def test_without_save_each_host_watches_alone(hosts: TwoHosts, tmp_path: Path) -> None:
    starts = both(hosts, tmp_path)
    assert end(starts) == [0, 0], starts[0].output + starts[1].output
    assert all("without a --save folder nothing joins the hosts" in start.output for start in starts)
    refused = both(hosts, tmp_path, "--restarts", "1")
    assert [start.ends() for start in refused] == [2, 2]
    assert all("--load not given" in start.last for start in refused)


# Starts its command on every node, as srun does, and ends all once one has failed: --kill-on-bad-exit.
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
ssh nodeb "cd '$PWD' && env $(env | grep -E '^(PATH|PYTHONPATH|OMP_NUM_THREADS|SLURM_[A-Z_]*)=' | tr '\\n' ' ') \\
    SLURM_NODEID=1 $(printf "'%s' " "$@")" & second=$!
wait $first; one=$?
wait $second; two=$?
[ $one -eq 0 ] && exit $two
exit $one
"""


def test_under_slurm(hosts: TwoHosts, tmp_path: Path) -> None:
    """With stand-ins for srun and scontrol: a rank hangs, and all nodes restart together inside the one job."""
    prepare(tmp_path)
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/sh\nprintf 'nodea\\nnodeb\\n'\n"}.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    env = dict(environment(SLURM_JOB_ID="42", SLURM_JOB_NODELIST="node[a-b]", SLURM_CPUS_ON_NODE="2"))
    env["PATH"] = f"{bin}:{env['PATH']}"
    words = ["--config", "tiny.yaml", "--slots", "1", "--restarts", "1", "--hang-timeout", "10", *SAVE]
    script = hosts.a.popen(
        str(LAUNCH / "slurm.sbatch"),
        *words,
        "--train-iters",
        "30",
        "--hangs-at",
        "0:15",
        cwd=tmp_path,
        env=env,
        stdout=(tmp_path / "slurm.out").open("wb"),
        stderr=(tmp_path / "slurm.err").open("wb"),
    )
    code = script.wait()
    out, err = ((tmp_path / name).read_text() for name in ("slurm.out", "slurm.err"))
    assert code == 0, out + err
    assert err.count("restart 1 of 1 in 10 s, from checkpoint 10") == 2
    assert len(re.findall(r" iteration 10\n", out)) == 2 and len(re.findall(r" iteration 11\n", out)) == 4
