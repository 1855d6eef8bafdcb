"""What watches a host from inside while a job runs on it, and ends the job's processes when nobody else can.

The launching side sends the text of this module and of the others in `PARTS` over ssh: they import nothing but the
standard library and each other, and a host needs no copy of this package. It speaks JSON, one object a line: a request
``{"id": 1, "do": "alive"}`` gets ``{"id": 1, "answer": ...}``; what it notices by itself is ``{"event": ...}``. When
its input ends, or is silent for `SILENCE` seconds, the launching side is dead or cut off: then it ends the job here,
and nobody has to come and look for orphans.
"""

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from megatron_patch.hosts.facts import existing, facts
from megatron_patch.hosts.heartbeat import beats, stacks
from megatron_patch.hosts.processes import Watch, end, processes, watched
from megatron_patch.hosts.save_lock import BEAT, Lock

PARTS = ("processes", "heartbeat", "save_lock", "same", "facts", "agent")
"""The modules that are sent, each after those that it imports."""
SILENCE = 60.0
"""Seconds without a word from the launching side after which it counts as lost; it speaks every few seconds."""


class Agent:
    """Answers requests and keeps watch until its input ends."""

    def __init__(self) -> None:
        self._watch: Watch | None = None
        self._lock: Lock | None = None
        self._job: str | None = None
        self._speaking = threading.Lock()
        self._heard = time.monotonic()
        self._gone: queue.Queue[bool] = queue.Queue()
        self._silence = SILENCE
        self._ending = False

    def do_alive(self) -> dict[str, int]:
        """How many processes of the job there are."""
        alive = processes(self._job) if self._job else []
        launchers = sum(not process.rank for process in alive)
        return {"launchers": launchers, "others": len(alive) - launchers}

    def do_beats(self) -> list[dict[str, Any]]:
        """Where the job's ranks are."""
        return beats(processes(self._job)) if self._job else []

    def do_stacks(self) -> dict[str, list[list[Any]]]:
        """What the job's ranks are doing, by rank: the frames of their main threads."""
        return stacks(processes(self._job)) if self._job else {}

    def do_watched(self, job: str) -> bool:
        """Whether another agent watches a job here."""
        return watched(job)

    def do_watch(self, job: str, silence: float = SILENCE) -> None:
        """Begin to watch a job; from now on its processes do not outlive this one."""
        self._job, self._silence, self._watch = job, silence, Watch(job, self.tell)

    def do_end(self, job: str, patience: float) -> dict[str, Any]:
        """End a job."""
        self._ending = self._ending or job == self._job
        return end(job, patience)

    def do_lock(self, save: str, record: dict[str, Any], over: str | None = None) -> dict[str, Any]:
        """Take the lock in --save."""
        lock = Lock(save, record)
        answer = lock.take(over)
        if lock.held:
            self._lock = lock
        return answer

    def do_write(self, path: str, text: str) -> None:
        """Write a small file, which the other hosts look for."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    def do_read(self, path: str, patience: float = 0) -> str | None:
        """Return the text of a small file; None if it is not there, also after so many seconds."""
        deadline = time.monotonic() + patience
        while True:
            with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
                return file.read()
            if time.monotonic() > deadline:
                return None
            time.sleep(0.2)

    def do_remove(self, path: str) -> None:
        """Remove a file."""
        os.remove(path)

    def do_logs(self, folder: str, since: float) -> list[list[str]]:
        """Return the end of each log file that DeepSpeed keeps of this host's ranks: rank and text."""
        found = []
        ranks = self._watch.ranks if self._watch else set()
        for name in sorted(os.listdir(folder)):
            rank = name.removesuffix(".log").rpartition("_rank")[2]
            path = os.path.join(folder, name)
            if rank in ranks and os.path.getmtime(path) >= since:
                with open(path, "rb") as file:
                    file.seek(max(0, os.path.getsize(path) - 65536))
                    found.append([rank, file.read().decode(errors="replace")])
        return found

    def do_room(self, path: str) -> int:
        """Bytes that may be written where a path is."""
        room = os.statvfs(existing(path))
        return room.f_bavail * room.f_frsize

    def do_facts(self, **asked: Any) -> dict[str, Any]:
        """What hosts are compared by."""
        return facts(**asked)

    def do_ping(self) -> None:
        """Nothing; it was heard."""

    def tell(self, event: str, **particulars: Any) -> None:
        """Say what was noticed."""
        self._say({"event": event, **particulars})

    def _say(self, message: dict[str, Any]) -> None:
        with self._speaking, contextlib.suppress(OSError, ValueError):
            print(json.dumps(message), flush=True)

    def _answer(self, request: dict[str, Any]) -> None:
        number, do = request.pop("id"), request.pop("do")
        try:
            self._say({"id": number, "answer": getattr(self, f"do_{do}")(**request)})
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            self._say({"id": number, "error": f"{where}{error.strerror or error}"})
        except Exception as error:
            self._say({"id": number, "error": repr(error)})

    def _listen(self, lines: Iterator[str]) -> None:
        with contextlib.suppress(OSError):
            for line in lines:
                self._heard = time.monotonic()
                # In threads: an answer that takes its time holds up nothing.
                threading.Thread(target=self._answer, args=(json.loads(line),), daemon=True).start()
        self._gone.put(True)

    def run(self, lines: Iterator[str]) -> None:
        """Serve until the input ends or falls silent; then end what is left of the job, and give the lock back."""
        threading.Thread(target=self._listen, args=(lines,), daemon=True).start()
        beaten = 0.0
        while time.monotonic() - self._heard < self._silence:
            with contextlib.suppress(queue.Empty):
                self._gone.get(timeout=0.5)
                break
            if self._watch and not self._ending:
                self._watch.look()
            if self._lock and time.monotonic() - beaten > BEAT:
                beaten = time.monotonic()
                self._lock.beat()
        if self._job:
            end(self._job, 5)
        if self._lock:
            self._lock.leave()
        os._exit(0)  # threads may be waiting on a disk that is away


def main() -> None:
    """Be an agent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the end of the input says when to go
    Agent().run(iter(sys.stdin.readline, ""))
