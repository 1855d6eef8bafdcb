"""run.json: what was run, with which versions and layout, and how it went; its words, its writer, its reader."""

import datetime
import importlib.metadata
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_patch.files.whole import (
    NotAsWritten,
    WriteTrouble,
    as_written,
    read_json,
    say,
    write_json,
)
from megatron_patch.version import __version__

RUN_JSON = "run.json"
METRICS_FOLDER = "transfer"
"""Name of the folder for our files, below --save or --tensorboard-dir, if --metrics-dir names no other."""
LOSS = "lm loss"
"""Megatron's name of the loss, in nats per token."""
VALIDATION, TEST = "validation", "test"
"""What is evaluated on."""
JOB = "MEGATRON_PATCH_JOB"
"""The variable that names a launch by the scripts in launch/, on every host; see `megatron_patch.hosts`."""


class Status(StrEnum):
    """How a run stands."""

    RUNNING = "running"
    """Or killed: nobody could write more."""
    FINISHED = "finished"
    STOPPED = "stopped"
    """Megatron left by itself before the end, as it does at --exit-interval."""
    DIVERGED = "diverged"
    """A loss or gradient was NaN or Inf."""
    FAILED = "failed"
    """It ended in anything else."""


_PACKAGES = ("megatron-core", "torch", "deepspeed", "transformer-engine", "numpy")


