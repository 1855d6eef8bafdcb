"""The runs behind docs/evidence.md: train what its tables lack, and add what came out to them.

    python benchmarks/evidence.py train transfer --workers 2    # hours; after Ctrl-C or on another machine it goes on
    python benchmarks/evidence.py collect transfer              # while it trains: add what is finished so far
    python benchmarks/evidence.py left                          # which runs the tables lack

A sweep file configs/evidence/NAME.yaml has its results in docs/evidence/NAME/: `trials.csv`, a table that
`megatron-patch report` and `transfer` read; `layers.csv` and `sublayers.csv`, what was measured in every layer; of a
sweep that saves checkpoints `singular_values.csv`, all singular values of the matrices at the end. A trial of the sweep
file that trials.csv has is not trained again: remove its line, and its folder under runs/evidence/NAME/trials.
"""

import argparse
import csv
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import METRICS_FOLDER
from megatron_patch.runs.run import read_runs
from megatron_patch.runs.trial import Trial, read_csv, to_csv, trial_of_run
from megatron_patch.sweep.axes import PlannedTrial
from megatron_patch.sweep.engine import run_sweep
from megatron_patch.sweep.file import SweepFile, read_sweep
from megatron_patch.sweep.planned import is_done

ROOT = Path(__file__).resolve().parents[1]
SWEEPS, TABLES = ROOT / "configs" / "evidence", ROOT / "docs" / "evidence"
INTERRUPTED = 130
"""What `run_sweep` returns after Ctrl-C."""
QUICK = "quick"
"""The sweep that says nothing; its tables stay beside its runs."""
SETTINGS = ("hidden_size", "rule", "lr", "weight_decay", "vector_lr", "steps", "seed")
"""What tells trials apart."""
MEASURED = (
    *("weight_norm", "relative_update", "weight_alignment", "update_alignment", "alignment_ratio"),
    *("relative_representation_change", "top_singular_value"),
)
"""Columns of layers.csv, of what alignment.jsonl has."""
DIGITS = 5


def sweep_file(name: str) -> SweepFile:
    """Return a sweep of configs/evidence."""
    return read_sweep(str(SWEEPS / f"{name}.yaml"))


def tables(name: str) -> Path:
    """Return the folder of a sweep's tables and figures."""
    return (ROOT / "runs" / "evidence" / "tables" if name == QUICK else TABLES) / name


def known(name: str) -> tuple[Trial, ...]:
    """Return the trials of a committed table."""
    path = tables(name) / "trials.csv"
    return read_csv(str(path)) if path.exists() else ()


def identity(trial: Trial) -> tuple[Any, ...]:
    """Return what tells a trial apart from the others of its table."""
    return tuple(_rounded(getattr(trial, setting)) for setting in SETTINGS)


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def planned_identity(file: SweepFile, planned: PlannedTrial) -> tuple[Any, ...]:
    """Return the same of a trial that has not been trained."""
    flags: Mapping[str, Any] = {**file.flags, **planned.changes}
    return (
        int(flags["hidden-size"]),
        flags.get("width-scaling") or "none",
        _rounded(float(flags["lr"])),
        _rounded(float(flags["weight-decay"])),
        None if flags.get("vector-lr") is None else _rounded(float(flags["vector-lr"])),
        int(flags["train-iters"]),
        int(flags["seed"]),
    )


def left(name: str, file: SweepFile) -> list[PlannedTrial]:
    """Return the trials of a sweep that its table lacks."""
    assert isinstance(file.plan, tuple)
    there = {identity(trial) for trial in known(name)}
    return [planned for planned in file.plan if planned_identity(file, planned) not in there]


def tokens_of(flags: Mapping[str, Any]) -> int:
    """Return the tokens of a step."""
    return int(flags["global-batch-size"]) * int(flags["seq-length"])


