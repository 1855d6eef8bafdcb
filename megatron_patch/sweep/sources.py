"""Where the trials of a sweep come from: a fixed grid, or two, the second of which needs the first one's result."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

from megatron_patch.sweep.attempt import FAILED, Outcome
from megatron_patch.sweep.axes import PlannedTrial, safe_name, value_label
from megatron_patch.sweep.file import TwoPhase


class Source(Protocol):
    """What the engine asks for trials."""

    @property
    def total(self) -> int:
        """Number of trials there will be."""

    def waiting(self) -> Sequence[PlannedTrial]:
        """Return the trials that are known and have no outcome yet, in the order to run them."""

    def new(self) -> PlannedTrial | None:
        """Make one more trial, if there is to be one."""

    def known(self, trial: PlannedTrial) -> Outcome | None:
        """Return an outcome that is not to be read from the trial's folder."""

    def settle(self, trial: PlannedTrial, outcome: Outcome) -> None:
        """Note the outcome of a trial."""

    def complete(self) -> bool:
        """Return whether every trial has an outcome."""

    def hopeless(self, trial: PlannedTrial, evaluations: Sequence[tuple[int, float]]) -> bool:
        """Return whether a running trial should be ended, given (iteration, loss) of its evaluations."""

    def notes(self) -> list[str]:
        """Return what to tell at the end."""


class Grid:
    """A fixed list of trials."""

    def __init__(self, trials: Sequence[PlannedTrial]) -> None:
        self.trials = trials
        self.outcomes: dict[str, Outcome] = {}

    @property
    def total(self) -> int:
        return len(self.trials)

    def waiting(self) -> Sequence[PlannedTrial]:
        return [trial for trial in self.trials if trial.name not in self.outcomes]

    def new(self) -> PlannedTrial | None:
        return None

    def known(self, trial: PlannedTrial) -> Outcome | None:
        return None

    def settle(self, trial: PlannedTrial, outcome: Outcome) -> None:
        self.outcomes[trial.name] = outcome

    def complete(self) -> bool:
        return len(self.outcomes) == len(self.trials)

    def hopeless(self, trial: PlannedTrial, evaluations: Sequence[tuple[int, float]]) -> bool:
        return False

    def notes(self) -> list[str]:
        return []


class Phases(Grid):
    """The two phases of arXiv 2510.19093, G.2.

    When the last trial of the first phase is done, those of the second follow with ``--vector-lr`` at the LR with the
    lowest loss, the mean over seeds. If one of the first failed there is no second phase.
    """

    def __init__(self, phases: TwoPhase) -> None:
        super().__init__(phases.first)
        self.phases = phases
        self.best_lr: float | None = None
        self._notes: list[str] = []

    @property
    def total(self) -> int:
        return len(self.phases.first) + len(self.phases.second)

    def settle(self, trial: PlannedTrial, outcome: Outcome) -> None:
        super().settle(trial, outcome)
        if len(self.outcomes) == len(self.phases.first) and self.best_lr is None:
            self._start_second()

    def _start_second(self) -> None:
        losses: dict[float, list[float]] = defaultdict(list)
        for trial in self.phases.first:
            outcome = self.outcomes[trial.name]
            if outcome.kind == FAILED:
                self._notes.append(f"phase 2 was not started, since {trial.name} of phase 1 failed")
                return
            losses[float(trial.changes["lr"])].append(outcome.loss)
        means = {lr: sum(found) / len(found) for lr, found in losses.items()}
        best = min(sorted(means), key=lambda lr: means[lr])
        if not math.isfinite(means[best]):
            self._notes.append("phase 2 was not started, since every LR of phase 1 diverged")
            return
        self.best_lr = best
        self._notes.append(f"phase 1: the best LR is {best:.10g} (loss {means[best]:.4f}), the vector LR of phase 2")
        if len(means) > 1 and best in (min(means), max(means)):
            self._notes.append("WARNING: that is the end of phase 1's LRs: the best may lie beyond; widen the grid")
        self.trials = [*self.phases.first, *(with_vector_lr(trial, best) for trial in self.phases.second)]

    def notes(self) -> list[str]:
        return self._notes


def with_vector_lr(trial: PlannedTrial, lr: float) -> PlannedTrial:
    """Return a trial of the second phase with the LR that the first one found; its name tells."""
    name = safe_name(f"{trial.name}_vector-lr={value_label(lr)}")
    return dataclasses.replace(trial, name=name, changes={**trial.changes, "vector-lr": lr})