def _plain(value: Any) -> Any:
    """Return `value` if JSON can hold it, else its text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def versions() -> dict[str, str]:
    """Return the installed versions of what decides a run's numbers."""
    found = {"megatron-patch": __version__, "python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class RunRecord:
    """run.json: what was run, with which versions and layout, and how it went; rewritten as a whole at every update.

    Args:
        directory: the metrics folder.
        args: Megatron's arguments.
        layout: sizes of the parallel groups, e.g. ``{"tensor": 2}``.
        iteration: iterations completed before this start; evaluations of an earlier start up to here are kept.

    Raises:
        OSError: the file cannot be written at the start. Later that is a warning, and the next update writes it all.
    """

    def __init__(self, directory: str, args: Any, layout: Mapping[str, int], iteration: int) -> None:
        self.path = os.path.join(directory, RUN_JSON)
        self._trouble = WriteTrouble(self.path)
        self.content: dict[str, Any] = {
            "status": Status.RUNNING,
            "started": _now(),
            "command": sys.argv,
            "job": os.environ.get(JOB),
            "host": socket.gethostname(),
            "iteration": iteration,
            "train_iterations": args.train_iters,
            "final_loss": None,
            "best_loss": None,
            "train_loss": None,
            "evaluations": self._earlier_evaluations(iteration),
            "layout": dict(layout),
            "versions": versions(),
            "arguments": _plain(vars(args)),
        }
        self._summarise()
        self.write()

    def _earlier_evaluations(self, iteration: int) -> list[dict[str, Any]]:
        if iteration == 0 or not os.path.exists(self.path):
            return []
        try:
            return [e for e in read_json(self.path)["evaluations"] if e["iteration"] <= iteration and e["set"]]
        except (OSError, ValueError, KeyError, TypeError):
            say(f"WARNING: {self.path}: damaged; the evaluations before iteration {iteration} are lost")
            return []

    def trained(self, iteration: int, losses: Mapping[str, Any]) -> None:
        """Note the training losses of an iteration; in memory only."""
        self.content["iteration"] = iteration
        if losses:
            self.content["train_loss"] = {name: float(value) for name, value in losses.items()}

    def evaluated(self, iteration: int, on: str, losses: Mapping[str, float]) -> None:
        """Add one evaluation, e.g. ``on="validation"``, and write if the disk lets us."""
        entries = self.content["evaluations"]
        entries[:] = [e for e in entries if (e["iteration"], e["set"]) != (iteration, on)]
        entries.append({"iteration": iteration, "set": on, **losses})
        self._summarise()
        self._update()

    def ended(self, status: str) -> None:
        """Note how training ended, a `Status`, and write if the disk lets us."""
        self.content["status"] = status
        self._update()

    def _summarise(self) -> None:
        losses = [e[LOSS] for e in self.content["evaluations"] if e["set"] == VALIDATION and LOSS in e]
        if losses:
            self.content["final_loss"] = losses[-1]
            self.content["best_loss"] = min(losses)

    def _update(self) -> None:
        try:
            self.write()
        except OSError as error:
            self._trouble.begins(error, "training goes on, and the next update writes all of it")
        else:
            self._trouble.ends("nothing is missing")

    def write(self) -> None:
        """Write the file.

        Raises:
            OSError: it cannot be written.
        """
        self.content["updated"] = _now()
        write_json(self.path, self.content)


@dataclass(frozen=True)
class Evaluation:
    """The losses at one evaluation."""

    iteration: int
    on: str
    """``validation`` or ``test``."""
    losses: Mapping[str, float]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Evaluation":
        """Return an entry of the file's list."""
        losses = {key: float(value) for key, value in entry.items() if key not in ("iteration", "set")}
        return cls(int(entry["iteration"]), str(entry["set"]), losses)


@dataclass(frozen=True)
class RunJson:
    """run.json, read back; the run may be going on.

    Nothing is asked of the file but what is asked for: a property that it lacks, or has in another form, raises
    `NotAsWritten`.
    """

    path: str
    """Of the file, for messages."""
    content: Any

    @classmethod
    def read(cls, path: str) -> "RunJson":
        """Read a file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not JSON.
        """
        return cls(path, read_json(path))

    @property
    def arguments(self) -> dict[str, Any]:
        """Megatron's arguments, ours included, by attribute name."""
        with as_written():
            arguments = self.content["arguments"]
            if not isinstance(arguments, dict):
                raise NotAsWritten(f"arguments is {arguments!r}")
            return dict(arguments)

    @property
    def status(self) -> str:
        """A `Status`, if the file is of this version."""
        with as_written():
            return str(self.content["status"])

    def stands(self, *statuses: Status) -> bool:
        """Return whether it has one of these; False also if it has none."""
        return isinstance(self.content, dict) and self.content.get("status") in statuses

    @property
    def job(self) -> str | None:
        """The job id of the start that wrote it; None if it has none, or no form that is known."""
        job = self.content.get("job") if isinstance(self.content, dict) else None
        return job if isinstance(job, str) else None

    @property
    def place(self) -> str:
        """Status and iteration in words, whatever the file says of them."""
        return f"status {self.content.get('status')} at iteration {self.content.get('iteration')}"

    @property
    def seconds(self) -> float:
        """From the last start to the last time the file was written."""
        with as_written():
            start, end = (datetime.datetime.fromisoformat(self.content[key]) for key in ("started", "updated"))
            return (end - start).total_seconds()

    @property
    def iteration(self) -> int:
        """Iterations completed."""
        with as_written():
            return int(self.content["iteration"])

    @property
    def train_iterations(self) -> int | None:
        """Iterations of the whole run."""
        with as_written():
            steps = self.content["train_iterations"]
            return None if steps is None else int(steps)

    @property
    def final_loss(self) -> float | None:
        """Validation loss of the last evaluation."""
        with as_written():
            return _number(self.content["final_loss"])

    @property
    def last_train_loss(self) -> float | None:
        """Training loss last logged."""
        with as_written():
            return _number((self.content["train_loss"] or {}).get(LOSS))

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """All so far, in their order."""
        with as_written():
            return tuple(Evaluation.of(entry) for entry in self.content["evaluations"])

    @property
    def layout(self) -> dict[str, int]:
        """Sizes of the parallel groups."""
        with as_written():
            return dict(self.content["layout"])

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages."""
        with as_written():
            return dict(self.content["versions"])

    @property
    def command(self) -> tuple[str, ...]:
        """The command line."""
        with as_written():
            return tuple(self.content["command"])


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
