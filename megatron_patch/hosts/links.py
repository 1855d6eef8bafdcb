"""Ways to an agent, and what is sent over them: lines of text, to a process and back."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

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


def ssh_arguments(port: str | None) -> list[str]:
    """Return what follows ``ssh`` on the command line; the user's own settings come first, for ssh takes the first."""
    words = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    words += ["-p", port] if port else []
    return words + [word for option in SSH_OPTIONS for word in ("-o", option)]


def agent_here(job: str) -> list[str]:
    """Return the command of an agent on this machine; nobody takes the job that it watches for dead."""
    return ["env", f"{AGENT}={job}", sys.executable, "-u", "-c", BOOT]


def agent_there(job: str, host: str, ssh_port: str | None) -> list[str]:
    """Return the command of an agent on another one."""
    return ["ssh", "-T", *ssh_arguments(ssh_port), host, f"exec {shlex.join(agent_here(job))}"]


def modules() -> str:
    """Return what an agent is made of, names and texts, as the line that `BOOT` reads."""
    package = agent.__name__.rpartition(".")[0]
    parts = [
        (f"{package}.{part}", Path(agent.__file__).with_name(f"{part}.py").read_text("utf-8")) for part in agent.PARTS
    ]
    return json.dumps([(package.partition(".")[0], ""), (package, ""), *parts]) + "\n"


class Link(Protocol):
    """A way to an agent."""

    pid: int | None
    """Of the process on this machine that it goes through, if there is one."""

    def listen(self, line: Callable[[str], None], end: Callable[[str], None]) -> None:
        """Give every line that comes to `line`, and to `end`, once no more comes, why; from another thread."""

    def send(self, text: str) -> None:
        """Send lines. What cannot be sent is dropped: the end is told elsewhere."""

    def close(self) -> None:
        """Send no more: the agent ends what is left of its job, and then itself."""

    def wait(self, patience: float) -> None:
        """Wait for its end, and no longer than `patience` seconds."""


class Process:
    """The way to an agent by the input and output of a process: the agent itself, or ssh.

    Args:
        command: what starts it.
    """

    pid: int | None

    def __init__(self, command: Sequence[str]) -> None:
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
        self._writing = threading.Lock()
        self._complaints: list[str] = []
        self._complaining = threading.Thread(target=self._listen_to_complaints, daemon=True)
        self._complaining.start()
        self.send(modules())

    def listen(self, line: Callable[[str], None], end: Callable[[str], None]) -> None:
        """See `Link`."""

        def run() -> None:
            assert self._process.stdout is not None
            for text in self._process.stdout:
                if text.startswith("{"):
                    line(text)
                else:
                    self._complaints.append(text.strip())  # e.g. what a login shell prints
            code = self._process.wait()
            self._complaining.join(timeout=1)
            said = next((text for text in reversed(self._complaints) if not text.startswith("debug")), "")
            end(said or ("the connection is closed" if code in (0, 255) else f"its agent ended with code {code}"))

        threading.Thread(target=run, daemon=True).start()

    def send(self, text: str) -> None:
        """See `Link`."""
        with self._writing, contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(text)
            self._process.stdin.flush()

    def close(self) -> None:
        """See `Link`."""
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def wait(self, patience: float) -> None:
        """See `Link`."""
        try:
            self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _listen_to_complaints(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._complaints.append(line.strip())
