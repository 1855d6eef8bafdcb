"""What a run left behind, read back: run.json, hyperparameters.json, what was measured, TensorBoard.

Everything but run.json may be missing; `Run.notes` says what was, and what was left out on the way. Files of a run that
is still going on can be read at any time.
"""

import datetime
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.files.lines import AlignmentLine, EquilibriumLine, SublayerLine, read_lines
from megatron_patch.files.whole import read_json
from megatron_patch.runs.tensorboard import LOSS, Series, read_events, tensorboard_files


@dataclass(frozen=True)
class Evaluation:
    """The losses at one evaluation."""

    iteration: int
    on: str
    """``validation`` or ``test``."""
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model with its peak LR and its weight decay, as hyperparameters.json has them."""

    name: str
    role: str
    """Its class: matrix, output, embedding or vector."""
    shape: tuple[int, ...]
    m: float
    lr: float
    weight_decay: float
    eps: float


@dataclass(frozen=True)
class Hyperparameters:
    """The content of hyperparameters.json."""

    rule: str
    exponents: tuple[float, ...]
    base: Mapping[str, Any]
    source: str
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Run:
    """One training run."""

    name: str
    """Short, and unique among the runs that were read together."""
    folder: str
    """The metrics folder, the one with run.json."""
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
    hyperparameters: Hyperparameters | None
    alignment: tuple[AlignmentLine, ...]
    equilibrium: tuple[EquilibriumLine, ...]
    sublayers: tuple[SublayerLine, ...]
    series: Mapping[str, Series]
    """What TensorBoard holds, by tag."""
    notes: tuple[str, ...]
    """What a reader of the numbers should know: missing or unfinished files."""

    @property
    def rule(self) -> str:
        """The width-scaling rule."""
        return str(self.arguments.get("width_scaling") or "none")

    @property
    def m(self) -> float:
        """Width over the width of the base model; 1 without a base."""
        base = self.arguments.get("base_hidden_size")
        return float(self.arguments["hidden_size"]) / float(base) if base else 1.0

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
        series = self.evaluated("validation")
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
        if "run.json" in files:
            found.append(folder)
    if not found:
        expected = "the folder of a run, with a run.json in it or below it"
        if not os.path.isdir(path):
            expected += " (there is no such folder)"
        raise ConfigError("RUN", path, expected, "give the run's --save folder or its --metrics-dir")
    return found


def _names(folders: Sequence[str]) -> list[str]:
    """Return a short name for each folder, leaving out ``transfer`` and the part that all have in common."""
    runs = [os.path.dirname(f) if os.path.basename(f) == "transfer" else f for f in folders]
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
    path = os.path.join(folder, "run.json")
    content = _json(path)
    try:
        arguments = _arguments(content["arguments"])
        evaluations = tuple(_evaluation(entry) for entry in content["evaluations"])
        record: dict[str, Any] = {
            "status": str(content["status"]),
            "seconds": _seconds(content["started"], content["updated"]),
            "iteration": int(content["iteration"]),
            "train_iterations": None if content["train_iterations"] is None else int(content["train_iterations"]),
            "final_loss": _number(content["final_loss"]),
            "last_train_loss": _number((content["train_loss"] or {}).get(LOSS)),
            "layout": dict(content["layout"]),
            "versions": dict(content["versions"]),
            "command": tuple(content["command"]),
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _damaged(path, "not what megatron_patch writes", error) from None
    alignment = read_lines(os.path.join(folder, "alignment.jsonl"), AlignmentLine, notes)
    if not alignment:
        notes.append("alignment was not measured; --alignment-interval switches it on")
    return Run(
        name=name,
        folder=folder,
        arguments=arguments,
        evaluations=evaluations,
        hyperparameters=_hyperparameters(os.path.join(folder, "hyperparameters.json"), notes),
        alignment=alignment,
        equilibrium=read_lines(os.path.join(folder, "equilibrium.jsonl"), EquilibriumLine, notes),
        sublayers=read_lines(os.path.join(folder, "sublayers.jsonl"), SublayerLine, notes),
        series=_curves(folder, arguments, record["status"], record["iteration"], notes),
        notes=tuple(notes),
        **record,
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron's arguments; what is used of them here must be of its type."""
    arguments = dict(content)
    for name in ("save", "tensorboard_dir", "metrics_dir"):
        if not isinstance(arguments.get(name, ""), (str, type(None))):
            raise ValueError(f"{name} is {arguments[name]!r}")
    sizes = ("hidden_size", "base_hidden_size") if arguments.get("base_hidden_size") is not None else ()
    for name in sizes:
        if not (isinstance(arguments[name], int) and 0 < arguments[name] < 2**53):
            raise ValueError(f"{name} is {arguments[name]!r}")
    int(arguments.get("tensorboard_log_interval") or 1)
    return arguments


def _evaluation(entry: Mapping[str, Any]) -> Evaluation:
    losses = {key: float(value) for key, value in entry.items() if key not in ("iteration", "set")}
    return Evaluation(int(entry["iteration"]), str(entry["set"]), losses)


def _seconds(start: str, end: str) -> float:
    parse = datetime.datetime.fromisoformat
    return (parse(end) - parse(start)).total_seconds()


def _json(path: str) -> Any:
    try:
        return read_json(path)
    except OSError as error:
        raise ConfigError(path, "", "a readable file", f"check its permissions ({error.strerror})") from None
    except ValueError as error:
        raise _damaged(path, "not JSON", error) from None


def _damaged(path: str, what: str, error: Exception) -> ConfigError:
    detail = f"no {error}" if isinstance(error, KeyError) else str(error)
    return ConfigError(path, f"({what}: {detail})", "a file of a run", "restore it, or leave this run out")


def _hyperparameters(path: str, notes: list[str]) -> Hyperparameters | None:
    if not os.path.exists(path):
        notes.append("hyperparameters.json is missing: no table of hyperparameters per class")
        return None
    content = _json(path)
    try:
        parameters = tuple(
            Parameter(
                str(p["name"]),
                str(p["class"]),
                tuple(int(n) for n in p["shape"]),
                *(float(p[key]) for key in ("m", "lr", "weight_decay", "eps")),
            )
            for p in content["parameters"]
        )
        return Hyperparameters(
            str(content["rule"]),
            tuple(float(x) for x in content["exponents"]),
            dict(content["base"]),
            str(content["source"]),
            parameters,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(path, "not what megatron_patch writes", error) from None


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
    if status == "finished" and last + interval <= iteration:
        notes.append(f"TensorBoard's files end at iteration {last}, the run at {iteration}: they are damaged")
    return series
