"""Trials chosen by an Optuna sampler; the study is an SQLite file that several processes share and resume."""

import contextlib
import fcntl
import importlib.util
import math
import os
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from megatron_patch.errors import ConfigError
from megatron_patch.sweep.attempt import DIVERGED, FAILED, FINISHED, PRUNED, Outcome
from megatron_patch.sweep.axes import Axis, PlannedTrial, safe_name, value_label
from megatron_patch.sweep.file import Range, Search, SweepFile

STUDY = "sweep"
READ_SECONDS = 1.0
"""Between two looks at what other processes did."""
WAIT_SECONDS = 60.0
"""For another process's write."""
_NEEDS = {"cmaes": "cmaes", "qmc": "scipy", "gp": "scipy"}
_PRUNERS: dict[str, type[optuna.pruners.BasePruner]] = {
    "median": optuna.pruners.MedianPruner,
    "successive-halving": optuna.pruners.SuccessiveHalvingPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
}


class OptunaStudy:
    """The trials of an Optuna study.

    A trial that this sweep or a killed one began stays open in the study until its training finished, diverged or was
    pruned: a sweep that is resumed runs the open ones again before it asks for new ones.

    Raises:
        ConfigError: the sampler needs a package that is missing, or the study was made with another space.
    """

    def __init__(self, file: SweepFile, search: Search) -> None:
        missing = _NEEDS.get(search.sampler)
        if missing and importlib.util.find_spec(missing) is None:
            fix = f"pip install {missing}, or choose another"
            raise ConfigError("sampler", search.sampler, f"the package {missing}, which it needs", fix)
        self.search = search
        self.outcomes: dict[str, Outcome] = {}
        self._numbers: dict[str, int] = {}
        self._reported: dict[str, int] = {}
        self._read: dict[str, FrozenTrial] = {}
        self._read_again = 0.0
        self._lock = os.path.join(file.output, ".locks", "study")
        self._distributions = {_key(d): _distribution(d) for d in search.space}
        os.makedirs(os.path.dirname(self._lock), exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        database = os.path.abspath(os.path.join(file.output, "study.db"))
        with self._exclusively(), _intact(database, os.path.join(file.output, "trials")):
            # Workers wait for each other's writes instead of failing at once.
            self._storage = optuna.storages.RDBStorage(
                f"sqlite:///{database}", engine_kwargs={"connect_args": {"timeout": WAIT_SECONDS}}
            )
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=STUDY,
                load_if_exists=True,
                pruner=_PRUNERS[search.pruner]() if search.pruner else optuna.pruners.NopPruner(),
            )
            self._study.get_trials(deepcopy=False)
            space = {key: optuna.distributions.distribution_to_json(d) for key, d in self._distributions.items()}
            earlier = self._study.user_attrs.get("space")
            if earlier is None:
                self._study.set_user_attr("space", space)
            elif earlier != space:
                raise ConfigError(
                    database,
                    "(made with another space)",
                    "the same space as before",
                    "restore the sweep file, or choose another output",
                )

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        with open(self._lock, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @property
    def total(self) -> int:
        return self.search.trials

    def _trials(self, now: bool = False) -> dict[str, FrozenTrial]:
        """Return the study's trials by name; one whose process died before it had its settings is none.

        Args:
            now: read the database although that was done a moment ago.
        """
        if now or time.monotonic() >= self._read_again:
            self._read = {
                self._planned(frozen).name: frozen
                for frozen in self._study.get_trials(deepcopy=False)
                if frozen.state != TrialState.FAIL and set(frozen.params) == set(self._distributions)
            }
            self._read_again = time.monotonic() + READ_SECONDS
        return self._read

    def _planned(self, frozen: FrozenTrial) -> PlannedTrial:
        changes: dict[str, Any] = {}
        parts = [f"{frozen.number:04d}"]
        for dimension in self.search.space:
            value = frozen.params[_key(dimension)]
            parts.append(f"{_key(dimension)}={f'{value:.6g}' if isinstance(value, float) else value_label(value)}")
            if isinstance(dimension, Axis):
                changes.update(next(point.flags for point in dimension.points if point.label == value))
            else:
                changes[dimension.flag] = value
        return PlannedTrial(safe_name("_".join(parts)), changes)

    def waiting(self) -> Sequence[PlannedTrial]:
        """Return the trials of the study that have no outcome here: open ones, and those that others have settled."""
        trials = {name: frozen for name, frozen in self._trials().items() if name not in self.outcomes}
        self._numbers.update({name: frozen.number for name, frozen in trials.items()})
        return [self._planned(frozen) for frozen in trials.values()]

    def new(self) -> PlannedTrial | None:
        """Ask the sampler, if the study has fewer trials than there are to be."""
        with self._exclusively():
            if len(self._trials(now=True)) >= self.total:
                return None
            everything = len(self._study.get_trials(deepcopy=False))
            with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
                self._study.sampler = _sampler(self.search, everything)
                number = self._study.ask(self._distributions).number
        frozen = self._study.get_trials(deepcopy=False)[number]
        trial = self._planned(frozen)
        self._numbers[trial.name] = number
        self._read_again = 0.0
        return trial

    def known(self, trial: PlannedTrial) -> Outcome | None:
        """Return the outcome of a trial that was pruned, or whose folder is gone."""
        state = self._trials(now=True)[trial.name].state
        if state == TrialState.PRUNED:
            return Outcome(PRUNED)
        return Outcome(FINISHED) if state == TrialState.COMPLETE else None

    def settle(self, trial: PlannedTrial, outcome: Outcome) -> None:
        """Tell the study; a failed trial stays open."""
        self.outcomes[trial.name] = outcome
        if outcome.kind == FAILED or (outcome.kind == FINISHED and outcome.trial is None):
            return
        number = self._numbers[trial.name]
        with self._exclusively():  # another process may see the end of the same training
            if outcome.kind == PRUNED:
                self._study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
            else:  # a diverged trial is the worst there can be, not one without a value
                value = math.inf if outcome.kind == DIVERGED else outcome.loss
                self._study.tell(number, value, skip_if_finished=True)

    def complete(self) -> bool:
        trials = self._trials()
        return len(trials) >= self.total and all(name in self.outcomes for name in trials)

    def hopeless(self, trial: PlannedTrial, evaluations: Sequence[tuple[int, float]]) -> bool:
        """Report new evaluations to the study and ask the pruner."""
        if self.search.pruner is None:
            return False
        since = self._reported.get(trial.name, 0)
        fresh = [(iteration, loss) for iteration, loss in evaluations if iteration > since]
        if not fresh:
            return False
        self._reported[trial.name] = fresh[-1][0]
        with self._exclusively():
            frozen = self._study.get_trials(deepcopy=False)[self._numbers[trial.name]]
            if frozen.state.is_finished():
                return False
            for iteration, loss in fresh:
                self._storage.set_trial_intermediate_value(frozen._trial_id, iteration, loss)
            return self._study.pruner.prune(self._study, self._storage.get_trial(frozen._trial_id))

    def notes(self) -> list[str]:
        return []


@contextlib.contextmanager
def _intact(database: str, trials: str) -> Iterator[None]:
    """Turn what is wrong with the study's file into one line: all of it is read while the block opens the study.

    Raises:
        ConfigError: it cannot be read, is damaged, or is empty although there are trials.
    """

    def damaged(why: object) -> ConfigError:
        said = " ".join(str(why).partition("[SQL")[0].split())
        fix = "restore it from a copy, or choose another output (the runs in trials/ are whole: trials.csv has them)"
        return ConfigError(database, f"({said})", "the study of this sweep, whole", fix)

    try:
        if os.path.exists(database):
            if os.path.getsize(database) == 0 and os.listdir(trials):
                raise damaged("empty, and there are trials")
            with contextlib.closing(sqlite3.connect(database, timeout=WAIT_SECONDS)) as connection:
                (found,) = connection.execute("pragma quick_check(1)").fetchone()
            if found != "ok":
                raise damaged(found)
        yield
    except ConfigError:
        raise
    # SQLite, SQLAlchemy and Optuna have errors of their own; a value that is none is a LookupError or ValueError.
    except Exception as error:
        raise damaged(error) from None


def _key(dimension: Range | Axis) -> str:
    return dimension.flag if isinstance(dimension, Range) else dimension.name


def _distribution(dimension: Range | Axis) -> BaseDistribution:
    if isinstance(dimension, Axis):
        return CategoricalDistribution([point.label for point in dimension.points])
    if dimension.kind == "integer":
        return IntDistribution(int(dimension.low), int(dimension.high))
    return FloatDistribution(dimension.low, dimension.high, log=dimension.kind == "log")


def _sampler(search: Search, asked: int) -> optuna.samplers.BaseSampler:
    """Return the sampler for the next trial.

    A sampler is made for every trial, with a seed of the trial's own: processes that share the study and the seed would
    otherwise all draw the same. Quasi-random numbers are one sequence, and whose turn it is stands in the study.
    """
    seed = None if search.seed is None else search.seed + asked
    startup: Mapping[str, Any] = {"n_startup_trials": min(10, max(1, search.trials // 2))}
    match search.sampler:
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True, **startup)
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)
        case "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, **startup)
    return optuna.samplers.QMCSampler(seed=search.seed or 0, scramble=True)
