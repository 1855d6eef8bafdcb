"""Agents on hosts, from the launching side: on all hosts at once, asked, listened to."""

import json
import queue
import resource
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

from megatron_patch.hosts.links import Link, Process, agent_here, agent_there

ANSWER = 120.0
"""Seconds in which an agent answers; only a host in great trouble takes that long."""
PING = 5.0


class Lost(Exception):
    """A host does not answer; the text says why."""


@dataclass(frozen=True)
class Event:
    """Something that an agent noticed; ``lost`` if it is the agent that is gone."""

    host: str
    name: str
    particulars: Mapping[str, Any]


class Remote:
    """The agent of one host.

    Args:
        host: as in the hostfile.
        link: the way to it.
        events: gets what the agent notices.
    """

    def __init__(self, host: str, link: Link, events: "queue.Queue[Any]") -> None:
        self.host = host
        self._link, self._events = link, events
        self._answers: dict[int, Future[Any]] = {}
        self._number = 0
        self._asking = threading.Lock()
        self.lost: str | None = None
        """Why it is gone; None while it is there."""
        self.pid = link.pid
        """Of ssh, or of a local agent."""
        link.listen(self._hear, self._end)

    def ask(self, do: str, **arguments: Any) -> "Future[Any]":
        """Send a request; the answer is of `answer`."""
        answer: Future[Any] = Future()
        with self._asking:
            self._number += 1
            number = self._number
            self._answers[number] = answer
        if self.lost:
            answer.set_exception(Lost(self.lost))
        else:
            self._link.send(json.dumps({"id": number, "do": do, **arguments}) + "\n")
        return answer

    def answer(self, asked: "Future[Any]", within: float = ANSWER) -> Any:
        """Wait for an answer.

        Raises:
            Lost: the host is gone, or does not answer.
            OSError: what was asked for could not be done there.
        """
        try:
            return asked.result(timeout=within)
        except FutureTimeout:
            raise Lost(f"no answer in {within:.0f} s") from None

    def close(self) -> None:
        """Let the agent go: it ends what is left of its job."""
        self._link.close()

    def wait(self, patience: float) -> None:
        """Wait for its end, and no longer than `patience` seconds."""
        self._link.wait(patience)

    def _hear(self, line: str) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            return
        if "event" in message:
            self._events.put(Event(self.host, message.pop("event"), message))
        elif answer := self._answers.pop(message["id"], None):
            if "error" in message:
                answer.set_exception(OSError(message["error"]))
            else:
                answer.set_result(message["answer"])

    def _end(self, why: str) -> None:
        self.lost = why
        for answer in list(self._answers.values()):
            if not answer.done():
                answer.set_exception(Lost(why))
        self._events.put(Event(self.host, "lost", {"why": why}))


class Hosts:
    """The agents of all hosts of a job.

    Args:
        names: as in the hostfile.
        ssh_port: of sshd there; None: as ssh itself thinks.
        job: that they will watch; nobody takes an agent's job for dead.
        local: start the agents without ssh, on this machine.
    """

    def __init__(self, names: Sequence[str], ssh_port: str | None = None, job: str = "", local: bool = False) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Three pipes a host, and often 1,024 files are allowed.
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.events: queue.Queue[Any] = queue.Queue()
        self.remotes: dict[str, Remote] = {}
        self._pinging = threading.Thread(target=self._ping, daemon=True)
        self._closed = threading.Event()
        for name in names:
            self.add(name, Process(agent_here(job) if local else agent_there(job, name, ssh_port)))
        self._pinging.start()

    def add(self, name: str, link: Link) -> None:
        """Take in a host, by a way to its agent."""
        self.remotes = {**self.remotes, name: Remote(name, link, self.events)}  # others are iterating over the old one

    @property
    def first(self) -> Remote:
        """The host of rank 0."""
        return next(iter(self.remotes.values()))

    def ask(self, do: str, *, within: float = ANSWER, **arguments: Any) -> dict[str, Any]:
        """Ask all hosts at once; return the answers by host, a `Lost` or `OSError` where there is none in time."""
        remotes = self.remotes
        asked = {name: remote.ask(do, **arguments) for name, remote in remotes.items()}
        deadline = time.monotonic() + within
        answers: dict[str, Any] = {}
        for name, answer in asked.items():
            try:
                answers[name] = remotes[name].answer(answer, max(0.1, deadline - time.monotonic()))
            except (Lost, OSError) as error:
                answers[name] = error
        return answers

    def close(self) -> None:
        """Let all agents go, and wait a little for their end."""
        self._closed.set()
        for remote in self.remotes.values():
            remote.close()
        for remote in self.remotes.values():
            remote.wait(0.5 if remote.lost else 10)

    def _ping(self) -> None:
        while not self._closed.wait(PING):
            for remote in self.remotes.values():
                if not remote.lost:
                    remote.ask("ping")
