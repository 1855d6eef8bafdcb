"""The numbers of runs as tables: what a report shows beside its pictures."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from megatron_patch.files.lines import AlignmentLine
from megatron_patch.files.run_json import TEST
from megatron_patch.report.layers import layer_kind, lines_by_kind, measurable_updates
from megatron_patch.runs.run import Run

MOST_DIFFERENCES = 10
"""Columns for settings in which runs differ."""
_NOT_TRAINING = (
    "save load tensorboard_dir metrics_dir data_path data_cache_path wandb_exp_name wandb_save_dir rank local_rank "
    "alignment_interval spectral_interval log_interval tensorboard_log_interval eval_interval save_interval"
).split()
"""Arguments that say where something is or how often it is written, not how a model is trained."""
_FIRST = "width_scaling hidden_size lr weight_decay vector_lr seed train_iters extra_warmup".split()
"""Settings that come before the others."""
_UPDATES = ("update_alignment", "alignment_ratio", "relative_update", "relative_representation_change")
_MEASURED = ("weight_norm", "weight_alignment", *_UPDATES, "top_singular_value")
_HEADINGS = ("‖W‖", "α_W", "α_ΔW", "α_ΔW / α_W", "RWU", "RRC", "top singular value")


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    value: float | int | None = None
    """The exact number, if it is one."""

    @property
    def key(self) -> str | None:
        """The number as JavaScript spells it."""
        return None if self.value is None else str(self.value).replace("inf", "Infinity")


@dataclass(frozen=True)
class Table:
    """A table of the page."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""


def number(value: float | None, digits: int = 4) -> Cell:
    """Return a cell for a measured number, rounded."""
    return Cell("–") if value is None else Cell(f"{value:.{digits}g}", value)


