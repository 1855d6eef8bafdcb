"""One trial of a sweep: who runs it, the process that trains it, and what came out, read from its folder."""

import contextlib
import fcntl
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import LOSS, METRICS_FOLDER, RUN_JSON, VALIDATION, RunJson, Status
from megatron_patch.files.whole import NotAsWritten, read_json, write_json, write_text
from megatron_patch.runs.trial import Trial, trial_of_run
from megatron_patch.sweep.axes import PlannedTrial
from megatron_patch.sweep.file import SweepFile

GRACE_SECONDS = 10.0
"""Between the request to end and the kill."""
LOG_LINES = 5
"""Of a failed trial's log, shown."""

FINISHED, DIVERGED, FAILED, PRUNED = Status.FINISHED, Status.DIVERGED, Status.FAILED, "pruned"


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    kind: str
    """finished, diverged, failed or pruned."""
    trial: Trial | None = None
    """Its settings and loss, if it finished or diverged."""
    reason: str = ""
    """Why it failed, in one line."""

    @property
    def loss(self) -> float:
        """Final validation loss; infinite if it diverged."""
        return self.trial.loss if self.trial and math.isfinite(self.trial.loss) else math.inf


class Claim:
    """The exclusive right to run a trial: a lock that the system drops when everyone who holds it is dead.

    The training inherits it. So a sweep that was killed leaves the trial claimed as long as its training goes on.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def take(cls, output: str, name: str) -> "Claim | None":
        """Return the claim on trial `name` of the sweep in `output`; None if another process has it."""
        folder = os.path.join(output, ".locks")
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(os.path.join(folder, name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        """Give it back."""
        os.close(self.descriptor)


def run_json_path(folder: str) -> str:
    """Return the path of a trial's run.json."""
    return os.path.join(folder, METRICS_FOLDER, RUN_JSON)


def read_run_json(folder: str) -> RunJson | None:
    """Return a trial's run.json; None if there is none, or no readable one."""
    try:
        file = RunJson.read(run_json_path(folder))
    except (OSError, ValueError):
        return None
    return file if isinstance(file.content, dict) else None


def settled(folder: str) -> Outcome | None:
    """Return the outcome of a trial whose run.json says how it ended well; None if it says something else."""
    file = read_run_json(folder)
    if file is None or not file.stands(Status.FINISHED, Status.DIVERGED):
        return None
    try:
        trial = trial_of_run(file)
    except ConfigError as error:
        return Outcome(FAILED, reason=str(error))
    return Outcome(DIVERGED if trial.diverged else FINISHED, trial)


def failure(folder: str, since: float) -> Outcome | None:
    """Return the failure that a process noted in a trial's folder after the time `since`, in seconds of the epoch."""
    try:
        noted = read_json(os.path.join(folder, "failed.json"))
        recent = float(noted["time"]) >= since
        return Outcome(FAILED, reason=str(noted["reason"])) if recent else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def submitted(folder: str) -> bool:
    """Return whether a trial was handed to a queue and has not been found to be done or failed."""
    return os.path.exists(os.path.join(folder, "submitted.json")) and not os.path.exists(
        os.path.join(folder, "failed.json")
    )


def last_lines(folder: str, count: int = LOG_LINES) -> list[str]:
    """Return the last lines of a trial's log that are not empty."""
    try:
        with open(os.path.join(folder, "log.txt"), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]


def failure_kind(folder: str, outcome: Outcome) -> str:
    """Return what a failure has in common with others of its kind: its reason and its last line, without numbers.

    >>> failure_kind("nowhere", Outcome(FAILED, reason="exit code 2, no run.json"))
    'exit code #, no run.json: '
    """
    last = "".join(last_lines(folder, 1)).replace(os.path.basename(folder), "TRIAL")
    return re.sub(r"[-+]?\b\d[\d.]*(e[-+]?\d+)?\b", "#", f"{outcome.reason}: {last}")


