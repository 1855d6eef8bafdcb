"""What a fit finds: an optimum of one curve, one of a surface, or the reason why there is none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from megatron_patch.errors import Refused
from megatron_patch.fit.blowups import described
from megatron_patch.runs.trial import Trial

RIDGE = 4.0
"""A curvature across over one along of at least this is called a ridge: the loss is twice as narrow across."""


@dataclass(frozen=True)
class Sensitivity:
    """How much a mistuned LR costs, in nats, with its 90% interval; nan where it is not known."""

    nats: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """The number with its interval, if it has one.

        >>> Sensitivity(0.01234, 0.011, 0.014).text
        '0.0123 [0.0110, 0.0140]'
        """
        return f"{self.nats:.4f}" if math.isnan(self.low) else f"{self.nats:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Optimum:
    """The optimum of one curve: a loss over log2(LR)."""

    log2_lr: float
    low: float
    high: float
    """The 90% bootstrap interval is [low, high], in log2(LR)."""
    loss: float
    """Fitted loss at the optimum, an LR that was not trained."""
    curvature: float
    """Second derivative at the optimum, nats per octave squared; nan where only a best point is known."""
    points: int
    """How many measurements were fitted."""
    used: tuple[Trial, ...]
    dropped: tuple[Trial, ...] = ()
    """Finite measurements that do not fit the others."""
    blown: tuple[Trial, ...] = ()
    """Finite measurements that count as diverged, see `blowups`."""
    curvature_interval: tuple[float, float] = (math.nan, math.nan)
    """90% bootstrap interval of the curvature; nan where it is not known."""

    @property
    def lr(self) -> float:
        """The optimal LR."""
        return float(2.0**self.log2_lr)

    @property
    def sensitivity(self) -> Sensitivity:
        """LR sensitivity: the mean loss above the best, over log2(LR) within an octave of the optimum.

        Of the fitted parabola that is curvature / 6; a curve of another shape, within an octave, can be a fifth off.
        Source: arXiv 2309.14322, section 2.2, where the mean is over three decades of LR.
        """
        low, high = self.curvature_interval
        return Sensitivity(self.curvature / 6, low / 6, high / 6)

    @property
    def width(self) -> float:
        """Width of the interval in octaves."""
        return self.high - self.low


@dataclass(frozen=True)
class Ridge:
    """The optimum of a surface: a loss over log2(LR) and log2(weight decay)."""

    log2_lr: float
    log2_weight_decay: float
    low: float
    high: float
    """90% interval of log2(LR), weight decay being free."""
    weight_decay_low: float
    weight_decay_high: float
    """90% interval of log2(weight decay), LR being free."""
    loss: float
    direction: tuple[float, float]
    """Unit vector (log2 LR, log2 weight decay) along which the loss rises least; (0.71, -0.71) keeps LR * decay."""
    along: float
    across: float
    """Second derivatives along `direction` and at right angles to it, nats per octave squared."""
    points: int
    used: tuple[Trial, ...]
    dropped: tuple[Trial, ...] = ()
    blown: tuple[Trial, ...] = ()

    @property
    def lr(self) -> float:
        """The optimal LR."""
        return float(2.0**self.log2_lr)

    @property
    def weight_decay(self) -> float:
        """The optimal weight decay."""
        return float(2.0**self.log2_weight_decay)

    @property
    def is_ridge(self) -> bool:
        """Whether the loss is much flatter along `direction` than across."""
        return self.across >= RIDGE * self.along


class NoOptimum(Refused):
    """A sweep that does not tell its optimum.

    Args:
        reason: which check failed, with the numbers.
        fix: what to do, an imperative sentence without a full stop.
        partial: the best guess for those who insist; None where there is not even that.
    """

    def __init__(self, reason: str, fix: str, partial: Optimum | Ridge | None = None) -> None:
        self.reason = reason
        self.fix = fix
        self.partial = partial
        super().__init__(f"{reason}; {fix}")

    def naming(self, blown: tuple[Trial, ...]) -> Self:
        """Return the same with the runs that were counted as diverged for a finite loss."""
        if not blown:
            return self
        partial = replace(self.partial, blown=blown) if self.partial else None
        reason = f"{self.reason} (counted as diverged, as they blew up: {described(blown)})"
        return type(self)(reason, self.fix, partial)


def octaves(low: float, high: float) -> str:
    """Return an interval of log2(LR) as LRs, in words."""
    if math.isinf(low) or math.isinf(high):
        return "unbounded"
    return f"{2**low:.3g} to {2**high:.3g} ({high - low:.1f} octaves)"


def listed(values: Sequence[float]) -> str:
    """Return numbers as a list for a sentence."""
    return ", ".join(f"{value:.4g}" for value in values)
