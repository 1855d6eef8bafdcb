"""Has a rank stopped for good, and which one do the others wait for: the heartbeats of all hosts, put together."""

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.hosts.first_error import Finding
from megatron_patch.hosts.remote import Event, Hosts

LOOK = 5.0
"""Seconds between two looks at all heartbeats."""
FACTOR = 5.0
"""A step that takes so many times the slowest one so far is a hang, where the user gives no time."""
LEAST = 300.0
"""Seconds, and it takes at least that."""
SLOW = 1800.0
"""Seconds for the start with its first steps, for a checkpoint, and for the end, unless the user says otherwise."""
SHOWN = 3
"""Ranks of which the stack is printed."""
# Where a rank waits for others: in a collective, or for a GPU whose collective has not come back.
_WAITS = re.compile(r"\.(?:wait|synchronize|item|tolist|cpu|barrier)\(")
_COLLECTIVE = "torch/distributed/"
# Below these, the frames say little to a user.
_LIBRARIES = re.compile(r"/site-packages/|/dist-packages/|/lib/python3\.\d+/|^<")


@dataclass(frozen=True)
class Allowed:
    """How long nothing may go on, in seconds."""

    step: float | None = None
    """In training and evaluation; None: `FACTOR` times the slowest step so far, and at least `LEAST`; 0: for ever."""
    slow: float = SLOW
    """In the start, the first steps, a checkpoint and the end."""

    @property
    def watching(self) -> bool:
        """Whether there is any limit."""
        return self.step != 0

    def check(self) -> None:
        """Raise ConfigError on a value that cannot be meant."""
        for flag, seconds in (("--hang-timeout", self.step), ("--hang-timeout-slow", self.slow)):
            least = 0 if flag == "--hang-timeout" else 1
            if seconds is not None and not (least <= seconds < float("inf")):
                expected = "seconds > 0, or 0 for no limit" if least == 0 else "seconds >= 1"
                raise ConfigError(flag, seconds, expected, "give a number of seconds")

    def of(self, ranks: "Sequence[Rank]") -> float:
        """Return the limit for what the ranks are in: the longest, as some may be ahead of a slow one."""
        step = self.step or max(LEAST, FACTOR * max((rank.longest for rank in ranks), default=0.0))
        return max(self.slow, step) if any(rank.slow for rank in ranks) else step

    def __str__(self) -> str:
        if not self.watching:
            return "hung ranks are not looked for (--hang-timeout 0)"
        step = f"{self.step:g} s" if self.step else f"{FACTOR:g} times the slowest so far, at least {LEAST:g} s,"
        return (
            f"a step of more than {step} counts as a hang (--hang-timeout S, 0: never), and so do more than "
            f"{self.slow:g} s in the start with its first steps, in a checkpoint and at the end (--hang-timeout-slow S)"
        )


@dataclass(frozen=True)
class Rank:
    """Where a rank is; see `megatron_patch.hosts.heartbeat`."""

    host: str
    number: int
    state: str = "S"
    phase: str | None = None
    """None: it has not come to Megatron's training."""
    iteration: int | None = None
    count: int = 0
    """Of what it has begun; equal on all ranks that are equally far."""
    slow: bool = True
    longest: float = 0.0
    """Seconds of its slowest step."""
    stack: tuple[tuple[str, int, str, str], ...] = field(default=(), compare=False)
    """Frames, the innermost first: file, line, function, text of the line."""

    @classmethod
    def of(cls, host: str, told: Mapping[str, Any], stack: Sequence[Sequence[Any]] = ()) -> "Rank":
        """Return the rank of an agent's answer."""
        taken = {name: told[name] for name in ("state", "phase", "iteration", "count", "slow", "longest")}
        frames = tuple((str(file), int(line), str(name), str(text)) for file, line, name, text in stack)
        return cls(host, int(told["rank"]), **taken, stack=frames)

    @property
    def waits(self) -> bool:
        """Whether it is where a rank waits for the others."""
        return any(_COLLECTIVE in file for file, *_ in self.stack[:2]) or bool(
            self.stack and _WAITS.search(self.stack[0][3])
        )

    @property
    def place(self) -> str:
        """The line that it is at, and the innermost one outside of libraries."""
        if self.state in "Tt":
            return "stopped (SIGSTOP, or a debugger)"
        if self.state == "D":
            return "waiting in the kernel (state D: a disk or a network file system that does not answer?)"
        if not self.stack:
            return "somewhere it cannot tell"
        inner = _words(self.stack[0])
        own = next((frame for frame in self.stack if not _LIBRARIES.search(frame[0])), None)
        return inner if own in (None, self.stack[0]) else f"{inner}, called from {_words(own)}"

    @property
    def progress(self) -> str:
        """How far it is, in words."""
        if self.phase is None:
            return "before Megatron's training"
        return self.phase + (f", iteration {self.iteration}" if self.iteration else "")

    @property
    def lines(self) -> list[str]:
        """Where it is, and how it came there, the innermost call first."""
        if not self.stack:
            return [f"{self.host}: rank {self.number} {self.progress}: {self.place}"]
        calls = [f"{self.host}:   {_words(frame)}" for frame in self.stack]
        return [f"{self.host}: rank {self.number} {self.progress}, innermost call first:", *calls]


def _words(frame: tuple[str, int, str, str]) -> str:
    file, line, name, text = frame
    return f"{name} ({os.path.basename(file)}:{line}" + (f": {text})" if text else ")")


