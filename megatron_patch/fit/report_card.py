"""The transfer report card: whether what was tuned on the proxy held at the target, rule by rule, against controls."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_patch.fit.blowups import described
from megatron_patch.fit.curves import CONTROLS, Curve, Study


@dataclass(frozen=True)
class Shift:
    """How far the optimal base LR of the target is from the proxy's, in octaves (factors of two)."""

    octaves: float
    low: float
    high: float
    """Interval: the intervals of both optima, taken as independent, added in quadrature."""

    def overlaps(self, other: "Shift") -> bool:
        """Whether the two intervals have a value in common."""
        return self.low <= other.high and other.low <= self.high

    @property
    def near_zero(self) -> bool:
        """Whether no shift at all is within the interval."""
        return self.low <= 0 <= self.high

    @property
    def text(self) -> str:
        """The shift with its interval.

        >>> Shift(1.234, 0.5, 2.0).text
        '+1.23 [+0.50, +2.00]'
        """
        return f"{_signed(self.octaves)} [{_signed(self.low)}, {_signed(self.high)}]"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


@dataclass(frozen=True)
class Grade:
    """One line of the card: a rule at a target width."""

    curve: Curve
    """Of the target."""
    proxy: Curve | None
    m: float
    """Width over base width."""
    shift: Shift | None
    lost: float | None
    """Loss at the proxy's optimal base LR minus the target's own best; inf if that LR diverges."""
    transferred: float | None
    """Loss at the proxy's optimal base LR."""
    double: float | None
    """Loss at twice the proxy's optimal base LR minus the loss at it."""
    half: float | None
    """The same at half of it."""
    remarks: str
    """Why something of it is not known, and what the fits left out; empty if there is nothing to say."""

    @property
    def label(self) -> str:
        """The rule."""
        return self.curve.label

    @property
    def control(self) -> bool:
        """Whether it is a negative control."""
        return self.label in CONTROLS

    @property
    def lost_at_least(self) -> bool:
        """Whether more may be lost: the target's best LR was not found."""
        return self.lost is not None and self.curve.optimum is None


def report_card(study: Study) -> list[Grade]:
    """Return the grades of every rule at every width but the base width."""
    return [_grade(curve, study.proxy(name), study) for name in study.labels for curve in study.targets(name)]


def _grade(curve: Curve, proxy: Curve | None, study: Study) -> Grade:
    m = curve.hidden_size / study.base_hidden_size
    start = proxy.optimum if proxy else None
    if proxy is None or start is None:
        reasons = [f"no trials at the base width {study.base_hidden_size} with this rule"]
        if proxy is not None:
            reasons = [f"no optimum of the proxy: {proxy.refusal}"]
        if curve.refusal:
            reasons.append(f"no optimum: {curve.refusal}")
        return Grade(curve, proxy, m, None, None, None, None, None, "; ".join(reasons))
    reasons = []
    shift = None
    if curve.optimum:
        end = curve.optimum
        low = math.hypot(end.log2_lr - end.low, start.high - start.log2_lr)
        high = math.hypot(end.high - end.log2_lr, start.log2_lr - start.low)
        octaves = end.log2_lr - start.log2_lr
        shift = Shift(octaves, octaves - low, octaves + high)
    else:
        reasons.append(f"no optimum: {curve.refusal}")
    at, double, half = (curve.loss_at(start.log2_lr + octaves) for octaves in (0, 1, -1))
    if at is None:
        reasons.append(f"the proxy's optimal LR {2**start.log2_lr:.3g} was not swept at this width")
    best = curve.best
    if at is not None and not curve.optimum:
        best = min(best, at)  # the lowest loss known; between LRs it may be lower than at any
    for who, fit in (("the proxy's", start), ("its", curve.optimum)):
        if fit and fit.dropped:
            losses = ", ".join(f"{t.loss:.4g} at LR {t.lr:.3g}" for t in fit.dropped)
            reasons.append(f"{who} fit leaves out what does not match the other losses: {losses}")
        if fit and fit.blown:
            reasons.append(f"{who} fit counts as diverged what blew up: {described(fit.blown)}")
    return Grade(
        curve,
        proxy,
        m,
        shift,
        _minus(at, best),
        at,
        _minus(double, at),
        _minus(half, at),
        "; ".join(reasons),
    )


