"""One launch on several hosts, from its start to a verdict that can be believed."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

from megatron_patch.errors import ExitCode
from megatron_patch.files.run_json import JOB, RUN_JSON, RunJson, Status
from megatron_patch.hosts.children import adopt_orphans, end_children
from megatron_patch.hosts.first_error import Finding, FirstError
from megatron_patch.hosts.hang import Allowed, Pulse
from megatron_patch.hosts.remote import Event, Hosts, Lost

GRACE = 10.0
"""Seconds for the ranks to say what they have to say, after one host has failed."""
REST = 10.0
"""Seconds for processes of the ranks to end after an orderly end of the launcher."""
PATIENCE = 5.0
"""Seconds between SIGTERM and SIGKILL where a run has failed."""
PATIENCE_ASKED = 30.0
"""The same where a user or a scheduler ends the run: Megatron may be saving."""
ROOM = 64 * 2**20
"""Bytes; a disk with less is told as full where a run has failed."""
CLOCKS = 30.0
"""Seconds by which the clocks of hosts may differ unseen."""


@dataclass(frozen=True)
class Job:
    """What is started."""

    id: str
    hosts: tuple[str, ...]
    """As in the hostfile; the first has rank 0."""
    save: str | None
    """--save, absolute."""
    metrics: str | None
    """The folder of run.json, absolute; None if the run writes none."""
    log_dir: str | None
    """Where DeepSpeed writes a log per rank, absolute, with %h for the host; None if they print."""
    allowed: Allowed
    """How long nothing may go on."""


@dataclass(frozen=True)
class _Line:
    """What the launcher printed; the last one of a stream is empty."""

    to: Any
    text: bytes


class Launch:
    """Runs a launcher's command and watches all hosts meanwhile.

    Args:
        job: what is started.
        hosts: where, with their agents.
        name: before what is said, e.g. that of the script.
        elsewhere: hosts that start their own part of the job, by the same command.
    """

    def __init__(self, job: Job, hosts: Hosts, name: str, elsewhere: Sequence[str] = ()) -> None:
        self._job, self._hosts, self._name = job, hosts, name
        self._errors = FirstError(list(job.hosts))
        self._alone = job.hosts[0] if len(job.hosts) == 1 or elsewhere else ""
        self._elsewhere = set(elsewhere)
        self.last = ""
        """What was said last."""
        self._signal: int | None = None
        self._signals = 0
        self._stop_at: float | None = None
        self._streams = 0
        self._ending = False
        self._deaf = False

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run the command to its end, end everything of the job on all hosts, and return the exit code.

        0 only if the command said so, no launcher is left on any host and this start's run.json, where there is one,
        tells of an orderly end.
        """
        with self._listening_to_signals():
            self._hosts.ask("watch", job=self._job.id)
            began = time.time()
            if self._signal is None:
                pulse = Pulse(self._hosts, self._job.allowed)
                pulse.start()
                code = self._follow(command, environment)
                pulse.stop()
            else:
                code = None
            alive = self._alive()
            launchers = sum(entry["launchers"] for entry in alive.values())
            if code == 0 and launchers and not self._failed:
                there = next(host for host, entry in alive.items() if entry["launchers"])
                self._errors.certainly(Finding(there, "deepspeed or pdsh was killed, and what it had started was not"))
            if code == 0 and not self._failed:
                self._wait_for_the_rest()
            left = self._end_everywhere()
            if code != 0 or self._failed:
                self._read_logs(began)
            return self._verdict(code, left)

    @property
    def _failed(self) -> bool:
        return bool(self._errors.certain or self._errors.failed or self._signal)

    def say(self, text: str) -> None:
        """Print one line to stderr."""
        self.last = text
        with contextlib.suppress(OSError):
            print(f"{self._name}: {text}", file=sys.stderr, flush=True)

    # --- while it runs ---

    def _follow(self, command: Sequence[str], environment: Mapping[str, str]) -> int | None:
        """Start the command and pass on what it prints, until it ends or something is found that must end it."""
        if JOB not in environment:
            # pdsh's ssh have no job id. Where all have one, a dead one that stayed with us would keep others waiting.
            adopt_orphans()
        # In a group of its own: Ctrl-C is for us, and DeepSpeed's own answer to it, pkill by name, hits other jobs.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
            start_new_session=True,
            # What was handed to us stays open in the ranks: a sweep's claim on its trial is such a file.
            close_fds=False,
        )
        for stream, to in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            assert stream is not None
            self._streams += 1
            threading.Thread(target=self._read, args=(stream, to), daemon=True).start()
        for host in self._elsewhere:
            self._hosts.remotes[host].ask("start")
        while (process.poll() is None or self._elsewhere) and not self._over():
            self._take(0.5)
            if process.returncode:
                self._stop_within(GRACE)
        code = process.poll()
        if code is not None and code < 0:
            how = signal.Signals(-code).name
            self._errors.certainly(Finding("", f"the deepspeed command on the launching side was ended by {how}"))
        deadline = time.monotonic() + 3  # orphans may hold the other ends of the streams
        while self._streams and code is not None and time.monotonic() < deadline:
            self._take(0.2)
        return code

    def _over(self) -> bool:
        return self._signal is not None or (self._stop_at is not None and time.monotonic() > self._stop_at)

    def _read(self, stream: IO[bytes], to: Any) -> None:
        for text in stream:
            self._hosts.events.put(_Line(to, text))
        self._hosts.events.put(_Line(to, b""))

    def _take(self, patience: float) -> None:
        """Wait for something to happen and take it in."""
        try:
            happened = self._hosts.events.get(timeout=patience)
        except queue.Empty:
            return
        if isinstance(happened, _Line):
            self._printed(happened)
        elif isinstance(happened, Event):
            self._noticed(happened)

    def _printed(self, line: _Line) -> None:
        if not line.text:
            self._streams -= 1
            return
        self._errors.read(line.text.decode(errors="replace"), self._alone)
        if self._errors.failed:
            self._stop_within(GRACE)
        if self._deaf:
            return
        try:
            line.to.buffer.write(line.text)
            line.to.buffer.flush()
        except OSError:
            self._deaf = True
            self._fault(Finding("", "nobody reads the output any more (broken pipe)"), 0)

    def _noticed(self, event: Event) -> None:
        host, particulars = event.host, event.particulars
        if event.name == "lost":
            self._elsewhere.discard(host)
            self._fault(Finding(host, f"lost: {particulars['why']}"), 2)
        elif event.name == "orphans":
            ranks = ", ".join(particulars["ranks"]) or "none"
            self._fault(
                Finding(host, f"its launcher (deepspeed.launcher.launch) has ended and left processes of rank {ranks}"),
                GRACE,
                # the launcher of a killed rank ends in the same way, and then says which signal it was
                peer=bool(self._errors.first),
            )
        elif event.name == "ended":
            self._ended(host, particulars)
        elif event.name == "asked":
            self._signal = self._signal or particulars["signal"]
        elif event.name == "hung":
            for line in particulars["lines"]:
                self.say(line)
            self._fault(Finding(host, particulars["text"]), 0)
        elif event.name == "stopped":
            at = time.strftime("%H:%M:%S")
            text = f"process {particulars['pid']} of rank {particulars['rank'] or '-'} is stopped (SIGSTOP) since {at}"
            self.say(f"{host}: {text}; the others wait for it")
            self._errors.told(Finding(host, text))
        elif event.name == "goes_on":
            self.say(f"{host}: process {particulars['pid']} goes on")
            self._errors.forget(host)

    def _ended(self, host: str, particulars: Mapping[str, Any]) -> None:
        """The command of a host that starts its own part has ended."""
        self._elsewhere.discard(host)
        if not particulars["code"] or self._ending:
            return
        for text, peer in ((particulars["first"], False), (particulars["peer"], True)):
            if text:
                self._errors.certainly(Finding(host, text), peer=peer)
        self._errors.failed.append((host, particulars["code"]))
        self._stop_within(GRACE)

    def _fault(self, finding: Finding, grace: float, peer: bool = False) -> None:
        self._errors.certainly(finding, peer=peer)
        self.say(str(finding))
        self._stop_within(grace)

    def _stop_within(self, grace: float) -> None:
        at = time.monotonic() + grace
        self._stop_at = at if self._stop_at is None else min(self._stop_at, at)

    @contextlib.contextmanager
    def _listening_to_signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self._signals += 1
            self._signal = self._signal or number
            self._hosts.events.put(None)  # wakes who waits

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, note) for number in numbers}
        # A launching side that is stopped would look dead to the hosts.
        before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- the end ---

    def _wait_for_the_rest(self) -> None:
        """After an orderly end nothing is left, once what is about to end has ended."""
        deadline = time.monotonic() + REST
        while not self._failed and (alive := [(h, e["others"]) for h, e in self._alive().items() if e["others"]]):
            if time.monotonic() > deadline:
                host, number = alive[0]
                self._errors.certainly(Finding(host, f"{number} processes outlived the launcher; was it killed?"))
            self._take(0.5)

    def _alive(self) -> dict[str, dict[str, int]]:
        answers = self._hosts.ask("alive")
        return {host: answer for host, answer in answers.items() if isinstance(answer, dict)}

    def _end_everywhere(self) -> list[str]:
        """End what is left of the job; return, in words, what could not be ended."""
        self._ending = True
        patience = PATIENCE_ASKED if self._signal else PATIENCE
        answers = self._ask_end(patience)
        end_children(keep={remote.pid for remote in self._hosts.remotes.values() if remote.pid})
        answers |= {host: again for host, again in self._ask_end(0).items() if isinstance(again, dict)}
        left = []
        for host, answer in answers.items():
            if not isinstance(answer, dict):
                left.append(f"{host} cannot be reached, its processes end by themselves within 70 s")
            elif answer["left"]:
                left.append(f"{host} has processes that cannot be ended: {' '.join(map(str, answer['left']))}")
        return left

    def _ask_end(self, patience: float) -> dict[str, Any]:
        """Ask all hosts to end the job, passing on meanwhile what it prints; a second signal ends it at once."""
        pool = ThreadPoolExecutor(max_workers=1)
        asked = pool.submit(self._hosts.ask, "end", within=patience + 30, job=self._job.id, patience=patience)
        signals = self._signals
        while not asked.done():
            self._take(0.2)
            if self._signals > signals:
                signals = self._signals
                for remote in self._hosts.remotes.values():
                    remote.ask("end", job=self._job.id, patience=0)
        while not self._hosts.events.empty():
            self._take(0)
        return asked.result()

    def _read_logs(self, began: float) -> None:
        """With a log file per rank, errors are in them."""
        if self._job.log_dir is None:
            return
        asked = {
            remote: remote.ask("logs", folder=self._job.log_dir.replace("%h", host), since=began - CLOCKS)
            for host, remote in self._hosts.remotes.items()
        }
        for remote, waiting in asked.items():
            host, answer = remote.host, []
            with contextlib.suppress(Lost, OSError):
                answer = remote.answer(waiting)
            for rank, text in answer:
                for line in text.splitlines():
                    self._errors.read(line if line.startswith("[rank") else f"[rank{rank}]: {line}", host)

    def _verdict(self, code: int | None, left: Sequence[str]) -> int:
        """Say in one line how it ended, and return the exit code."""
        also = "".join(f"; {text}" for text in left)
        if self._signal is not None:
            self.say(
                f"ended by {signal.Signals(self._signal).name}{also or '; nothing of the job is left on any host'}"
            )
            return 128 + self._signal
        if code == 0 and not self._failed:
            record = self._record()
            if isinstance(record, Finding):
                self._errors.certainly(record)
            elif record:
                self.say(record)
        if code == 0 and not self._failed:
            return ExitCode.DONE
        failed = [entry for _, entry in self._errors.failed if 0 < entry < 255]
        code = code or max(failed, default=1)
        code = 128 - code if code < 0 else code
        first = self._errors.first
        if first is None and self._errors.failed:
            host, number = self._errors.failed[0]
            first = Finding(host, f"its command ended with exit code {number}")
        if self._job.save:
            also += full(self._hosts, self._job.save)
        self.say(f"failed, exit code {code}: {first or 'the launcher gave no reason; see what was printed'}{also}")
        return code

    def record(self) -> tuple[str, RunJson] | None:
        """Return this start's run.json, and a host that sees it; None if there is none."""
        if self._job.metrics is None:
            return None
        path = os.path.join(self._job.metrics, RUN_JSON)
        for host, text in self._hosts.ask("read", path=path).items():
            if not isinstance(text, str):
                continue
            try:
                record = RunJson(path, json.loads(text))
            except ValueError:
                continue
            if record.job == self._job.id:
                return host, record
        return None

    def _record(self) -> Finding | str | None:
        """What run.json says of this start: what is wrong with it, or what is worth telling."""
        if self._job.metrics is None:
            return None
        found = self.record()
        if found is None:
            path = os.path.join(self._job.metrics, RUN_JSON)
            return Finding("", f"{path} is not of this start, though every rank left with exit code 0")
        host, record = found
        if record.stands(Status.FINISHED):
            return None
        if record.stands(Status.STOPPED):
            return f"Megatron left by itself before the end: {record.path}: {record.place}"
        return Finding(host, f"{record.path}: {record.place}, though every rank left with exit code 0")


def full(hosts: Hosts, save: str) -> str:
    """Return, in words to be appended, that a host has no room at --save: Megatron's own message does not say so."""
    room = hosts.ask("room", path=save)
    found = {host: left for host, left in room.items() if isinstance(left, int) and left < ROOM}
    return "".join(f"; {host} has {left / 2**20:.0f} MiB free at --save {save}" for host, left in found.items())
