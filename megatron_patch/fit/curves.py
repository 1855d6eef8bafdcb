"""Trials of a sweep as curves: loss against base LR, one curve for each rule and width, with its fitted optimum."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from megatron_patch.fit.blowups import settle
from megatron_patch.fit.found import NoOptimum, Optimum
from megatron_patch.fit.optimum import fit_lr
from megatron_patch.fit.seeds import aligned
from megatron_patch.runs.trial import DIVERGED, Trial
from megatron_patch.theory.width import RULES

type Array = NDArray[np.float64]

CONTROLS = ("none", "standard")
"""Labels of the negative controls: no width scaling, and the one that leaves weight decay alone."""
SAME_AT_BASE = {rule.name for rule in RULES.values() if rule.decays and rule.embedding_decays} | {"custom"}
"""Rules whose training of the base model is one and the same: every m is 1, and embeddings decay."""


def label(trial: Trial) -> str:
    """Return what a trial's rule is called, with the extra warmup if it has one.

    >>> label(Trial(256, 0.01, 3.0, rule="sqrt"))
    'sqrt'
    >>> label(Trial(256, 0.01, 3.0, rule="standard", arguments={"extra_warmup": "exp"}))
    'standard + exp warmup'
    """
    rule, width, warmup = trial.rule, trial.settings.width, trial.settings.warmup
    if rule == "custom" and width.lr_exponent is not None and width.wd_exponent is not None:
        rule += f" ({width.lr_exponent}, {width.wd_exponent})"
    return f"{rule} + {warmup.kind} warmup" if warmup.active else rule


@dataclass(frozen=True)
class Setting:
    """What the trials of one LR curve have in common, beside rule and width."""

    weight_decay: float | None
    vector_lr: float | None
    steps: int | None

    @property
    def text(self) -> str:
        """The settings in words.

        >>> Setting(0.1, None, 1000).text
        'base weight decay 0.1, 1000 iterations'
        """
        named = {"base weight decay ": self.weight_decay, "vector LR ": self.vector_lr}
        words = [f"{name}{value:g}" for name, value in named.items() if value is not None]
        return ", ".join([*words, *([f"{self.steps} iterations"] if self.steps else [])])


def setting(trial: Trial) -> Setting:
    """Return the settings of a trial that are fixed along a curve."""
    return Setting(trial.weight_decay, trial.vector_lr, trial.steps)


@dataclass(frozen=True)
class Point:
    """The trials of one LR."""

    lr: float
    loss: float
    """Mean of the finite losses, each without the offset of its seed; nan if all diverged."""
    low: float
    high: float
    """Range of the losses as they are."""
    seeds: int
    diverged: int
    """How many of them diverged."""
    blown: tuple[float, ...] = ()
    """Finite losses of those of them that blew up."""


@dataclass(frozen=True)
class Curve:
    """Loss against base LR of one rule at one width."""

    label: str
    hidden_size: int
    trials: tuple[Trial, ...]
    """Each setting and seed once."""

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """The points in order of LR."""
        settled = settle(self.trials)
        means = grouped(aligned(settled.trials), lambda t: t.lr)
        blown = grouped(settled.blown, lambda t: t.lr)
        groups = sorted(grouped(settled.trials, lambda t: t.lr).items())
        return tuple(_point(lr, group, means[lr], blown.get(lr, ())) for lr, group in groups)

    @cached_property
    def _fit(self) -> tuple[Optimum | None, str]:
        try:
            return fit_lr(self.trials), ""
        except NoOptimum as error:
            return None, str(error)

    @property
    def optimum(self) -> Optimum | None:
        """The fitted optimum, if the trials show one."""
        return self._fit[0]

    @property
    def refusal(self) -> str:
        """Why there is no optimum; empty if there is one."""
        return self._fit[1]

    @property
    def best(self) -> float:
        """The lowest loss: of the fit, or where there is none, of the trials; nan if all diverged."""
        if self.optimum:
            return self.optimum.loss
        return min((p.loss for p in self.points if math.isfinite(p.loss)), default=math.nan)

    @property
    def seeds(self) -> tuple[int, int]:
        """The smallest and the largest number of seeds of an LR."""
        counts = [point.seeds for point in self.points]
        return min(counts), max(counts)

    @property
    def spread(self) -> float | None:
        """The median over LRs of the range of losses over seeds; None with one seed."""
        ranges = [p.high - p.low for p in self.points if p.seeds - p.diverged > 1]
        return median(ranges) if ranges else None

    def loss_at(self, log2_lr: float) -> float | None:
        """Return the loss at any base LR; inf where a trial next to it diverged, None where nothing was swept.

        Within an octave of the fitted optimum it is the parabola of the fit, since that averages over noise. Elsewhere
        it runs through the mean losses and is monotone between two of them (PCHIP), so never below both.
        """
        points = self.points
        x = np.array([math.log2(point.lr) for point in points])
        if not len(x) or not x[0] - _CLOSE <= log2_lr <= x[-1] + _CLOSE:
            return None
        y = np.array([math.inf if p.diverged else p.loss for p in points])
        right = int(np.searchsorted(x, log2_lr - _CLOSE))
        at_point = abs(x[right] - log2_lr) <= _CLOSE
        if not np.isfinite(y[right if at_point else right - 1 : right + 1]).all():
            return math.inf
        fit = self.optimum
        if fit and abs(log2_lr - fit.log2_lr) <= 1:
            return fit.loss + fit.curvature / 2 * (log2_lr - fit.log2_lr) ** 2
        return float(y[right]) if at_point else _between(x, y, right, log2_lr)


_CLOSE = 1e-6
"""Octaves between LRs that are the same."""


def _between(x: Array, y: Array, right: int, at: float) -> float:
    """Return the value at `at`, which is between x[right - 1] and x[right], of the monotone cubic through the points.

    Fritsch and Butland, SIAM J. Sci. Stat. Comput. 1984. Points beyond one that diverged have no say.
    """
    lost = np.flatnonzero(~np.isfinite(y))
    first = int(lost[lost < right].max(initial=-1)) + 1
    end = int(lost[lost > right].min(initial=len(x)))
    return float(PchipInterpolator(x[first:end], y[first:end])(at))


def _point(lr: float, trials: Sequence[Trial], without_offsets: Sequence[Trial], blown: Sequence[Trial]) -> Point:
    ended = tuple(t.loss for t in blown)
    losses = [trial.loss for trial in trials if not trial.diverged]
    if not losses:
        return Point(lr, DIVERGED, DIVERGED, DIVERGED, len(trials), len(trials), ended)
    mean = fmean(trial.loss for trial in without_offsets if not trial.diverged)
    return Point(lr, mean, min(losses), max(losses), len(trials), len(trials) - len(losses), ended)


@dataclass(frozen=True)
class Study:
    """The curves of a sweep that can be compared: one setting, several rules and widths."""

    base_hidden_size: int
    setting: Setting
    curves: Mapping[tuple[str, int], Curve]
    """By rule and width. At the base width, the rules that train the base model alike share one curve."""
    trials: tuple[Trial, ...]
    """All trials of the sweep, those with other settings too; each setting and seed once."""

    @property
    def labels(self) -> list[str]:
        """The rules of the wider models, controls last; without wider models, those of the base width."""
        wide = {name for name, width in self.curves if width != self.base_hidden_size}
        names = wide or {name for name, _ in self.curves}
        order = [*RULES, "custom"]
        return sorted(names, key=lambda n: (n in CONTROLS, order.index(n.split()[0]), n))

    @property
    def widths(self) -> list[int]:
        """All widths, rising."""
        return sorted({width for _, width in self.curves})

    def proxy(self, name: str) -> Curve | None:
        """Return the curve of a rule at the base width."""
        return self.curves.get((name, self.base_hidden_size))

    def targets(self, name: str) -> list[Curve]:
        """Return the curves of a rule at the other widths, rising."""
        return [
            curve
            for (other, width), curve in sorted(self.curves.items(), key=lambda item: item[0][1])
            if other == name and width != self.base_hidden_size
        ]

    @property
    def left_out(self) -> int:
        """How many trials have other settings than the curves."""
        return sum(setting(trial) != self.setting for trial in self.trials)


def is_sweep(trials: Sequence[Trial]) -> bool:
    """Return whether trials differ in LR, weight decay, rule or width, so that there is something to compare."""
    return len({(t.hidden_size, t.lr, t.weight_decay, label(t)) for t in trials}) > 1


def study(trials: Iterable[Trial]) -> Study:
    """Group the trials of a sweep into curves.

    The base width is the trials' ``--base-hidden-size``, and where none is known the smallest width. Curves are of the
    one setting (weight decay, vector LR, iterations) that has the most of them; among equals, of the one with the
    lowest loss at the base width.
    """
    single = _distinct(trials)
    bases = [t.arguments["base_hidden_size"] for t in single if t.arguments.get("base_hidden_size")]
    base = int(max(set(bases), key=bases.count)) if bases else min(t.hidden_size for t in single)
    by_setting = grouped(single, setting)

    def rank(chosen: Setting) -> tuple[int, int, float]:
        members = by_setting[chosen]
        curves = {(label(t), t.hidden_size) for t in members}
        losses = [t.loss for t in members if t.hidden_size == base and not t.diverged]
        return -len(curves), -len({t.lr for t in members}), min(losses, default=math.inf)

    main = min(by_setting, key=rank)
    return Study(base, main, _curves(by_setting[main], base), single)


def _distinct(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Return one trial for each setting and seed: of repeated ones the mean loss, diverged if one of them is."""
    groups = grouped(trials, lambda t: (label(t), t.hidden_size, setting(t), t.lr, t.seed))
    return tuple(replace(group[0], loss=fmean(t.loss for t in group)) for group in groups.values())


def _curves(trials: Sequence[Trial], base: int) -> dict[tuple[str, int], Curve]:
    curves = {}
    for (name, width), members in grouped(trials, lambda t: (label(t), t.hidden_size)).items():
        curves[name, width] = Curve(name, width, tuple(members))
    shared = [t for t in trials if t.hidden_size == base and t.rule in SAME_AT_BASE]
    if shared:
        # At m = 1 neither the rule nor an extra warmup changes anything: LR and seed tell trials apart.
        unified = tuple(
            replace(group[0], rule="none", loss=fmean(t.loss for t in group))
            for group in grouped(shared, lambda t: (t.lr, t.seed)).values()
        )
        users = {label(t) for t in trials if t.rule in SAME_AT_BASE}
        proxy = Curve("proxy", base, unified)
        curves |= {(name, base): proxy for name in users}
    return curves


def grouped[Item, Key](items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return the items by key, in the order in which they come."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
