"""Trials: one training each, reduced to its settings and its loss; what optima are fitted to and tables show.

A CSV table has a header and one row per trial; the columns are the names of `COLUMNS`.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import Any

from megatron_patch.config import WIDTH_RULES, Settings
from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import RunJson, Status
from megatron_patch.files.whole import NotAsWritten, as_written

DIVERGED = math.nan
"""The loss of a run that ended in numbers that are none."""


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep."""

    hidden_size: int
    lr: float
    """Base LR, what ``--lr`` was."""
    loss: float
    """Final validation loss in nats per token; nan or inf if the training diverged."""
    weight_decay: float | None = None
    """Base weight decay, what ``--weight-decay`` was."""
    rule: str = "none"
    """``--width-scaling``."""
    vector_lr: float | None = None
    """``--vector-lr``; None where embeddings, gains and biases have the base LR too."""
    seed: int | None = None
    steps: int | None = None
    """Training iterations."""
    source: str = ""
    """Where it was read, for messages: a folder, or a file and a line."""
    arguments: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """All of Megatron's arguments, where known."""

    @cached_property
    def settings(self) -> Settings:
        """What our flags were, where the arguments are known."""
        return Settings.of(self.arguments) if self.arguments else _defaults()

    @property
    def diverged(self) -> bool:
        """Whether there is no finite loss."""
        return not math.isfinite(self.loss)


@cache
def _defaults() -> Settings:
    """What our flags are where nothing is known of them, as in every row of a table."""
    return Settings.of({})


COLUMNS = tuple(f.name for f in fields(Trial) if f.name not in ("source", "arguments"))
REQUIRED = ("hidden_size", "lr", "loss")
_INTEGERS = ("hidden_size", "seed", "steps")


def trial_of_run(file: RunJson) -> Trial:
    """Return the trial that a run.json describes.

    Raises:
        ConfigError: the file lacks what a trial needs: a run of another kind, or one that never evaluated.
    """
    try:
        arguments, status, loss = file.arguments, file.status, file.final_loss
        with as_written():
            width = Settings.of(arguments).width
            trial = _checked_trial(
                hidden_size=int(arguments["hidden_size"]),
                lr=float(arguments["lr"]),
                loss=DIVERGED if status == Status.DIVERGED or loss is None else loss,
                weight_decay=float(arguments["weight_decay"]),
                rule=width.rule,
                vector_lr=width.vector_lr,
                seed=int(arguments["seed"]),
                steps=file.train_iterations,
                source=file.path,
                arguments=arguments,
            )
    except NotAsWritten as error:
        raise ConfigError(file.path, f"({error})", "the run.json of a training run", "leave this run out") from None
    if status not in (Status.FINISHED, Status.DIVERGED):
        raise ConfigError(file.path, f"(status {status})", "a finished run", "let it finish, or leave it out")
    if loss is None and status != Status.DIVERGED:
        fix = "train it with --eval-iters above 0"
        raise ConfigError(file.path, "(no validation loss)", "a run that evaluated", fix)
    return trial


def _checked_trial(**values: Any) -> Trial:
    """Return a trial whose LR and width can be fitted.

    Raises:
        ValueError: an LR or width that is not positive and finite, or a negative weight decay.
    """
    trial = Trial(**values)
    if not (trial.lr > 0 and math.isfinite(trial.lr) and trial.hidden_size > 0):
        raise ValueError(f"lr {trial.lr}, hidden_size {trial.hidden_size}: both must be above 0 and finite")
    if trial.weight_decay is not None and not 0 <= trial.weight_decay < math.inf:
        raise ValueError(f"weight_decay {trial.weight_decay}: it must be 0 or above and finite")
    if trial.vector_lr is not None and not 0 <= trial.vector_lr < math.inf:
        raise ValueError(f"vector_lr {trial.vector_lr}: it must be 0 or above and finite")
    return trial


def to_csv(trials: Iterable[Trial]) -> str:
    """Return trials as the text of a CSV table; an unknown value is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for trial in trials:
        values = [getattr(trial, column) for column in COLUMNS]
        writer.writerow("" if value is None else repr(value) if isinstance(value, float) else value for value in values)
    return text.getvalue()


def read_csv(path: str) -> tuple[Trial, ...]:
    """Return the trials of a CSV table.

    Raises:
        ConfigError: an unreadable file, a missing or unknown column, or a cell that is no number.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            header = [name.strip() for name in rows.fieldnames or ()]
            rows.fieldnames = header
            _check_header(path, header)
            trials = tuple(_row(row, f"{path} line {rows.line_num}") for row in rows)
    except OSError as error:
        raise ConfigError(path, "", "a readable file", f"check the path ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(path, f"({error})", "a CSV table in UTF-8", "correct the file") from None
    if not trials:
        raise ConfigError(path, "(no rows)", "at least one row below the header", "add the runs")
    return trials


def _check_header(path: str, header: list[str]) -> None:
    for column in REQUIRED:
        if column not in header:
            raise ConfigError(
                path, f"with the columns {', '.join(header) or 'none'}", f"a column {column}", "correct the first line"
            )
    for column in header:
        if column not in COLUMNS or header.count(column) > 1:
            raise ConfigError(path, f"column {column!r}", f"each of {', '.join(COLUMNS)} at most once", "rename it")


def _row(row: Mapping[str, Any], source: str) -> Trial:
    values: dict[str, Any] = {}
    for column, text in row.items():
        if column is None or text is None:
            raise ConfigError(source, "", "as many cells as the first line has", "correct the line")
        text = text.strip()
        if not text and column not in REQUIRED:
            continue
        if column in _INTEGERS and text.endswith(".0"):
            text = text.removesuffix(".0")  # what a table program makes of an integer column with gaps
        try:
            values[column] = text if column == "rule" else int(text) if column in _INTEGERS else float(text)
        except ValueError:
            what = "an integer" if column in _INTEGERS else "a number"
            raise ConfigError(source, f"{column} {text!r}", what, "correct the cell") from None
    if values.get("rule", "none") not in WIDTH_RULES:
        raise ConfigError(source, f"rule {values['rule']!r}", f"one of {', '.join(WIDTH_RULES)}", "correct the cell")
    try:
        return _checked_trial(**values, source=source)
    except ValueError as error:
        raise ConfigError(source, f"({error})", "settings of a run", "correct the line") from None
