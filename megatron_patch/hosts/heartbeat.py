"""The heartbeat of a rank: how far it is, told in a file that this host's agent reads and that dies with the process.

Standard library alone and nothing of ours but `processes`, as everything that an agent is made of
(`megatron_patch.hosts.agent`). Nothing is written to a disk: the file is in memory, and the agent finds it among the
rank's open files. A rank that hangs writes nothing more, whatever it hangs in; where it does, its agent asks it with a
signal that the interpreter answers without Python's help, so that endless loops in C are seen as well.
"""

import contextlib
import faulthandler
import json
import linecache
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from megatron_patch.hosts.processes import JOB, Process

BEAT_FILE, STACK_FILE = "megatron_patch.beat", "megatron_patch.stack"
ASK = signal.SIGRTMIN + 9
"""The signal that makes a rank write down where its threads are."""
SIZE = 512
"""Bytes of the file; it is always written as a whole."""
STARTING, STEP, BETWEEN, EVALUATING, CHECKPOINT, ENDING = (
    "at the start",
    "in a training step",
    "between two steps",
    "in an evaluation",
    "in a checkpoint",
    "at the end",
)
"""Where a rank is."""
WARM = 3
"""The first steps of training, and of evaluation, compile and allocate: they say nothing of how long a step takes."""
DEPTH = 12
"""Frames of a stack that are told."""
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")


class Heart:
    """Tells where this process, a rank, is. To be made early: what is hung before the first beat is found too.

    Raises:
        OSError: no file in memory can be made.
    """

    def __init__(self) -> None:
        self._file, self._stack = os.memfd_create(BEAT_FILE), os.memfd_create(STACK_FILE)
        faulthandler.register(ASK, file=self._stack, all_threads=True, chain=False)
        self._began = time.monotonic()
        self._steps = {STEP: 0, EVALUATING: 0}
        self._told: dict[str, Any] = {
            "pid": os.getpid(),
            "main": threading.main_thread().ident,
            "count": 0,
            "phase": None,
            "iteration": None,
            "slow": True,
            "longest": 0.0,
        }
        self._write()

    @classmethod
    def of_a_watched_rank(cls) -> "Heart | None":
        """Return one for a rank of a launch by our scripts; None for others, and with a word where it cannot be."""
        if not os.environ.get(JOB):
            return None
        try:
            return cls()
        except OSError as error:
            print(f"WARNING: no heartbeat of this rank, a hang will not be found: {error}", file=sys.stderr, flush=True)
            return None

    def beat(self, phase: str, iteration: int | None = None) -> None:
        """Something has begun: `phase`, in an iteration, from 1, where there is one."""
        now, told = time.monotonic(), self._told
        if not told["slow"]:
            told["longest"] = max(told["longest"], now - self._began)
        self._began = now
        if phase in self._steps:
            self._steps[phase] += 1
        slow = phase in (STARTING, CHECKPOINT, ENDING) or self._steps[STEP] <= WARM
        slow |= phase == EVALUATING and self._steps[EVALUATING] <= WARM
        told.update(count=told["count"] + 1, phase=phase, iteration=iteration, slow=slow)
        self._write()

    def _write(self) -> None:
        os.pwrite(self._file, json.dumps(self._told).ljust(SIZE).encode(), 0)


def _open_file(pid: int, name: str) -> str | None:
    """Return the path of a process's file in memory; None if it has none of that name."""
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{number}").startswith(f"/memfd:{name} "):
                    return f"/proc/{pid}/fd/{number}"
    return None


def _record(pid: int) -> dict[str, Any] | None:
    """Return what a process has told last of itself; a child that was forked has its parent's file, and not its own."""
    path = _open_file(pid, BEAT_FILE)
    for _ in range(3):  # it may be half written
        with contextlib.suppress(OSError, ValueError):
            if path is not None:
                with open(path, "rb") as file:
                    told = json.loads(file.read())
                return told if isinstance(told, dict) and told.get("pid") == pid else None
    return None


def beats(alive: Iterable[Process]) -> list[dict[str, Any]]:
    """Return where the ranks among a job's processes are: what they have told, with ``rank``, ``pid`` and ``state``.

    One that has told nothing has no ``phase``.
    """
    ranks: dict[str, list[Process]] = {}
    for process in alive:
        if process.rank:
            ranks.setdefault(process.rank, []).append(process)
    found = []
    for rank, theirs in ranks.items():
        family = {p.pid for p in theirs}
        # Of a rank and its helpers, the rank itself: who beats, or else the head of the family.
        heads_first = sorted(theirs, key=lambda process: process.parent in family)
        own, told = heads_first[0], None
        for process in heads_first:
            if (told := _record(process.pid)) is not None:
                own = process
                break
        silent = {"pid": own.pid, "phase": None, "count": 0, "iteration": None, "slow": True, "longest": 0.0}
        found.append({**(told or silent), "rank": rank, "state": own.state, "beats": told is not None})
    return found


def stacks(alive: Iterable[Process], patience: float = 3.0) -> dict[str, list[list[Any]]]:
    """Ask the ranks among a job's processes where they are.

    Returns:
        By rank, the frames of its main thread, the innermost first: file, line, function, and the line's text. A rank
        that is stopped, or waits in the kernel for a disk, does not answer and is not there.
    """
    asked = {}
    for told in beats(alive):
        path = _open_file(told["pid"], STACK_FILE)
        if told["beats"] and path is not None:
            with contextlib.suppress(OSError):
                asked[told["rank"]] = (path, os.stat(path).st_size, told["main"])
                os.kill(told["pid"], ASK)
    found: dict[str, list[list[Any]]] = {}
    sizes: dict[str, int] = {}
    deadline = time.monotonic() + patience
    while len(found) < len(asked) and time.monotonic() < deadline:
        time.sleep(0.2)
        for rank, (path, before, main) in asked.items():
            with contextlib.suppress(OSError):
                size = os.stat(path).st_size
                if rank not in found and size > before and sizes.get(rank) == size:  # and it has stopped growing
                    with open(path, "rb") as file:
                        file.seek(before)
                        found[rank] = frames(file.read().decode(errors="replace"), main)
                sizes[rank] = size
    return found


def frames(text: str, main: int) -> list[list[Any]]:
    """Return the frames of a thread, by its identity, from what faulthandler has written."""
    found: list[list[Any]] = []
    inside = False
    for line in text.splitlines():
        if thread := _THREAD.match(line):
            inside = int(thread[1], 16) == main
        elif inside and len(found) < DEPTH and (frame := _FRAME.match(line)):
            number = int(frame[2])
            found.append([frame[1], number, frame[3], linecache.getline(frame[1], number).strip()[:120]])
    return found
