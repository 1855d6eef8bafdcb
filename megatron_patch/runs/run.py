"""What a run left behind, read back: run.json, hyperparameters.json, what was measured, TensorBoard.

Everything but run.json may be missing; `Run.notes` says what was, and what was left out on the way. Files of a run that
is still going on can be read at any time.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_patch.config import Settings
from megatron_patch.errors import ConfigError
from megatron_patch.files.hyperparameters_json import HYPERPARAMETERS_JSON, HyperparameterTable
from megatron_patch.files.lines import AlignmentLine, EquilibriumLine, SublayerLine, read_lines
from megatron_patch.files.run_json import LOSS, METRICS_FOLDER, RUN_JSON, VALIDATION, Evaluation, RunJson, Status
from megatron_patch.files.whole import NotAsWritten, as_written
from megatron_patch.runs.tensorboard import Series, read_events, tensorboard_files


@dataclass(frozen=True)
class Run:
    """One training run."""

    name: str
    """Short, and unique among the runs that were read together."""
    folder: str
    """The metrics folder, the one with run.json."""
    file: RunJson = field(repr=False, compare=False)
    """What it was read from."""
    status: str
    seconds: float
    """From the last start to the last time run.json was written."""
    iteration: int
    train_iterations: int | None
    final_loss: float | None
    """Validation loss of the last evaluation."""
    last_train_loss: float | None
    evaluations: tuple[Evaluation, ...]
    layout: Mapping[str, int]
    versions: Mapping[str, str]
    arguments: Mapping[str, Any]
    command: tuple[str, ...]
    hyperparameters: HyperparameterTable | None
    alignment: tuple[AlignmentLine, ...]
    equilibrium: tuple[EquilibriumLine, ...]
    sublayers: tuple[SublayerLine, ...]
    series: Mapping[str, Series]
    """What TensorBoard holds, by tag."""
    notes: tuple[str, ...]
    """What a reader of the numbers should know: missing or unfinished files."""

    @cached_property
    def settings(self) -> Settings:
        """What our flags were."""
        return Settings.of(self.arguments)

    @property
    def rule(self) -> str:
        """The width-scaling rule."""
        return self.settings.width.rule

    @property
    def m(self) -> float:
        """Width over the width of the base model; 1 without a base."""
        base = self.settings.width.base_hidden_size
        return float(self.arguments["hidden_size"]) / base if base else 1.0

    @property
    def train_loss(self) -> Series:
        """The training loss over iterations; empty without TensorBoard."""
        return self.series.get(LOSS, Series())

    def evaluated(self, on: str) -> Series:
        """Return the loss on the ``validation`` or ``test`` set over iterations."""
        found = [(e.iteration, e.losses[LOSS]) for e in self.evaluations if e.on == on and LOSS in e.losses]
        return Series(tuple(iteration for iteration, _ in found), tuple(loss for _, loss in found))

    @property
    def best(self) -> tuple[float, int] | None:
        """The lowest validation loss and its iteration; evaluations of a diverged model do not count."""
        series = self.evaluated(VALIDATION)
        finite = [pair for pair in zip(series.values, series.iterations, strict=True) if math.isfinite(pair[0])]
        return min(finite, default=None)

    def per_class(self, what: str) -> dict[str, Series]:
        """Return ``lr`` or ``weight_decay`` over iterations for every parameter class."""
        return {
            tag.removeprefix(f"{what}/"): series for tag, series in self.series.items() if tag.startswith(f"{what}/")
        }


def read_runs(paths: Sequence[str]) -> tuple[Run, ...]:
    """Return the runs in or below the given folders, each once.

    Raises:
        ConfigError: a path without a run, or a file of a run that cannot be read.
    """
    folders = list(dict.fromkeys(os.path.realpath(folder) for path in paths for folder in find_runs(path)))
    return tuple(read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True))


def find_runs(path: str) -> list[str]:
    """Return the folders in or below `path` that hold a run.json, sorted.

    Raises:
        ConfigError: there is none.
    """
    found = []
    for folder, below, files in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if RUN_JSON in files:
            found.append(folder)
    if not found:
        expected = "the folder of a run, with a run.json in it or below it"
        if not os.path.isdir(path):
            expected += " (there is no such folder)"
        raise ConfigError("RUN", path, expected, "give the run's --save folder or its --metrics-dir")
    return found


def _names(folders: Sequence[str]) -> list[str]:
    """Return a short name for each folder, leaving out ``transfer`` and the part that all have in common."""
    runs = [os.path.dirname(f) if os.path.basename(f) == METRICS_FOLDER else f for f in folders]
    if len(runs) == 1:
        return [os.path.basename(runs[0])]
    if len(set(runs)) < len(runs):
        runs = list(folders)
    return [os.path.relpath(run, os.path.commonpath(runs)) for run in runs]


def read_run(folder: str, name: str) -> Run:
    """Return the run whose metrics folder is `folder`, under the name `name`.

    Raises:
        ConfigError: a file of the run that cannot be read, or is damaged.
    """
    notes: list[str] = []
    path = os.path.join(folder, RUN_JSON)
    file = _read(RunJson.read, path)
    try:
        arguments = _arguments(file.arguments)
        evaluations = file.evaluations
        record: dict[str, Any] = {
            "status": file.status,
            "seconds": file.seconds,
            "iteration": file.iteration,
            "train_iterations": file.train_iterations,
            "final_loss": file.final_loss,
            "last_train_loss": file.last_train_loss,
            "layout": file.layout,
            "versions": file.versions,
            "command": file.command,
        }
    except NotAsWritten as error:
        raise _damaged(path, f"not what megatron_patch writes: {error}") from None
    alignment = read_lines(os.path.join(folder, "alignment.jsonl"), AlignmentLine, notes)
    if not alignment:
        notes.append("alignment was not measured; --alignment-interval switches it on")
    return Run(
        name=name,
        folder=folder,
        file=file,
        arguments=arguments,
        evaluations=evaluations,
        hyperparameters=_hyperparameters(folder, notes),
        alignment=alignment,
        equilibrium=read_lines(os.path.join(folder, "equilibrium.jsonl"), EquilibriumLine, notes),
        sublayers=read_lines(os.path.join(folder, "sublayers.jsonl"), SublayerLine, notes),
        series=_curves(folder, arguments, record["status"], record["iteration"], notes),
        notes=tuple(notes),
        **record,
    )


@as_written()
def _arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments; what is used of them here must be of its type."""
    for name in ("save", "tensorboard_dir", "metrics_dir"):
        if not isinstance(arguments.get(name, ""), (str, type(None))):
            raise ValueError(f"{name} is {arguments[name]!r}")
    sizes = ("hidden_size", "base_hidden_size") if arguments.get("base_hidden_size") is not None else ()
    for name in sizes:
        if not (isinstance(arguments[name], int) and 0 < arguments[name] < 2**53):
            raise ValueError(f"{name} is {arguments[name]!r}")
    int(arguments.get("tensorboard_log_interval") or 1)
    Settings.of(arguments)
    return arguments


