"""The part of a report that is about a sweep: its trials, the report card as a table, and what the page shows of it."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_patch.errors import ConfigError
from megatron_patch.fit.curves import Study, is_sweep, setting, study
from megatron_patch.fit.report_card import Grade, report_card, verdicts
from megatron_patch.report.charts_sweep import heat_maps, transfer_pictures
from megatron_patch.report.drawing import Picture
from megatron_patch.report.tables import Cell, Table, exact, number
from megatron_patch.runs.foreign import has_foreign_runs, read_foreign_runs
from megatron_patch.runs.run import Run, find_runs, read_runs
from megatron_patch.runs.trial import Trial, read_csv, trial_of_run
from megatron_patch.runs.wandb import WANDB_NOTE

MOST_ROWS = 1000
"""Trials that the table of a page lists, so that the page stays small."""
TABLE = "trials.csv"
"""What a sweep's output folder holds beside its runs: the trials, also those whose folder is gone."""


@dataclass(frozen=True)
class Sweep:
    """The trials of a report, grouped and judged."""

    study: Study
    grades: tuple[Grade, ...]
    verdicts: tuple[str, ...]

    @cached_property
    def curves(self) -> list[Picture]:
        """The pictures of loss over LR; page and picture show the same, and a fit takes its time."""
        return transfer_pictures(self.study, self.grades)

    @cached_property
    def heat_maps(self) -> list[Picture]:
        """Those of loss over LR and weight decay."""
        return heat_maps(self.study)


def read_all(paths: Sequence[str]) -> tuple[tuple[Run, ...], Sweep | None, tuple[str, ...]]:
    """Return the runs in or below some paths, the sweep that they and tables of trials make up, and notes.

    Args:
        paths: folders of runs, output folders of sweeps, CSV tables of trials, or folders of TensorBoard's or W&B's
            files of Megatron runs without this package.

    Raises:
        ConfigError: a path without runs or trials, or a file that cannot be read.
    """
    tables = [path for path in paths if os.path.isfile(path)]
    folders = [path for path in paths if path not in tables]
    beside = [os.path.join(folder, TABLE) for folder in folders if os.path.isfile(os.path.join(folder, TABLE))]
    own = [folder for folder in folders if _has_runs(folder)]
    foreign = [folder for folder in folders if folder not in own and os.path.join(folder, TABLE) not in beside]
    foreign = [folder for folder in foreign if has_foreign_runs(folder)]
    with_runs = [f for f in folders if f not in foreign and (f in own or os.path.join(f, TABLE) not in beside)]
    runs = read_runs(with_runs) if with_runs else ()
    notes, trials = [], []
    for run in runs:
        try:
            trials.append(run_trial(run))
        except ConfigError as error:
            notes.append(f"{run.name} is no trial of the sweep: {error}")
    known = {_identity(trial) for trial in trials}
    for path in [*beside, *tables]:
        trials += [trial for trial in read_csv(path) if _identity(trial) not in known]
    for folder in foreign:
        trials += read_foreign_runs(folder)
    if any(trial.source.endswith(".wandb") for trial in trials):
        notes.append(WANDB_NOTE)
    found = sweep(trials) if is_sweep(trials) or foreign else None
    return runs, found, tuple(notes if found else ())


def run_trial(run: Run) -> Trial:
    """Return a run as a trial.

    Raises:
        ConfigError: it has not finished, or never evaluated.
    """
    return trial_of_run(run.file)


def _has_runs(folder: str) -> bool:
    try:
        return bool(find_runs(folder))
    except ConfigError:
        return False


def _identity(trial: Trial) -> tuple[object, ...]:
    return trial.hidden_size, trial.lr, trial.rule, setting(trial), trial.seed


def sweep(trials: Sequence[Trial]) -> Sweep:
    """Return trials grouped into curves, with the report card."""
    grouped = study(trials)
    grades = tuple(report_card(grouped))
    return Sweep(grouped, grades, tuple(verdicts(grades)))