class Attempt:
    """One attempt at a trial, from its claim to its outcome.

    Args:
        file: the sweep.
        trial: which one.
        claim: taken; the attempt gives it back.
        worker: number of the slot, from 0, for the placeholder {worker}.
    """

    def __init__(self, file: SweepFile, trial: PlannedTrial, claim: Claim, worker: int) -> None:
        self.file = file
        self.trial = trial
        self.worker = worker
        self.folder = file.folder(trial)
        self.started = time.monotonic()
        self._claim = claim
        self._process: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None
        self._alive_at = time.time()
        """Last sign of life of a submitted trial, in seconds of the epoch."""

    def start(self) -> None:
        """Replace what an earlier attempt left, write config.yaml and start the command."""
        if os.path.lexists(self.folder):
            shutil.rmtree(self.folder)
        os.makedirs(self.folder)
        write_text(os.path.join(self.folder, "config.yaml"), self.file.config_text(self.trial))
        self._port = _reserve_port()
        port: int = self._port.getsockname()[1]
        values = {"python": sys.executable, "worker": str(self.worker), "port": str(port)}
        words = self.file.words(self.trial, values)
        variables = self.file.variables(self.trial, values)
        if self.file.wait == RUN_JSON:
            write_json(os.path.join(self.folder, "submitted.json"), {"time": time.time()})
        with open(os.path.join(self.folder, "log.txt"), "wb") as log:
            shown = [*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(words)]
            log.write(f"+ {' '.join(shown)}\n".encode())
            log.flush()
            try:
                self._process = subprocess.Popen(
                    words,
                    env=os.environ | variables,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a group of its own, which can be ended as a whole
                    pass_fds=(self._claim.descriptor,) if self.file.wait == "command" else (),
                )
            except OSError as error:
                raise ConfigError("command", words[0], "a program that can be started", str(error.strerror)) from None

    def rejoin(self) -> None:
        """Wait for a trial that was submitted earlier instead of submitting it again."""
        self._alive_at = os.stat(os.path.join(self.folder, "submitted.json")).st_mtime

    def poll(self) -> Outcome | None:
        """Return the outcome, noted in the folder if it is a failure; None while the trial goes on."""
        outcome = self._poll_process() if self._process else self._poll_submitted()
        if outcome and outcome.kind == FAILED:
            write_json(os.path.join(self.folder, "failed.json"), {"time": time.time(), "reason": outcome.reason})
        return outcome

    def _poll_process(self) -> Outcome | None:
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return None
        if self.file.wait == RUN_JSON and code == 0:
            self._process = None
            return self._poll_submitted()
        self._kill_group()
        return settled(self.folder) or Outcome(FAILED, reason=self._reason(code))

    def _reason(self, code: int) -> str:
        ended = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        file = read_run_json(self.folder)
        return f"{ended}, {file.place if file else 'no run.json'}"

    def _poll_submitted(self) -> Outcome | None:
        outcome = settled(self.folder)
        if outcome:
            return outcome
        file = read_run_json(self.folder)
        if file and file.stands(Status.FAILED, Status.STOPPED):
            return Outcome(FAILED, reason=file.place)
        with contextlib.suppress(OSError):
            self._alive_at = max(self._alive_at, os.stat(run_json_path(self.folder)).st_mtime)
        if time.time() - self._alive_at > self.file.timeout:
            what = "run.json did not change" if file else "no run.json"
            return Outcome(FAILED, reason=f"{what} for {self.file.timeout:g} s (timeout)")
        return None

    def evaluations(self) -> list[tuple[int, float]]:
        """Return (iteration, validation loss) of every evaluation so far."""
        file = read_run_json(self.folder)
        try:
            evaluations = file.evaluations if file else ()
        except NotAsWritten:
            return []
        return [(e.iteration, e.losses[LOSS]) for e in evaluations if e.on == VALIDATION and LOSS in e.losses]

    @property
    def seconds(self) -> float:
        """Time since the attempt began."""
        return time.monotonic() - self.started

    def ask_to_end(self) -> None:
        """Send SIGTERM to every process of a run that was started here; a submission may finish."""
        if self._process and self._process.poll() is None and self.file.wait == "command":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)

    def end(self, deadline: float) -> None:
        """Wait for the training until `deadline` (`time.monotonic`), then kill what is left of it."""
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, deadline - time.monotonic()))
            self._kill_group()
            self._process.wait()

    def _kill_group(self) -> None:
        """Ranks and data loaders can outlive the process that started them."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def remove(self) -> None:
        """Delete the folder of an attempt that was ended, unless its training is a queue's and goes on."""
        if self.file.wait == "command":
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Give claim and port back."""
        self._claim.release()
        if self._port is not None:
            self._port.close()


def _reserve_port() -> socket.socket:
    """Return a socket that keeps a free port for one trial, until it is closed.

    A port that is only looked for and let go may be given to another process before the trial's launcher binds it.
    Bound with SO_REUSEADDR and never listening, the socket keeps the system from giving the port to anybody who asks
    for any, and lets those listen there who name it with SO_REUSEADDR, as torch's store does.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))
    return reserved


def shown_command(file: SweepFile, trial: PlannedTrial) -> str:
    """Return the command of a trial as one types it; what is known only at its start stays a placeholder."""
    values: Mapping[str, str] = {"python": sys.executable, "worker": "{worker}", "port": "{port}"}
    variables = [f"{name}={shlex.quote(value)}" for name, value in file.variables(trial, values).items()]
    return " ".join([*variables, shlex.join(file.words(trial, values))])
