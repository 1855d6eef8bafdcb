"""What becomes of a run across hosts that something happens to: it ends, it says why and where, and nothing is left."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.faulty_hosts import ENDLESS, Start
from tests.support.two_hosts import TwoHosts, wait_for


def test_a_run_that_finishes_is_believed(hosts: TwoHosts, tmp_path: Path) -> None:
    start = Start(hosts, tmp_path, "--save", "s")
    assert start.ends() == 0, start.output
    start.clean()
    assert not (tmp_path / "s/launch.lock").exists()


def test_exit_code_0_is_not_believed_if_the_record_says_otherwise(hosts: TwoHosts, tmp_path: Path) -> None:
    (tmp_path / "unfinished").touch()
    start = Start(hosts, tmp_path, "--save", "s")
    assert start.ends() == 1
    assert "run.json: status running" in start.last
    start.clean()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_is_the_last_line(hosts: TwoHosts, tmp_path: Path, rank: int) -> None:
    start = Start(hosts, tmp_path, "--save", "s", "--fails-on", str(rank))
    assert start.ends() == 1
    assert start.last.endswith(f"failed, exit code 1: node{'ab'[rank]}: ValueError: no such data"), start.last
    start.clean()


EITHER = [pytest.param("a", marks=pytest.mark.extra), "b"]


@pytest.mark.parametrize("where", EITHER)
@pytest.mark.parametrize("logs", [[], ["--log-dir", "logs"]])
def test_a_killed_rank_ends_the_run(hosts: TwoHosts, tmp_path: Path, where: str, logs: list[str]) -> None:
    """Its helper lives on and holds the ssh session: the launching side used to wait for ever."""
    start = Start(hosts, tmp_path, "--save", "s", *ENDLESS, *logs)
    if logs:
        wait_in_logs(tmp_path)
    else:
        start.trains()
    start.kill("rank", getattr(hosts, where))
    assert start.ends() not in (0, None)
    assert f"node{where}: a rank was ended by SIGKILL" in start.last, start.output
    start.clean()


def wait_in_logs(folder: Path) -> None:
    wait_for(lambda: sum(" iteration 3" in p.read_text() for p in folder.glob("logs/node?/*.log")) == 2, "training")


@pytest.mark.parametrize("where", EITHER)
def test_a_killed_launcher_ends_the_run(hosts: TwoHosts, tmp_path: Path, where: str) -> None:
    """Its ranks used to train on, unwatched."""
    start = Start(hosts, tmp_path, "--save", "s", *ENDLESS).trains().kill("launcher", getattr(hosts, where))
    assert start.ends() not in (0, None)
    assert f"node{where}: its launcher (deepspeed.launcher.launch) has ended" in start.last, start.output
    start.clean()


@pytest.mark.parametrize(("what", "code"), [("runner", 137), ("pdsh", 1)])
def test_a_killed_launching_command_ends_the_run(hosts: TwoHosts, tmp_path: Path, what: str, code: int) -> None:
    start = Start(hosts, tmp_path, "--save", "s", *ENDLESS).trains().kill(what)
    assert start.ends() == code, start.output
    start.clean()


def test_a_killed_script_takes_everything_with_it(hosts: TwoHosts, tmp_path: Path) -> None:
    start = Start(hosts, tmp_path, "--save", "s", *ENDLESS).trains().kill("script")
    assert start.ends() == -signal.SIGKILL
    start.clean()
    assert not (tmp_path / "s/launch.lock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.extra)])
def test_a_signal_to_the_script_ends_everything(hosts: TwoHosts, tmp_path: Path, number: int) -> None:
    start = Start(hosts, tmp_path, "--save", "s", *ENDLESS).trains().kill("script", number=number)
    assert start.ends() == 128 + number
    assert start.last.endswith(f"ended by {signal.Signals(number).name}; nothing of the job is left on any host")
    start.clean()


def test_a_cut_link_ends_the_run(hosts: TwoHosts, tmp_path: Path) -> None:
    """Nobody used to notice for two hours. The host that is cut off cleans up after itself."""
    start = Start(hosts, tmp_path, "--save", "s", *ENDLESS).trains()
    hosts.cut()
    assert start.ends() not in (0, None)
    assert "nodeb: lost: Timeout, server nodeb not responding" in start.last, start.output
    start.clean()


def test_a_short_cut_is_survived(hosts: TwoHosts, tmp_path: Path) -> None:
    start = Start(hosts, tmp_path, "--save", "s", "--train-iters", "100").trains()
    hosts.cut()
    hosts.join()
    assert start.ends() == 0, start.output


@pytest.mark.extra
def test_a_stopped_rank_is_named(hosts: TwoHosts, tmp_path: Path) -> None:
    start = Start(hosts, tmp_path, "--save", "s", *ENDLESS, "--distributed-timeout-minutes", "0.2").trains()
    start.kill("rank", hosts.b, signal.SIGSTOP)
    assert start.ends() not in (0, None)
    assert "nodeb: process " in start.last and "of rank 1 is stopped (SIGSTOP)" in start.last, start.output
    start.clean()


def test_a_killed_agent_ends_the_run(hosts: TwoHosts, tmp_path: Path) -> None:
    start = Start(hosts, tmp_path, "--save", "s", *ENDLESS).trains().kill("agent", hosts.b)
    assert start.ends() not in (0, None)
    assert "nodeb: lost: " in start.last, start.output


def test_an_unreachable_host_is_told_before_the_start(hosts: TwoHosts, tmp_path: Path) -> None:
    hosts.cut()
    start = Start(hosts, tmp_path, "--save", "s")
    assert start.ends() == 2
    assert "--hostfile nodeb: expected a host that answers over ssh" in start.last, start.output
    assert "Connection timed out" in start.last or "No route to host" in start.last
    start.clean()


def test_a_second_start_is_refused_while_the_first_lives(hosts: TwoHosts, tmp_path: Path) -> None:
    first = Start(hosts, tmp_path, "--save", "s", *ENDLESS).trains()
    second = Start(hosts, tmp_path, "--save", "s", "--master-port", "29600")
    assert second.ends() == 2
    assert "--save " in second.last and "a folder that no other run writes to, and job " in second.last, second.output
    assert first.process.poll() is None
    first.kill("script", number=signal.SIGTERM)
    assert first.ends() == 143
    first.clean()


@pytest.mark.extra
def test_what_a_dead_job_left_is_ended_and_its_lock_taken_over(hosts: TwoHosts, tmp_path: Path) -> None:
    """Everything that could have cleaned up was killed at once, as by a power cut of the launching machine."""
    first = Start(hosts, tmp_path, "--save", "s", *ENDLESS).trains()
    pids = [first.pid("script"), first.pid("agent", hosts.a), first.pid("agent", hosts.b), first.pid("runner")]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert (tmp_path / "s/launch.lock").exists()
    second = Start(hosts, tmp_path, "--save", "s", "--no-doctor", "--master-port", "29600")
    assert second.ends() == 0, second.output
    assert "--save had the lock of job " in second.output
    second.clean()


def test_save_that_is_not_one_place_is_refused(hosts: TwoHosts, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    hosts.b.run("mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "s"))
    start = Start(hosts, tmp_path, "--save", "s")
    assert start.ends() == 2
    assert "expected one place for all hosts; nodeb cannot see what nodea writes there" in start.last, start.output
    start.clean()


def test_hosts_that_differ_are_refused(hosts: TwoHosts, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("lr: 1\n")
    (tmp_path / "tiny.yaml").touch()
    hosts.b.run("mount", "--bind", str(other), str(tmp_path / "tiny.yaml"))
    start = Start(hosts, tmp_path, "--save", "s")
    assert start.ends() == 2
    assert "tiny.yaml is not that of nodea" in start.last, start.output
    start.clean()