def card_table(grades: Sequence[Grade]) -> Table:
    """Return the report card: a line for every rule and target width."""
    columns = (
        "rule",
        "width",
        "shift, octaves",
        "loss lost by transfer",
        "at the proxy's LR",
        "best loss",
        "LR × 2 costs",
        "LR / 2 costs",
        "LR sensitivity",
        "optimal base LR",
        "m",
        "seeds",
        "remarks",
    )
    return Table(columns, tuple(_card_row(grade) for grade in grades), "Transfer report card")


def _card_row(grade: Grade) -> tuple[Cell, ...]:
    fit = grade.curve.optimum
    return (
        Cell(f"{grade.label}{' (control)' if grade.control else ''}"),
        exact(grade.curve.hidden_size),
        Cell(grade.shift.text, grade.shift.octaves) if grade.shift else Cell("–"),
        _loss(grade.lost, difference=True, at_least=grade.lost_at_least),
        _loss(grade.transferred),
        _loss(grade.curve.best),
        _loss(grade.double, difference=True),
        _loss(grade.half, difference=True),
        Cell(fit.sensitivity.text, fit.sensitivity.nats) if fit else Cell("–"),
        Cell(f"{2**fit.log2_lr:.3g} [{2**fit.low:.3g}, {2**fit.high:.3g}]", 2**fit.log2_lr) if fit else Cell("–"),
        number(grade.m),
        Cell(seeds_text(grade), grade.curve.seeds[0]),
        Cell(grade.remarks or "–"),
    )


def seeds_text(grade: Grade) -> str:
    """Return how many seeds an LR has, and how far their losses are apart."""
    fewest, most = grade.curve.seeds
    count = str(most) if fewest == most else f"{fewest} to {most}"
    spread = grade.curve.spread
    return count if spread is None else f"{count} (apart {spread:.3f})"


def _loss(value: float | None, difference: bool = False, at_least: bool = False) -> Cell:
    if value is None or math.isnan(value):
        return Cell("–")
    if math.isinf(value):
        return Cell("diverges", value)
    text = f"{value:+.3f}".replace("-", "−") if difference else f"{value:.4f}"
    return Cell(f"≥ {text}" if at_least else text, value)


def trials_table(sweep: Sweep) -> Table:
    """Return one row for each trial; used where there are no runs to make a table of."""
    trials = sweep.study.trials
    names = [
        n for n in ("weight_decay", "vector_lr", "seed", "steps") if any(getattr(t, n) is not None for t in trials)
    ]
    rows = tuple(
        (
            Cell(t.rule),
            exact(t.hidden_size),
            exact(t.lr),
            Cell("diverged", math.inf) if t.diverged else number(t.loss, 5),
            *(Cell("–") if getattr(t, name) is None else exact(getattr(t, name)) for name in names),
        )
        for t in trials[:MOST_ROWS]
    )
    columns = ("rule", "width", "base LR", "validation loss", *(name.replace("_", " ") for name in names))
    more = f"The first {MOST_ROWS:,} of {len(trials):,} trials; all are in what this report was made from"
    return Table(columns, rows, more if len(trials) > MOST_ROWS else "")


def proxy_text(sweep: Sweep) -> str:
    """Return what the curves have in common, and whose proxy curve is whose."""
    study = sweep.study
    words = [f"Base width {study.base_hidden_size}"]
    if study.setting.text:
        words.append(study.setting.text)
    text = "; ".join(words) + "."
    shared = [name for name in study.labels if (c := study.proxy(name)) and c.label == "proxy"]
    if len(shared) > 1:
        text += (
            f" At the base width no rule changes anything, so {', '.join(shared)} share one proxy curve "
            "(embeddings decay in all of them)."
        )
    if study.left_out:
        text += f" {study.left_out} trials have other settings; they are in the heat maps and tables only."
    return text
