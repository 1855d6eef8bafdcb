"""The processes of a job on this host, by the job id in their environment; names of programs are never looked for.

Standard library alone and nothing of ours, as everything that an agent is made of (`megatron_patch.hosts.agent`).
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

JOB = "MEGATRON_PATCH_JOB"
"""The variable that holds the job id. A rank's children have it too."""
AGENT = "MEGATRON_PATCH_AGENT"
"""The variable that holds, for an agent, the id of the job that it watches."""
ORPHANED = 5.0
"""Seconds after which processes count as left behind by their launcher."""
STOPPED = 3.0
"""Seconds in a stopped state after which it is told."""
EXECUTING = 1.0
"""Seconds for which a process is watched that is just becoming another program, and has no environment meanwhile."""


@dataclass(frozen=True)
class Process:
    """A process of a job; a zombie is none."""

    pid: int
    started: str
    """Clock ticks since boot: with `pid`, its identity."""
    parent: int
    state: str
    """As in /proc/PID/stat; T and t are stopped."""
    job: str
    rank: str
    """Of the rank that it is or belongs to; empty for a launcher."""


# In /proc/PID/stat, counted from the state (proc(5)): when it was started, the size of its memory, and where its
# environment lies, which is another place after every execve and 0 in the middle of one.
_STARTED, _SIZE, _ENVIRONMENT = 19, 20, slice(47, 49)
_strangers: dict[int, tuple[str, ...]] = {}


def _stat(pid: str) -> tuple[list[str], tuple[str, ...]]:
    """Return the words of /proc/PID/stat from the state on, and what tells this program of this process from others."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        called, _, rest = file.read().rpartition(")")
    words = rest.split()
    return words, (called, words[_STARTED], *words[_ENVIRONMENT])


def _environ(pid: str, identity: tuple[str, ...]) -> dict[bytes, bytes]:
    """Return the environment of a process; of one in the middle of an execve, that of the program which it becomes."""
    deadline = time.monotonic() + EXECUTING
    while True:
        with open(f"/proc/{pid}/environ", "rb") as file:
            content = file.read()
        before, (words, identity) = identity, _stat(pid)
        executing = words[_SIZE] != "0" and identity[-1] == "0"  # a kernel thread, or one that is ending, has no memory
        if content or (identity == before and not executing) or time.monotonic() > deadline:
            return dict(pair.partition(b"=")[::2] for pair in content.split(b"\0"))
        time.sleep(0.001)


def processes(job: str | None = None) -> list[Process]:
    """Return the processes of a job, or of all jobs, that this user may look at."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            words, identity = _stat(name)
            if words[0] == "Z" or _strangers.get(int(name)) == identity:
                continue
            pairs = _environ(name, identity)
            theirs = pairs.get(JOB.encode(), b"").decode(errors="replace")
            if not theirs:
                _strangers[int(name)] = identity
            elif job in (None, theirs):
                rank = pairs.get(b"RANK", b"").decode(errors="replace")
                found.append(Process(int(name), words[_STARTED], int(words[1]), words[0], theirs, rank))
    return found


def watched(job: str) -> bool:
    """Return whether an agent of a job lives on this host."""
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                if _environ(name, _stat(name)[1]).get(AGENT.encode()) == job.encode():
                    return True
    return False


def end(job: str, patience: float) -> dict[str, Any]:
    """End every process of a job: SIGTERM, and after `patience` seconds SIGKILL; return how many, and who is left.

    It returns at once if there is none, else when none has been seen for a second: what they were starting ends too.
    """
    told: set[tuple[int, str]] = set()
    deadline = time.monotonic() + patience
    clear = None
    while time.monotonic() < deadline + 15:
        alive = processes(job)
        if not alive:
            clear = clear or time.monotonic()
            if time.monotonic() - clear > 1 or not told:
                break
        else:
            clear = None
        for process in alive:
            identity = (process.pid, process.started)
            late = time.monotonic() > deadline
            if late or identity not in told:
                told.add(identity)
                with contextlib.suppress(OSError):
                    os.kill(process.pid, signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.1)
    return {"ended": len(told), "left": [p.pid for p in processes(job)]}


class Watch:
    """The job's processes over time.

    Args:
        job: its id.
        tell: gets what is noticed: an event's name and its particulars.
    """

    def __init__(self, job: str, tell: Callable[..., None]) -> None:
        self._job, self._tell = job, tell
        self._launchers: set[tuple[int, str]] = set()
        self._alone: float | None = None
        self._stopped: dict[int, float] = {}
        self.ranks: set[str] = set()
        """All that have been seen."""

    def look(self) -> None:
        """Look once, and tell what is new."""
        now, alive = time.monotonic(), processes(self._job)
        launchers = {(p.pid, p.started) for p in alive if not p.rank}
        self.ranks |= {p.rank for p in alive if p.rank}
        if launchers:
            self._launchers |= launchers
            self._alone = None
        elif self._launchers and alive:
            self._alone = self._alone or now
            if now - self._alone > ORPHANED:
                # A rank's children that outlive it hold the ssh session open, for ever.
                self._tell("orphans", ranks=sorted({p.rank for p in alive}), pids=[p.pid for p in alive])
                self._launchers = set()
                end(self._job, 5)
        stopped = {p.pid: p for p in alive if p.state in "Tt"}
        for pid in set(self._stopped) - set(stopped):
            if self._stopped.pop(pid) == float("inf"):
                self._tell("goes_on", pid=pid)
        for pid, process in stopped.items():
            if self._stopped.setdefault(pid, now) + STOPPED < now:
                self._stopped[pid] = float("inf")
                self._tell("stopped", pid=pid, rank=process.rank)