def _read[File](read: Callable[[str], File], path: str) -> File:
    try:
        return read(path)
    except OSError as error:
        raise ConfigError(path, "", "a readable file", f"check its permissions ({error.strerror})") from None
    except NotAsWritten as error:
        raise _damaged(path, f"not what megatron_patch writes: {error}") from None
    except ValueError as error:
        raise _damaged(path, f"not JSON: {error}") from None


def _damaged(path: str, what: str) -> ConfigError:
    return ConfigError(path, f"({what})", "a file of a run", "restore it, or leave this run out")


def _hyperparameters(folder: str, notes: list[str]) -> HyperparameterTable | None:
    path = os.path.join(folder, HYPERPARAMETERS_JSON)
    if not os.path.exists(path):
        notes.append("hyperparameters.json is missing: no table of hyperparameters per class")
        return None
    return _read(HyperparameterTable.read, path)


def _curves(
    folder: str, arguments: Mapping[str, Any], status: str, iteration: int, notes: list[str]
) -> dict[str, Series]:
    files = tensorboard_files(folder, arguments)
    if not files:
        recorded = arguments.get("tensorboard_dir")
        missing = f"no TensorBoard files in {recorded}" if recorded else "trained without --tensorboard-dir"
        notes.append(f"{missing}: no curves of the training loss, the learning rate and the weight decay")
        return {}
    series = read_events(files)
    last = max((s.iterations[-1] for s in series.values()), default=0)
    interval = int(arguments.get("tensorboard_log_interval") or 1)
    if status == Status.FINISHED and last + interval <= iteration:
        notes.append(f"TensorBoard's files end at iteration {last}, the run at {iteration}: they are damaged")
    return series
