"""Hung ranks: what a rank tells of itself, which one the others wait for, and when nothing has gone on for too long."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.errors import ConfigError
from megatron_patch.hosts import heartbeat
from megatron_patch.hosts.hang import FACTOR, LEAST, SLOW, Allowed, Pulse, Rank, finding, waited_for
from megatron_patch.hosts.heartbeat import BETWEEN, CHECKPOINT, EVALUATING, STARTING, STEP, WARM, Heart
from megatron_patch.hosts.processes import JOB, processes
from megatron_patch.hosts.remote import Event, Hosts
from tests.support.two_hosts import wait_for

ROOT = Path(__file__).parents[2]
# Ranks that beat as training does, and then do what they are told for ever.
RANK = """
import sys, time
from megatron_patch.hosts.heartbeat import *
heart = Heart()
def loop():
    print("there", flush=True)
    while True: pass
def in_c():
    print("there", flush=True)
    sum(iter(int, 1))
def idle():
    print("there", flush=True)
    time.sleep(10**6)
for step in range(int(sys.argv[2])):
    heart.beat(STEP, step + 1)
globals()[sys.argv[1]]()
"""


@pytest.fixture
def job() -> str:
    return f"job-{os.getpid()}-{time.monotonic_ns()}"


@pytest.fixture
def rank(job: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a rank that does something for ever, once it has begun so many steps."""
    started = []

    def start(number: int, does: str, steps: int = 5, code: str = RANK) -> subprocess.Popen[bytes]:
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), JOB: job, "RANK": str(number)}
        command = [sys.executable, "-c", code, does, str(steps)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    pair = Hosts(["a"], local=True)
    yield pair
    pair.close()


class TestHeart:
    @pytest.fixture
    def heart(self, monkeypatch: pytest.MonkeyPatch) -> Heart:
        now = [0.0]
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
        heart = Heart()
        heart.now = now  # type: ignore[attr-defined]
        return heart

    def told(self, heart: Any) -> dict[str, Any]:
        return dict(json.loads(os.pread(heart._file, heartbeat.SIZE, 0)))

    def test_its_file_is_whole_and_of_one_size(self, heart: Heart) -> None:
        for iteration in range(2000):
            heart.beat(STEP, iteration)
            assert os.fstat(heart._file).st_size == heartbeat.SIZE
        assert self.told(heart)["iteration"] == 1999

    def test_first_steps_saves_and_first_evaluations_are_slow(self, heart: Any) -> None:
        def slow(phase: str) -> bool:
            heart.beat(phase, 1)
            return bool(self.told(heart)["slow"])

        assert self.told(heart)["slow"] and slow(STARTING)
        assert [slow(phase) for _ in range(WARM) for phase in (STEP, BETWEEN)] == [True] * 2 * WARM
        assert [slow(STEP), slow(BETWEEN)] == [False, False]
        assert [slow(EVALUATING) for _ in range(WARM + 1)] == [True] * WARM + [False]
        assert [slow(CHECKPOINT), slow(BETWEEN), slow(heartbeat.ENDING)] == [True, False, True]

    def test_the_slowest_step_is_not_one_of_the_slow_ones(self, heart: Any) -> None:
        def slowest(*happens: tuple[str, float]) -> float:
            for phase, seconds in happens:
                heart.beat(phase, 1)
                heart.now[0] += seconds
            heart.beat(BETWEEN)
            return float(self.told(heart)["longest"])

        assert slowest((STARTING, 900), *[(STEP, 300)] * WARM) == 0
        assert slowest((STEP, 2), (STEP, 3), (STEP, 1)) == 3
        assert slowest((CHECKPOINT, 700), (STEP, 2)) == 3
        assert slowest((EVALUATING, 600), (STEP, 5)) == 5


class TestWhatAnAgentSees:
    def test_where_ranks_are(self, job: str, rank: Callable[..., subprocess.Popen[bytes]]) -> None:
        started = [rank(0, "idle"), rank(1, "loop", 4), rank(2, "in_c")]
        found = [{told["rank"]: told for told in heartbeat.beats(processes(job))}[str(number)] for number in range(3)]
        assert [told["pid"] for told in found] == [process.pid for process in started]
        assert [(told["phase"], told["count"], told["iteration"]) for told in found] == [
            (STEP, 5, 5),
            (STEP, 4, 4),
            (STEP, 5, 5),
        ]
        where = heartbeat.stacks(processes(job))
        assert [where[str(n)][0][2] for n in range(3)] == ["idle", "loop", "in_c"]
        assert [process.poll() for process in started] == [None] * 3

    def test_a_rank_that_is_stopped_does_not_answer(
        self, job: str, rank: Callable[..., subprocess.Popen[bytes]]
    ) -> None:
        os.kill(rank(0, "idle").pid, signal.SIGSTOP)
        wait_for(lambda: heartbeat.beats(processes(job))[0]["state"] == "T", "the stop")
        assert heartbeat.stacks(processes(job), patience=1) == {}

    def test_children_are_no_ranks(self, job: str, rank: Callable[..., subprocess.Popen[bytes]]) -> None:
        """They have the rank's number in their environment, and forked ones its files too."""
        forks = RANK.replace("import sys, time\n", "import sys, time, os\n").replace(
            "globals()[", "os.fork() or time.sleep(10**6)\nglobals()["
        )
        process = rank(3, "idle", code=forks)
        wait_for(lambda: len(processes(job)) == 2, "the child")
        (told,) = heartbeat.beats(processes(job))
        assert (told["rank"], told["pid"], told["count"]) == ("3", process.pid, 5)
        for pid in [found.pid for found in processes(job)]:
            os.kill(pid, signal.SIGKILL)

    def test_one_that_has_not_begun(self, job: str, rank: Callable[..., subprocess.Popen[bytes]]) -> None:
        process = rank(0, "", code="import subprocess; print('there', flush=True); subprocess.run(['sleep', '5000'])")
        wait_for(lambda: len(processes(job)) == 2, "its child")
        (told,) = heartbeat.beats(processes(job))
        assert (told["pid"], told["phase"], told["beats"]) == (process.pid, None, False)
        assert heartbeat.stacks(processes(job)) == {}
        for pid in [found.pid for found in processes(job)]:
            os.kill(pid, signal.SIGKILL)

    def test_no_job_no_heart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(JOB, raising=False)
        assert Heart.of_a_watched_rank() is None


AT = ("/x/site-packages/torch/distributed/distributed_c10d.py", 3000, "all_reduce", "work.wait()")
LOOP = ("/home/me/train.py", 7, "spin", "while True:")
SYNC = ("/x/site-packages/megatron/core/optimizer/clip_grads.py", 80, "norm", "total_norm = total_norm.item()")


def at(number: int, *frames: tuple[str, int, str, str], count: int = 9, **more: Any) -> Rank:
    return Rank("ab"[number % 2], number, phase=STEP, iteration=4, count=count, stack=frames, slow=False, **more)


class TestWhoIsWaitedFor:
    @pytest.mark.parametrize(
        ("ranks", "numbers", "why"),
        [
            # the others wait in a collective
            ([at(0, AT), at(1, LOOP), at(2, AT)], [1], "does not wait for others"),
            ([at(0, SYNC), at(1, LOOP)], [1], "does not wait for others"),
            # one is behind, whatever it does
            ([at(0, AT, count=12), at(1, AT), at(2, AT, count=12)], [1], "is behind: others are in a training step"),
            # of those behind, the one that does not wait
            ([at(0, AT, count=10), at(1, AT), at(2, LOOP)], [2], "is behind"),
            # stopped ranks, and ranks in state D, say nothing
            ([at(0, AT), at(1, state="T")], [1], "cannot go on"),
            ([at(0, AT, count=12), at(1, state="D", count=12)], [1], "cannot go on"),
            # one that never came to training
            ([at(0, AT), Rank("b", 1)], [1], "is behind"),
            # on GPUs: nobody waits where that is seen, and one is alone
            ([at(0, ("/m/a.py", 1, "f", "g()")), at(1, LOOP), at(2, ("/m/a.py", 1, "f", "g()"))], [1], "is probably"),
            # all wait: a network
            ([at(0, AT), at(1, AT), at(2, AT)], [], ""),
            ([at(0, LOOP), at(1, LOOP)], [], ""),
        ],
    )
    def test_cases(self, ranks: list[Rank], numbers: list[int], why: str) -> None:
        found, said = waited_for(ranks)
        assert [rank.number for rank in found] == numbers
        assert said.startswith(why)

    def test_in_words(self) -> None:
        said, lines = finding([at(0, AT), at(1, LOOP)], 12.3, 5)
        assert str(said) == (
            "b: rank 1 hangs in a training step, iteration 4: spin (train.py:7: while True:); it does not wait for "
            "others, as they do for it (no rank has gone on for 12 s, and 5 are allowed)"
        )
        assert lines == [
            "b: rank 1 in a training step, iteration 4, innermost call first:",
            "b:   spin (train.py:7: while True:)",
        ]
        said, _ = finding([at(0, AT), at(1, AT)], 12.3, 5)
        assert str(said).startswith("the ranks hang (no rank has gone on for 12 s, and 5 are allowed) and none stands")
        said, lines = finding([at(n, AT) for n in range(2)] + [at(n, state="T") for n in range(2, 12)], 12, 5)
        assert "it cannot go on; so it is with rank 3 (b), rank 4 (a), rank 5 (b), rank 6 (a) and 5 more" in str(said)
        assert len(lines) == 3


class TestHowLong:
    @pytest.mark.parametrize(
        ("allowed", "ranks", "seconds"),
        [
            (Allowed(), [at(0, longest=2.0)], LEAST),
            (Allowed(), [at(0, longest=2.0), at(1, longest=100.0)], FACTOR * 100),
            (Allowed(), [at(0), Rank("b", 1)], SLOW),
            (Allowed(7), [at(0, longest=100.0)], 7),
            (Allowed(7), [at(0), Rank("b", 1)], SLOW),
            (Allowed(7, 3), [at(0), Rank("b", 1)], 7),
        ],
    )
    def test_limits(self, allowed: Allowed, ranks: list[Rank], seconds: float) -> None:
        assert allowed.of(ranks) == seconds

    @pytest.mark.parametrize(("step", "slow"), [(-1, 10), (float("nan"), 10), (float("inf"), 10), (5, 0), (5, -1)])
    def test_refused(self, step: float, slow: float) -> None:
        with pytest.raises(ConfigError, match=r"--hang-timeout.* expected seconds"):
            Allowed(step, slow).check()

    def test_said_aloud(self) -> None:
        assert "5 times the slowest so far, at least 300 s" in str(Allowed())
        assert "a step of more than 60 s counts as a hang" in str(Allowed(60))
        assert "not looked for" in str(Allowed(0))

    def test_time_is_counted_where_nothing_is_new(self, hosts: Hosts) -> None:
        now = [100.0]
        pulse = Pulse(hosts, Allowed(), lambda: now[0])

        def note(ranks: list[Rank], passed: float) -> float:
            now[0] += passed
            return pulse.note(ranks, most=10)

        assert note([], 500) == 0
        assert note([Rank("a", 0)], 5) == note([Rank("a", 0)], 5) == 0, "no rank has come to Megatron's training"
        assert [note([at(0, count=n)], 5) for n in (1, 1, 1, 2, 2)] == [0, 5, 10, 0, 5]
        assert note([at(0, count=2)], 10_000) == 15, "the machine was suspended"
        assert note([at(0, count=2), at(1, count=1)], 5) == 0, "a rank has come"


def hung(hosts: Hosts, job: str, allowed: Allowed) -> Event:
    hosts.ask("watch", job=job)
    pulse = Pulse(hosts, allowed)
    pulse.start()
    event = None
    while event is None or event.name != "hung":
        event = hosts.events.get(timeout=1800)
    pulse.stop()
    return event


def test_an_endless_loop_is_found(hosts: Hosts, job: str, rank: Callable[..., subprocess.Popen[bytes]]) -> None:
    rank(0, "idle")
    rank(1, "loop", 4)
    event = hung(hosts, job, Allowed(1))
    assert event.host == "a"
    assert event.particulars["text"].startswith(f"rank 1 hangs {STEP}, iteration 4: loop (<string>:")


def test_who_goes_on_is_left_alone(hosts: Hosts, job: str, rank: Callable[..., subprocess.Popen[bytes]]) -> None:
    """Steps of a tenth of a second for several times what is allowed; then an end, which is found."""
    slowly = """
print("there", flush=True)
for step in range(80):
    heart.beat(STEP, 5 + step)
    time.sleep(0.1)
"""
    rank(0, "idle", code=RANK.replace("globals()[", f"{slowly}globals()["))
    event = hung(hosts, job, Allowed(2))
    assert event.particulars["text"].startswith("the ranks hang (")
    assert f"1 of 1 {STEP}, iteration 84 at idle (" in event.particulars["text"]
