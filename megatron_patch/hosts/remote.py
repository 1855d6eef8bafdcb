"""Agents on hosts, from the launching side: started over ssh on all hosts at once, asked, listened to."""

import contextlib
import json
import os
import queue
import resource
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.hosts import agent
from megatron_patch.hosts.processes import AGENT

SSH_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=10", "ServerAliveCountMax=3")
"""For every ssh of a job, pdsh's too: a host that cannot be reached is told after 10 s, one that is lost after 40."""
BOOT = """\
import json, sys, types
for name, text in json.loads(sys.stdin.readline()):
    sys.modules[name] = module = types.ModuleType(name)
    module.__path__ = []
    exec(compile(text, name, "exec"), vars(module))
sys.modules["megatron_patch.hosts.agent"].main()
"""
"""Makes modules of the texts that come first, and an agent of the last."""
ANSWER = 120.0
"""Seconds in which an agent answers; only a host in great trouble takes that long."""
PING = 5.0


def ssh_arguments(port: str | None) -> list[str]:
    """Return what follows ``ssh`` on the command line; the user's own settings come first, for ssh takes the first."""
    words = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    words += ["-p", port] if port else []
    return words + [word for option in SSH_OPTIONS for word in ("-o", option)]


def _modules() -> list[tuple[str, str]]:
    """Return what an agent is made of: names and texts."""
    package = agent.__name__.rpartition(".")[0]
    parts = [
        (f"{package}.{part}", Path(agent.__file__).with_name(f"{part}.py").read_text("utf-8")) for part in agent.PARTS
    ]
    return [(package.partition(".")[0], ""), (package, ""), *parts]


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
        command: what starts a Python there, e.g. over ssh.
        events: gets what the agent notices.
    """

    def __init__(self, host: str, command: Sequence[str], events: "queue.Queue[Any]") -> None:
        self.host = host
        self._events = events
        self._answers: dict[int, Future[Any]] = {}
        self._number = 0
        self._writing = threading.Lock()
        self._complaints: list[str] = []
        self.lost: str | None = None
        """Why it is gone; None while it is there."""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,  # Ctrl-C is for the launching side, which then asks for the end
        )
        self.pid = self._process.pid
        """Of ssh, or of a local agent."""
        self._write(f"{json.dumps(_modules())}\n")
        self._complaining = threading.Thread(target=self._listen_to_complaints, daemon=True)
        self._complaining.start()
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, do: str, **arguments: Any) -> "Future[Any]":
        """Send a request; the answer is of `answer`."""
        answer: Future[Any] = Future()
        with self._writing:
            self._number += 1
            number = self._number
            self._answers[number] = answer
        if self.lost:
            answer.set_exception(Lost(self.lost))
        else:
            self._write(json.dumps({"id": number, "do": do, **arguments}) + "\n")
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
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def wait(self, patience: float) -> None:
        """Wait for its end, and no longer than `patience` seconds."""
        try:
            self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _write(self, text: str) -> None:
        with self._writing, contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(text)
            self._process.stdin.flush()

    def _listen_to_complaints(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._complaints.append(line.strip())

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                message = json.loads(line)
                if not isinstance(message, dict):
                    raise ValueError("no object")
            except ValueError:
                self._complaints.append(line.strip())  # e.g. what a login shell prints
                continue
            if "event" in message:
                self._events.put(Event(self.host, message.pop("event"), message))
            elif answer := self._answers.pop(message["id"], None):
                if "error" in message:
                    answer.set_exception(OSError(message["error"]))
                else:
                    answer.set_result(message["answer"])
        code = self._process.wait()
        self._complaining.join(timeout=1)
        said = next((line for line in reversed(self._complaints) if not line.startswith("debug")), "")
        self.lost = said or ("the connection is closed" if code in (0, 255) else f"its agent ended with code {code}")
        for answer in list(self._answers.values()):
            if not answer.done():
                answer.set_exception(Lost(self.lost))
        self._events.put(Event(self.host, "lost", {"why": self.lost}))


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
        here = ["env", f"{AGENT}={job}", sys.executable, "-u", "-c", BOOT]
        over = ["ssh", "-T", *ssh_arguments(ssh_port)]
        there = shlex.join(here)
        self.remotes = {
            name: Remote(name, here if local else [*over, name, f"exec {there}"], self.events) for name in names
        }
        self._pinging = threading.Thread(target=self._ping, daemon=True)
        self._closed = threading.Event()
        self._pinging.start()

    @property
    def first(self) -> Remote:
        """The host of rank 0."""
        return next(iter(self.remotes.values()))

    def ask(self, do: str, *, within: float = ANSWER, **arguments: Any) -> dict[str, Any]:
        """Ask all hosts at once; return the answers by host, a `Lost` or `OSError` where there is none in time."""
        asked = {name: remote.ask(do, **arguments) for name, remote in self.remotes.items()}
        deadline = time.monotonic() + within
        answers: dict[str, Any] = {}
        for name, answer in asked.items():
            try:
                answers[name] = self.remotes[name].answer(answer, max(0.1, deadline - time.monotonic()))
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
