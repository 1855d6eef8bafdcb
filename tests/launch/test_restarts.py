"""Restarts after a crash: when another attempt is made, and when it would be no use."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_patch.errors import ConfigError
from megatron_patch.hosts.restarts import WAITS, Ended, check_restarts, supervised
from tests.support.launching import Bench

CRASH = 1
AWAY = ConfigError("--hostfile", "node2", "a host that answers", "try ssh")


def attempts(outcomes: Sequence[Ended | ConfigError], restarts: int) -> tuple[int, int, list[str], list[float]]:
    """Exit code, number of attempts, what was said, how long was waited."""
    left = list(outcomes)
    said: list[str] = []
    waited: list[float] = []

    def attempt() -> Ended:
        outcome = left.pop(0)
        if isinstance(outcome, ConfigError):
            raise outcome
        return outcome

    code = supervised(attempt, restarts, said.append, waited.append)
    return code, len(outcomes) - len(left), said, waited


def crashed(checkpoint: str | None, code: int = CRASH, diverged: bool = False) -> Ended:
    return Ended(code, diverged, checkpoint)


def test_goes_on_while_it_gets_further() -> None:
    code, made, said, waited = attempts([crashed("10"), crashed("20"), Ended(0, False, "30")], restarts=5)
    assert (code, made) == (0, 3)
    assert waited == list(WAITS[:2])
    assert said == ["restart 1 of 5 in 10 s, from checkpoint 10", "restart 2 of 5 in 20 s, from checkpoint 20"]


def test_waits_longer_and_longer() -> None:
    *_, waited = attempts([crashed(str(n)) for n in range(10)], restarts=9)
    assert waited == [*WAITS, *[WAITS[-1]] * 3]


def test_ends_with_the_last_restart() -> None:
    code, made, said, _ = attempts([crashed("10", 7), crashed("20", 9), crashed("30", 9)], restarts=1)
    assert (code, made, said[-1]) == (9, 2, "not restarted: 1 restarts were made")


@pytest.mark.parametrize("first", [None, "10"])
def test_gives_up_without_a_new_checkpoint(first: str | None) -> None:
    """The first attempt may have gone on from one that was there."""
    code, made, said, _ = attempts([crashed(first)] * 9, restarts=8)
    assert (code, made) == (CRASH, 2 if first is None else 3)
    assert said[-1] == f"not restarted: 2 attempts in a row made no new checkpoint (the last one: {first or 'none'})"


@pytest.mark.parametrize(
    ("ended", "why"),
    [
        (crashed("10", code=2), "a mistake that only you can mend"),
        (crashed("10", diverged=True), "the run diverged"),
        (crashed("10", code=130), "it was asked to end"),
        (crashed("10", code=143), "it was asked to end"),
    ],
)
def test_what_is_no_crash_is_not_gone_on_from(ended: Ended, why: str) -> None:
    code, made, said, _ = attempts([ended] * 3, restarts=2)
    assert (code, made, said) == (ended.code, 1, [f"not restarted: {why}"])


def test_a_host_may_be_away_for_one_attempt() -> None:
    code, made, said, _ = attempts([crashed("10"), AWAY, Ended(0, False, "20")], restarts=3)
    assert (code, made) == (0, 3)
    assert said[1] == f"restart 1 of 3: {AWAY}"
    code, made, said, _ = attempts([crashed("10"), AWAY, AWAY, AWAY], restarts=3)
    assert (code, made) == (2, 3)


def test_a_mistake_at_the_first_start_is_told_as_ever() -> None:
    with pytest.raises(ConfigError, match="node2"):
        attempts([AWAY], restarts=3)


def test_without_restarts_nothing_is_said() -> None:
    assert attempts([crashed("10", 5)], restarts=0) == (5, 1, [], [])


def test_ctrl_c_while_it_waits() -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    said: list[str] = []
    assert supervised(lambda: crashed("10"), 3, said.append, interrupted) == 130
    assert said[-1] == "ended while it waited to restart; nothing is running"


@pytest.mark.parametrize(
    ("restarts", "save", "load", "message"),
    [
        (-1, "s", "s", "--restarts -1: expected an integer >= 0"),
        (3, None, None, "--restarts 3 with --save not given and --load not given: expected --load of the folder"),
        (3, "s", None, "--load not given: expected --load of the folder that --save writes to"),
        (3, "s", "t", "--save s and --load t: expected"),
    ],
)
def test_a_restart_must_go_on(restarts: int, save: str | None, load: str | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_restarts(restarts, save, load)
    assert message in str(caught.value)


# The stand-in for deepspeed: writes a checkpoint's number; crashes at first, then finishes.
RUN = """
import os
job = os.environ["MEGATRON_PATCH_JOB"]
os.makedirs("s/transfer", exist_ok=True)
number = len(open(os.environ["CALLS"]).readlines())
open("s/latest_checkpointed_iteration.txt", "w").write(str(10 * number))
status = "running" if number == 1 else "finished"
json.dump({"status": status, "job": job, "iteration": 3}, open("s/transfer/run.json", "w"))
sys.exit(3 if number == 1 else 0)
"""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_script_starts_a_crashed_run_again(bench: Bench) -> None:
    flags = ("--save", "s", "--load", "s", "--alignment-interval", "5")
    done = bench.run("pretrain.sh", "--config", "config.yaml", "--num-gpus", "1", "--restarts", "2", *flags, THEN=RUN)
    assert (done.code, len(done.calls)) == (0, 2), done.err
    assert "pretrain.sh: failed, exit code 3" in done.err
    assert "pretrain.sh: restart 1 of 2 in 10 s, from checkpoint 10" in done.err
    jobs = [call["env"]["MEGATRON_PATCH_JOB"] for call in done.calls]
    assert len(set(jobs)) == 2
    assert json.loads((bench.folder / "s/transfer/run.json").read_text())["job"] == jobs[1]
    assert all("--restarts" not in call["argv"] for call in done.calls)


@pytest.mark.parametrize("script", ["pretrain.sh", "pretrain_multinode.sh"])
def test_a_script_refuses_a_restart_that_would_begin_anew(bench: Bench, script: str) -> None:
    more: dict[str, Callable[[], tuple[str, ...]]] = {
        "pretrain.sh": lambda: ("--num-gpus", "1"),
        "pretrain_multinode.sh": lambda: ("--hostfile", "hosts"),
    }
    done = bench.run(script, "--config", "config.yaml", *more[script](), "--restarts=2", "--save", "s")
    assert (done.code, done.calls) == (2, [])
    assert "--restarts 2 with --save s and --load not given: expected --load of the folder" in done.err