def seconds(file: SweepFile, planned: PlannedTrial) -> float:
    """Return about how long a run takes on a core; measured at widths 32 and 128 and 512 and 2,048 tokens to 20%."""
    flags: Mapping[str, Any] = {**file.flags, **planned.changes}
    return int(flags["train-iters"]) * (5e-3 + 0.4e-6 * tokens_of(flags) * int(flags["hidden-size"]))


def train(name: str, workers: int) -> int:
    """Train what is left and collect it; returns the exit code."""
    os.chdir(ROOT)
    file = sweep_file(name)
    missing = left(name, file)
    hours = sum(seconds(file, planned) for planned in missing) / 3600
    print(
        f"{name}: {len(missing)} of {len(file.plan)} runs to train, {workers} at a time: "  # type: ignore[arg-type]
        f"about {f'{hours:.1f} h' if hours >= 1 else f'{60 * hours:.0f} min'} of processor time"
    )
    if not missing:
        return 0
    try:
        return run_sweep(dataclasses.replace(file, plan=tuple(missing)), workers, resume=True)
    finally:
        collect(name)


def collect(name: str) -> None:
    """Add to the tables what is done in the sweep's folder and what they lack."""
    os.chdir(ROOT)
    file = sweep_file(name)
    done = [file.folder(planned) for planned in left(name, file) if is_done(file, planned)]
    runs = read_runs([f"{folder}/{METRICS_FOLDER}" for folder in done]) if done else ()
    trials = [trial_of_run(run.file) for run in runs]
    folder = tables(name)
    folder.mkdir(parents=True, exist_ok=True)
    table = sorted([*known(name), *trials], key=lambda t: (t.steps or 0, t.hidden_size, t.rule, t.lr, t.seed or 0))
    if table:
        (folder / "trials.csv").write_text(to_csv(table))
    for run, trial in zip(runs, trials, strict=True):
        append_rows(folder / "layers.csv", MEASURED, trial, run.alignment)
        append_rows(folder / "sublayers.csv", ("gain",), trial, run.sublayers)
    for trial, trained in zip(trials, done, strict=True):
        if checkpoint := max(Path(trained).glob("checkpoints/iter_*/mp_rank_00/model_optim_rng.pt"), default=None):
            from evidence_checkpoints import singular_values  # torch and Megatron, for the one sweep that needs them

            append_rows(folder / "singular_values.csv", ("place", "value"), trial, tuple(singular_values(checkpoint)))
    print(f"{name}: {len(trials)} added, {len(left(name, file))} left")


def append_rows(path: Path, columns: Sequence[str], trial: Trial, lines: Sequence[Any]) -> None:
    """Append what a trial measured to a table of it, a row for each line: its settings, iteration, layer, columns.

    Rows of the same trial from an earlier training give way.
    """
    own = ["" if value is None else str(value) for value in identity(trial)]
    rows = list(csv.reader(path.open(newline=""))) if path.exists() else [[*SETTINGS, "iteration", "layer", *columns]]
    with path.open("w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerows(row for row in rows if row[: len(own)] != own)
        for line in lines:
            values = [getattr(line, column) for column in columns]
            cells = ["" if value is None else f"{value:.{DIGITS}g}" for value in values]
            writer.writerow([*own, line.iteration, line.layer, *cells])


def names() -> list[str]:
    """Return the sweeps of configs/evidence that say something."""
    return sorted(path.stem for path in SWEEPS.glob("*.yaml") if not path.stem.startswith(("proxy", QUICK)))


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "collect", "left"))
    parser.add_argument("sweeps", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; default: all")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at a time; default: %(default)s")
    args = parser.parse_intermixed_args(argv)
    code = 0
    try:
        for name in args.sweeps or names():
            if args.action == "train":
                code = max(code, train(name, args.workers))
                if code == INTERRUPTED:
                    break
            elif args.action == "collect":
                collect(name)
            else:
                file = sweep_file(name)
                print(*(f"{name}: {planned.name}" for planned in left(name, file)), sep="\n")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
