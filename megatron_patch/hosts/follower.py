"""One of several hosts on which a launch was started by itself: does what the first one says, and ends as it ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import IO, Any

from megatron_patch.hosts.first_error import FirstError
from megatron_patch.hosts.links import Process, agent_here
from megatron_patch.hosts.processes import JOB
from megatron_patch.hosts.several import Line


class Follower:
    """Serves the first host until it says that all is done.

    Requests go to an agent of this host, a process of its own: when this one is killed, it ends the job's processes.
    What is started is the command line of this host, never one that comes over the connection.

    Args:
        line: the way to the first host.
        command: the launcher's, for this host's ranks.
        environment: of it.
        say: prints a line.
    """

    def __init__(
        self, line: Line, command: Sequence[str], environment: Mapping[str, str], say: Callable[[str], None]
    ) -> None:
        self._line, self._command, self._environment, self._say = line, command, environment, say
        self._job = ""
        self._agent: Process | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = False

    def run(self) -> int:
        """Serve; return the exit code of the whole launch, 1 if the first host is lost."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._signalled)
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # a host that is stopped would look dead
        why = "the connection is closed"
        try:
            while (message := self._line.hear()) is not None:
                do = message.get("do")
                if do == "done":
                    self._over()
                    if message["text"]:
                        self._say(message["text"])
                    return int(message["code"])
                self._serve(str(do), message)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
        self._over()
        self._say(f"the first host is lost ({why}); nothing of the job is left on this one")
        return 1

    def _serve(self, do: str, message: dict[str, Any]) -> None:
        if do == "attempt":
            self._job = str(message["job"])
            self._agent = Process(agent_here(self._job))
            self._agent.listen(self._line.send, self._agent_ended)
        elif do == "over":
            self._over()
            self._line.tell(event="ready")
        elif do == "say":
            self._say(message["text"])
        elif do == "start":
            self._start()
            self._line.tell(id=message["id"], answer=None)
        elif self._agent:
            if do == "facts":
                message["folder"] = os.getcwd()  # paths are relative to where this host's command was started
            self._agent.send(json.dumps(message) + "\n")

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._asked or not self._agent:
            self._over()
            os._exit(128 + number)  # the first host sees it
        self._asked = True
        # In another thread: this one may be in the middle of a line.
        threading.Thread(target=lambda: self._line.tell(event="asked", signal=number), daemon=True).start()

    def _agent_ended(self, why: str) -> None:
        if self._agent:
            self._line.tell(event="lost", why=why)

    def _over(self) -> None:
        """End what is left of an attempt."""
        agent, self._agent = self._agent, None
        if agent:
            agent.close()  # it ends the job's processes, the launcher among them
            agent.wait(60)
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process = None

    def _start(self) -> None:
        """Start the command and pass on what it prints; tell the first host how it ended."""
        process = self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**self._environment, JOB: self._job},
            start_new_session=True,  # Ctrl-C is for us
            close_fds=False,
        )
        errors = FirstError([])
        streams = [
            threading.Thread(target=self._pass_on, args=(stream, to, errors), daemon=True)
            for stream, to in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        ]

        def see_to_its_end() -> None:
            for thread in streams:
                thread.start()
            code = process.wait()
            for thread in streams:
                thread.join(3)  # orphans may hold the other ends
            if code < 0:
                how = f"the deepspeed command was ended by {signal.Signals(-code).name}"
                self._line.tell(event="ended", code=128 - code, first=how, peer=None)
            else:
                first, peer = errors.own, errors.peer
                self._line.tell(event="ended", code=code, first=first and first.text, peer=peer and peer.text)

        threading.Thread(target=see_to_its_end, daemon=True).start()

    def _pass_on(self, stream: IO[bytes], to: Any, errors: FirstError) -> None:
        for text in stream:
            errors.read(text.decode(errors="replace"))
            with contextlib.suppress(OSError):
                to.buffer.write(text)
                to.buffer.flush()