def waited_for(ranks: Sequence[Rank]) -> tuple[list[Rank], str]:
    """Return which ranks the others wait for, and how that is known; none, if nothing tells them from the others.

    A rank that is stopped, or waits for a disk, cannot go on. Else the one that is behind is waited for: every rank
    begins the same things in the same order. Of ranks that are equally far, those that do not wait in a collective; and
    where that cannot be seen, as on GPUs, the one that is alone at its place, with less certainty.
    """
    frozen = [rank for rank in ranks if rank.state in "TtD"]
    if frozen and len(frozen) < len(ranks):
        return frozen, "cannot go on"
    far = max(rank.count for rank in ranks)
    behind = [rank for rank in ranks if rank.count < far]
    behind = [rank for rank in behind if rank.count == min(rank.count for rank in behind)]
    if behind:
        ahead = next(rank for rank in ranks if rank.count == far)
        busy = [rank for rank in behind if not rank.waits]
        return busy or behind, f"is behind: others are {ahead.progress}"
    busy = [rank for rank in ranks if rank.stack and not rank.waits]
    if busy and len(busy) < len(ranks):
        return busy, "does not wait for others, as they do for it"
    places = Counter(rank.stack[:1] for rank in ranks)
    alone = [rank for rank in ranks if places[rank.stack[:1]] == 1]
    if len(alone) == 1 and len(ranks) > 2:
        return alone, "is probably the one: it alone is not where others are"
    return [], ""


def finding(ranks: Sequence[Rank], seconds: float, allowed: float) -> tuple[Finding, list[str]]:
    """Return what to say of a hang, in one line and in those before it.

    Args:
        ranks: where all are.
        seconds: in which none has gone on.
        allowed: how many were.
    """
    since = f"no rank has gone on for {seconds:.0f} s, and {allowed:.0f} are allowed"
    found, why = waited_for(ranks)
    shown = (found or list(ranks))[:SHOWN]
    lines = [line for rank in shown for line in rank.lines]
    if not found:
        where = Counter(f"{rank.progress} at {rank.place}" for rank in ranks).most_common(2)
        text = "; ".join(f"{number} of {len(ranks)} {what}" for what, number in where)
        return Finding("", f"the ranks hang ({since}) and none stands out: {text}"), lines
    first, *more = found
    also = "; so it is with " if more else ""
    also += ", ".join(f"rank {rank.number} ({rank.host})" for rank in more[:4])
    also += f" and {len(more) - 4} more" if len(more) > 4 else ""
    text = f"rank {first.number} hangs {first.progress}: {first.place}; it {why}{also} ({since})"
    return Finding(first.host, text), lines


class Pulse(threading.Thread):
    """Looks at the heartbeats of all hosts, and puts an event ``hung`` when none has gone on for too long.

    It counts the seconds in which it has looked and seen nothing new: clocks of hosts do not matter, nor does a time in
    which everything was suspended. Ranks that Megatron's `pretrain` does not drive say nothing and are not judged.

    Args:
        hosts: to be asked.
        allowed: how long nothing may go on.
    """

    def __init__(self, hosts: Hosts, allowed: Allowed, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(daemon=True)
        self._hosts, self._allowed, self._clock = hosts, allowed, clock
        self._done = threading.Event()
        self._seen: dict[tuple[str, int], int] = {}
        self._still = 0.0
        self._looked = clock()

    def stop(self) -> None:
        """Look no more."""
        self._done.set()

    def run(self) -> None:
        """Look until a hang is found, or `stop`."""
        if not self._allowed.watching:
            return
        pause = min(LOOK, max(0.2, (self._allowed.step or LOOK) / 4))
        while not self._done.wait(pause):
            answers = self._hosts.ask("beats", within=60)
            if any(isinstance(answer, Exception) for answer in answers.values()):
                continue  # a host that is lost is somebody else's to tell
            ranks = [Rank.of(host, told) for host, answer in answers.items() for told in answer]
            seconds = self.note(ranks, 2 * pause)
            limit = self._allowed.of(ranks)
            if seconds > limit and not self._done.is_set() and self._tell(seconds, limit):
                return

    def note(self, ranks: Sequence[Rank], most: float) -> float:
        """Take in where the ranks are; return for how many seconds that has been so, a look counting `most` at most."""
        now, seen = self._clock(), {(rank.host, rank.number): rank.count for rank in ranks}
        passed, self._looked = min(now - self._looked, most), now
        begun = any(rank.phase is not None for rank in ranks)
        self._still = self._still + passed if begun and seen == self._seen else 0.0
        self._seen = seen
        return self._still

    def _tell(self, seconds: float, limit: float) -> bool:
        """Find out which rank it is, and tell; False if they have gone on in the meantime."""
        answers = self._hosts.ask("stacks", within=30)
        where = {host: answer for host, answer in answers.items() if isinstance(answer, dict)}
        again = self._hosts.ask("beats", within=30)
        told = [
            Rank.of(host, one, where.get(host, {}).get(one["rank"], ()))
            for host, answer in again.items()
            if isinstance(answer, list)
            for one in answer
        ]
        if {(rank.host, rank.number): rank.count for rank in told} != self._seen:
            return False
        what, lines = finding(told, seconds, limit)
        self._hosts.events.put(Event(what.host, "hung", {"text": what.text, "lines": lines}))
        return True