def _minus(loss: float | None, reference: float | None) -> float | None:
    """Return a difference of losses; inf if the first diverges, None if it is not known."""
    if loss is None or reference is None or not math.isfinite(reference):
        return None
    return loss - reference


def verdicts(grades: Sequence[Grade]) -> list[str]:
    """Return what the card says in plain words, a sentence for every target width, the widest first."""
    widths = sorted({g.curve.hidden_size for g in grades}, reverse=True)
    return [verdict([g for g in grades if g.curve.hidden_size == width]) for width in widths]


def verdict(grades: Sequence[Grade]) -> str:
    """Return what the grades of one width say, in one sentence.

    Two rules differ only if the intervals of their shifts have no value in common. The loss at the proxy's LR has no
    interval with one seed, and the sentence says so.
    """
    first = grades[0]
    start = f"At width {first.curve.hidden_size} ({first.m:g} times the proxy's) "
    rules = [g for g in grades if not g.control and g.shift]
    if not rules:
        if not any(not g.control for g in grades):
            return start + "nothing but controls was swept, so there is no rule to judge."
        return start + "no rule has an optimum at both widths yet, so transfer cannot be judged."
    best = min(rules, key=lambda g: abs(g.shift.octaves) if g.shift else math.inf)
    assert best.shift is not None
    moved = "cannot be told apart from the proxy's" if best.shift.near_zero else "is not the proxy's"
    text = f"{start}the optimal base LR under {best.label} {moved} (shift {best.shift.text} octaves{_costing(best)})"
    for control in (g for g in grades if g.control):
        text += f"; under the control {control.label} {_against(best.shift, control)}"
    if not any(g.control and g.shift for g in grades):
        text += "; without a control that has an optimum, this does not show that the rule is the reason"
    return text + _losses(grades) + "."


def _costing(grade: Grade) -> str:
    """Return what the transfer costs, to stand behind a shift."""
    if grade.lost is None:
        return ""
    if math.isinf(grade.lost):
        return ", and the proxy's LR diverges"
    return f", {'at least ' if grade.lost_at_least else ''}{grade.lost:.3f} nats lost"


def _against(rule: Shift, control: Grade) -> str:
    """Return how a control compares with the shift of a rule."""
    if control.shift is None:
        return f"no optimum was found{_costing(control)}"
    if rule.overlaps(control.shift):
        how = "it cannot be told apart from that, as the intervals overlap"
    else:
        how = f"it shifts {'more' if abs(control.shift.octaves) > abs(rule.octaves) else 'less'}"
    return f"{how} ({control.shift.text}{_costing(control)})"


def _losses(grades: Sequence[Grade]) -> str:
    """Return which rule has the lowest loss at the proxy's LR, and whether the seeds can tell."""
    known = sorted(
        ((g.transferred, g) for g in grades if g.transferred is not None and math.isfinite(g.transferred)),
        key=lambda pair: pair[0],
    )
    if len(known) < 2:
        return ""
    (loss, best), (second_loss, second) = known[:2]
    spreads = [g.curve.spread for g in (best, second)]
    if None in spreads:
        doubt = " (one seed: how much of it is noise is not known)"
    else:
        wide = max(s for s in spreads if s is not None)
        doubt = f", less than the spread over seeds, {wide:.3f}" if second_loss - loss <= wide else ""
    return (
        f"; the lowest loss at the proxy's LR is {best.label}'s, {loss:.3f}, {second_loss - loss:.3f} below "
        f"{second.label}'s{doubt}"
    )
