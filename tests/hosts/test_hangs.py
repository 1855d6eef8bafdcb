"""A rank that hangs is found and named, the run ends, and with --restarts it goes on; what is slow is left alone."""

import json
import re
import signal
from pathlib import Path

import pytest

from tests.support.faulty_hosts import ENDLESS, Start
from tests.support.hanging import write_script
from tests.support.two_hosts import TwoHosts

QUICK = ["--hang-timeout", "10"]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.extra), 1])
def test_an_endless_loop_is_named(hosts: TwoHosts, tmp_path: Path, rank: int) -> None:
    start = Start(hosts, tmp_path, "--save", "s", *ENDLESS, *QUICK, "--hangs-at", f"{rank}:15")
    assert start.ends() == 1
    assert f"node{'ab'[rank]}: rank {rank} hangs in a training step, iteration 15: loop (" in start.last, start.output
    assert ": while True: pass" in start.last
    start.clean()


def test_a_stopped_rank_is_named_long_before_the_collective_gives_up(hosts: TwoHosts, tmp_path: Path) -> None:
    start = Start(hosts, tmp_path, "--save", "s", *ENDLESS, *QUICK).trains(20).kill("rank", hosts.b, signal.SIGSTOP)
    assert start.ends() == 1
    assert "nodeb: process " in start.last and "of rank 1 is stopped (SIGSTOP)" in start.last, start.output
    assert re.search("nodeb: rank 1 hangs .*, iteration .*: stopped", start.output)
    start.clean()


def test_a_slow_checkpoint_is_no_hang(hosts: TwoHosts, tmp_path: Path) -> None:
    start = Start(hosts, tmp_path, "--save", "s", "--train-iters", "22", "--hang-timeout", "8", "--slow-save", "20")
    assert start.ends() == 0, start.output
    assert "hangs" not in start.output
    start.clean()


def test_a_checkpoint_that_never_ends_is_one(hosts: TwoHosts, tmp_path: Path) -> None:
    limits = [*QUICK, "--hang-timeout-slow", "15", "--slow-save", "1000000"]
    start = Start(hosts, tmp_path, "--save", "s", *ENDLESS, *limits)
    assert start.ends() == 1
    assert "nodeb: rank 1 hangs in a checkpoint, iteration 10: " in start.last, start.output
    start.clean()


def test_a_restart_goes_on_from_the_last_checkpoint(hosts: TwoHosts, tmp_path: Path) -> None:
    flags = ["--save", "s", "--load", "s", "--train-iters", "30", *QUICK, "--hangs-at", "1:25", "--restarts", "2"]
    start = Start(hosts, tmp_path, *flags)
    assert start.ends() == 0, start.output
    assert "restart 1 of 2 in 10 s, from checkpoint 20" in start.output
    assert start.output.count(" iteration 20\n") == 2, "by both ranks, once"
    assert start.output.count(" iteration 21\n") == 4
    start.clean()


@pytest.mark.extra
@pytest.mark.parametrize(
    ("how", "where", "seconds"),
    [("loop", "batch", 0), ("slow", "evaluation", 90)],
)
def test_megatron(hosts: TwoHosts, tmp_path: Path, how: str, where: str, seconds: float) -> None:
    """A real training, with gloo: a rank in a loop before a collective; an evaluation that takes its time."""
    trouble = {"where": where, "how": how, "rank": 1, "iteration": 5, "seconds": seconds, "once": True}
    (tmp_path / "trouble.json").write_text(json.dumps(trouble))
    flags = ["--save", "s", "--load", "s", "--hang-timeout", "60", "--restarts", "1", "--eval-interval", "5"]
    start = Start(hosts, tmp_path, *flags, real=True, script=write_script(tmp_path))
    assert start.ends() == 0, start.output
    if how == "loop":
        assert "nodeb: rank 1 hangs in a training step, iteration 5: spin (sticks.py:" in start.output
        assert "restart 1 of 1 in 10 s, from checkpoint 3" in start.output
    else:
        assert "hangs" not in start.output
    assert json.loads((tmp_path / "s/transfer/run.json").read_text())["status"] == "finished"
    start.clean()
