"""What the proxy's numbers say of the shifts, beside what was measured: the forecasts of docs/evidence.md."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from evidence import known, sweep_file, tables, tokens_of
from evidence_layers import Key, Measured, mean_log2_rrcs
from evidence_map import NARROW, WIDE, mapped, signed

from megatron_patch.fit.curves import Curve, study
from megatron_patch.fit.report_card import Grade, Shift, report_card
from megatron_patch.theory.equilibrium import momentum_update_rms
from megatron_patch.theory.forecast import Course, forecast_shift, snr_of
from megatron_patch.theory.schedules import linear_warmup_linear_decay
from megatron_patch.theory.width import RULES

MADE_FROM = "length_1000"
"""The sweep whose runs of width 128 the forecast was made from, and `FALL`."""
FALL = 0.35
"""Octaves by which the optimum is lower than forecast, each time the width doubles: the mean over the five rules of
`MADE_FROM` at width 128 (-0.67, -0.55, -0.65, -0.84 and -0.76 at two doublings, as they then were). Fixed before the
other sweeps were complete."""


@dataclass(frozen=True)
class Told:
    """A rule at a width: what was forecast, and what was found."""

    grade: Grade
    shift: float
    """Octaves, from the proxy's numbers alone."""
    same_rrc: float | None
    """Octaves at which the wide runs have the mean log2 RRC of the proxy's optimum; None outside the LRs swept, or if
    it does not rise with the LR."""
    own_rrc: float
    """Mean log2 RRC at the optimum of the wide model."""
    measured: Shift

    @property
    def doublings(self) -> float:
        """Of the width."""
        return math.log2(self.grade.m)

    @property
    def corrected(self) -> float:
        """The forecast, lower by `FALL` for each doubling."""
        return self.shift - FALL * self.doublings


class Forecast:
    """The forecasts of a sweep; phi is that of its proxy."""

    def __init__(self, name: str) -> None:
        self.found = study(known(name))
        proxy = next(curve for curve in map(self.found.proxy, self.found.labels) if curve and curve.optimum)
        assert proxy.optimum is not None
        measured = Measured(tables(name) / "layers.csv", 2**proxy.optimum.log2_lr)
        alignments = measured.median((proxy.hidden_size, proxy.trials[0].rule), "update_alignment")
        noise = course_of(name)
        snr = snr_of(statistics.median(alignments.values()), proxy.hidden_size, noise.tokens)
        self.course = dataclasses.replace(noise, snr=snr)
        self.rrcs = mean_log2_rrcs(tables(name) / "layers.csv")
        self.rrc = self.at_optimum(proxy)
        """Mean log2 RRC at the proxy's optimum."""

    def at_optimum(self, curve: Curve) -> float:
        """Return the mean log2 RRC at the optimum of a width and rule, between the LRs that were swept."""
        assert curve.optimum is not None
        rrc = self.rrcs[key_of(curve)]
        return float(np.interp(curve.optimum.log2_lr, list(rrc), list(rrc.values())))

    def __iter__(self) -> Iterator[Told]:
        for grade in report_card(self.found):
            proxy, curve = grade.proxy, grade.curve
            if grade.shift is None or proxy is None or proxy.optimum is None or key_of(curve) not in self.rrcs:
                continue
            narrow, width, start = proxy.hidden_size, curve.hidden_size, proxy.optimum.log2_lr
            told = forecast_shift(
                self.course, RULES[grade.label], width / narrow, narrow, 2**start, narrow**-0.5, width**-0.5
            )
            x, y = zip(*self.rrcs[key_of(curve)].items(), strict=True)
            wanted = self.at_optimum(proxy)
            rises = list(y) == sorted(y)
            same = float(np.interp(wanted, y, x)) - start if rises and y[0] <= wanted <= y[-1] else None
            yield Told(grade, told, same, self.at_optimum(curve), grade.shift)


def key_of(curve: Curve) -> Key:
    """Return width and rule of a curve."""
    return curve.hidden_size, curve.trials[0].rule


def course_of(name: str) -> Course:
    """Return the run of a sweep as the forecast sees it, with a gradient of noise alone."""
    flags = sweep_file(name).flags
    steps, warmup = int(flags["train-iters"]), int(flags["lr-warmup-iters"])
    factors = [linear_warmup_linear_decay(t, 1.0, warmup, steps) for t in range(steps)]
    update_rms = momentum_update_rms(float(flags["adam-beta1"]))
    return Course(factors, float(flags["weight-decay"]), tokens_of(flags), 0.0, update_rms)


def forecast_table(name: str) -> list[str]:
    """Return the forecasts of a sweep, as lines of Markdown."""
    forecast = Forecast(name)
    lines = [
        f"phi {forecast.course.snr:.3f} of the proxy; its mean log2 RRC at its optimum is −{-forecast.rrc:.2f}.",
        "",
        "| rule | width | forecast | from the wide runs' RRC | measured | mean log2 RRC at the optimum |",
        "|---|---|---|---|---|---|",
    ]
    for told in forecast:
        same = "outside the LRs swept" if told.same_rrc is None else f"{told.same_rrc:+.2f}"
        lines.append(
            f"| {told.grade.label} | {told.grade.curve.hidden_size} | {told.shift:+.2f} | {same} | "
            f"{told.measured.text} | {told.own_rrc:.2f} |"
        )
    return [signed(line) for line in lines]


def forecasts() -> list[str]:
    """Return all of them, with and without `FALL`, and how far off they and simpler guesses are, as lines of Markdown.

    Without the rule none, whose wide runs are those of standard: the LR of matrices alone is m times as high.
    """
    lines = [
        "| steps | tokens a step | rule | width | forecast | and the fall | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    made_from = {told.grade.label: told for told in Forecast(MADE_FROM) if told.grade.curve.hidden_size == WIDE}
    unseen: list[Told] = []
    for name, _ in mapped():
        forecast = Forecast(name)
        for told in forecast:
            if told.grade.label == "none":
                continue
            width = told.grade.curve.hidden_size
            seen = name == MADE_FROM and width == WIDE
            unseen += [] if seen else [told]
            lines.append(
                f"| {len(forecast.course.factors):,} | {forecast.course.tokens:,} | {told.grade.label} | {width} | "
                f"{told.shift:+.2f} | {told.corrected:+.2f}{' (made from it)' if seen else ''} | {told.measured.text} |"
            )

    def error(guess: Callable[[Told], float]) -> str:
        return f"{math.sqrt(statistics.fmean((guess(told) - told.measured.octaves) ** 2 for told in unseen)):.2f}"

    def copied(told: Told) -> float:
        return made_from[told.grade.label].measured.octaves * told.doublings / math.log2(WIDE / NARROW)

    return [
        *(signed(line) for line in lines),
        "",
        f"| guess, of the {len(unseen)} that it was not made from | root mean square error, octaves |",
        "|---|---|",
        f"| forecast | {error(lambda told: told.shift)} |",
        f"| forecast and fall | {error(lambda told: told.corrected)} |",
        f"| no shift | {error(lambda told: 0.0)} |",
        f"| the shift of the same rule at 1,000 steps | {error(copied)} |",
    ]