def exact(value: Any) -> Cell:
    """Return a cell for a setting, which is not rounded."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return Cell(text or "–", value if is_number else None)


def loss_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def train_text(run: Run) -> str:
    first = run.train_loss.values[0] if run.train_loss.values else None
    return f"{loss_text(first)} → {loss_text(run.last_train_loss)}"


def iterations_text(run: Run) -> str:
    return f"{run.iteration} of {run.train_iterations}" if run.train_iterations else str(run.iteration)


def best_text(run: Run) -> str:
    return f"{loss_text(run.best[0])} at {run.best[1]}" if run.best else "–"


def duration_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def facts(run: Run) -> list[tuple[str, str]]:
    test = run.evaluated(TEST).values
    return [
        ("Validation loss", loss_text(run.final_loss)),
        ("Best validation loss", best_text(run)),
        *([("Test loss", loss_text(test[-1]))] if test else []),
        ("Training loss", train_text(run)),
        ("Iterations", iterations_text(run)),
        ("Time", duration_text(run.seconds)),
        ("Status", run.status),
        ("Width scaling", run.rule if run.rule == "none" else f"{run.rule}, m = {run.m:g}"),
    ]


def rule_text(run: Run) -> str:
    h = run.hyperparameters
    if h is None:
        return ""
    base = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in h.base.items() if size is not None)
    exponents = "learning rate × m^-{:g}, weight decay × m^{:g}".format(*h.exponents)
    source = f" ({h.source})" if h.source else ""
    return f"Rule {h.rule}{source}: {exponents}" + (f"; base: {base}." if base else ".")


def class_table(run: Run) -> Table:
    """Return one row for all parameters that share class, m, LR, weight decay and eps."""
    groups: dict[tuple[str, float, float, float, float | None], list[int]] = {}
    for p in run.hyperparameters.parameters if run.hyperparameters else ():
        groups.setdefault((p.role, p.m, p.lr, p.weight_decay, p.eps), []).append(math.prod(p.shape))
    rows = tuple(
        (
            Cell(role),
            *(number(value, 6) for value in numbers),
            exact(len(sizes)),
            Cell(f"{sum(sizes):,}", sum(sizes)),
        )
        for (role, *numbers), sizes in sorted(groups.items(), key=lambda item: (*item[0][:4], item[0][4] or 0.0))
    )
    return Table(("class", "m", "peak LR", "weight decay", "eps", "tensors", "parameters"), rows)


def parameter_table(run: Run) -> Table:
    parameters = run.hyperparameters.parameters if run.hyperparameters else ()
    return Table(
        ("parameter", "class", "shape", "m", "peak LR", "weight decay", "eps"),
        tuple(
            (
                Cell(p.name),
                Cell(p.role),
                Cell(" × ".join(map(str, p.shape)), math.prod(p.shape)),
                *(number(value, 6) for value in (p.m, p.lr, p.weight_decay, p.eps)),
            )
            for p in parameters
        ),
    )


def kind_table(run: Run) -> Table:
    """Return the medians over the layers of each kind."""
    groups: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
    for (layer, fan_in, _, _), values in _last_measured(run, lines_by_kind(run)).items():
        groups.setdefault(layer_kind(layer), []).append((fan_in, values))
    rows = tuple(
        (
            Cell(kind),
            exact(len(layers)),
            exact(layers[0][0]),
            *(number(_median(values[key] for _, values in layers if key in values)) for key in _MEASURED),
        )
        for kind, layers in groups.items()
    )
    return Table(("kind", "layers", "fan-in", *_HEADINGS), rows, "Last measured values, medians over layers")


def layer_table(run: Run) -> Table:
    """Return what was measured last of every layer."""
    rows = tuple(
        (Cell(layer), exact(fan_in), exact(fan_out), number(m), *(number(values.get(key)) for key in _MEASURED))
        for (layer, fan_in, fan_out, m), values in _last_measured(run, run.alignment).items()
    )
    return Table(("layer", "fan-in", "fan-out", "m", *_HEADINGS), rows, "Last measured values")


def _last_measured(run: Run, lines: Iterable[AlignmentLine]) -> dict[tuple[str, int, int, float], dict[str, float]]:
    """Return the last value of every metric by layer, fan-in, fan-out and m."""
    measurable = measurable_updates(run)
    last: dict[tuple[str, int, int, float], dict[str, float]] = {}
    for line in lines:
        known = last.setdefault((line.layer, line.fan_in, line.fan_out, line.m), {})
        for key in _MEASURED:
            value = getattr(line, key)
            if value is not None and (key not in _UPDATES or (line.iteration, line.layer) in measurable):
                known[key] = value
    return last


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None


def flags(run: Run) -> Table:
    """Return the flags of the command line; the last of a repeated one counts."""
    given: dict[str, list[str]] = {}
    name = ""
    for word in run.command[1:]:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            given[name] = [value] if value else []
        elif name:
            given[name].append(word)
    pairs = ((name, " ".join(values) or "on") for name, values in given.items())
    return _pairs("Flags of the command line", pairs)


def environment(run: Run) -> Table:
    """Return versions, parallel layout, and where the files are."""
    layout = ((f"ranks: {name}", size) for name, size in run.layout.items())
    files = ("metrics folder", os.path.relpath(run.folder))
    return _pairs("Versions, ranks, files", (*run.versions.items(), *layout, files))


def all_arguments(run: Run) -> Table:
    """Return every argument of Megatron."""
    return _pairs("", sorted(run.arguments.items()))


def _pairs(title: str, pairs: Iterable[tuple[str, Any]]) -> Table:
    return Table(("name", "value"), tuple((Cell(name), exact(value)) for name, value in pairs), title)


def runs_table(runs: Sequence[Run]) -> Table:
    """Return one row for each run: the settings in which they differ, and how they went."""
    names = _differences(runs)
    rows = tuple(
        (
            Cell(run.name),
            number(run.final_loss, 5),
            number(run.best[0] if run.best else None, 5),
            number(run.last_train_loss, 5),
            *(exact(run.arguments.get(name)) for name in names),
            exact(run.iteration),
            Cell(duration_text(run.seconds), run.seconds),
            Cell(run.status),
        )
        for run in runs
    )
    columns = ("run", "validation loss", "best", "training loss", *(name.replace("_", " ") for name in names))
    return Table((*columns, "iterations", "time", "status"), rows)


def _rank(name: str) -> tuple[int, str]:
    return (_FIRST.index(name) if name in _FIRST else len(_FIRST), name)


def _differences(runs: Sequence[Run]) -> list[str]:
    names = sorted({name for run in runs for name in run.arguments} - set(_NOT_TRAINING), key=_rank)
    return [name for name in names if len({repr(run.arguments.get(name)) for run in runs}) > 1][:MOST_DIFFERENCES]
