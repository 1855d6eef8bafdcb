"""run.json: what was run, with which versions and layout, and how it went; its words, its writer, its readers."""

import datetime
import importlib.metadata
import os
import sys
from collections.abc import Mapping
from typing import Any

from megatron_patch.files.whole import WriteTrouble, read_json, say, write_json
from megatron_patch.version import __version__

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
        self.path = os.path.join(directory, "run.json")
        self._trouble = WriteTrouble(self.path)
        self.content: dict[str, Any] = {
            "status": "running",
            "started": _now(),
            "command": sys.argv,
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
        """Note how training ended, and write if the disk lets us.

        Args:
            status: ``finished``, ``stopped`` (at --exit-interval, say), ``diverged`` or ``failed``.
        """
        self.content["status"] = status
        self._update()

    def _summarise(self) -> None:
        losses = [e["lm loss"] for e in self.content["evaluations"] if e["set"] == "validation" and "lm loss" in e]
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


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
