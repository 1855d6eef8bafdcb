"""The tables of docs/evidence.md that put several sweeps together, or fit something else than an optimum."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from evidence import known, sweep_file
from evidence_forecast import forecasts
from evidence_map import WIDE, at_proxy_lr, sweeps, where_it_holds
from evidence_spectra import spectrum, spectrum_figure
from matplotlib.figure import Figure

from megatron_patch.fit.curves import Curve, study
from megatron_patch.fit.surface import fit
from megatron_patch.report.charts_sweep import Trace, draw_losses, heat_maps
from megatron_patch.report.drawing import LIGHT, Line, Picture, draw_lines, grid_figure
from megatron_patch.runs.trial import Trial
from megatron_patch.theory.equilibrium import equilibrium_rho
from megatron_patch.theory.schedules import (
    decay_away_factors,
    equilibrium_factors,
    exp_increasing,
    linear_warmup_linear_decay,
)

WARMUPS = {
    "10% linear": ("length_1000", "none"),
    "50% linear": ("warmup_linear", "none"),
    "10% linear, exp 50%": ("warmup_exp", "none"),
    "10% linear, decay-away": ("warmup_decay_away", "none"),
    "10% linear, independent scaling": ("length_1000", "independent"),
}
"""What was trained at width 128: its sweep and rule."""
TIMES, PEAK, DECAY, STEPS = 16, 0.004, 0.1, 20_000
"""Width multiplier, peak LR, weight decay and steps of arXiv 2510.19093, fig. 7."""


def at_width(sweep: str, rule: str) -> list[Trial]:
    """Return the trials of a rule at the wide width, of the one seed that every warmup has."""
    return [trial for trial in known(sweep) if (trial.hidden_size, trial.rule, trial.seed) == (WIDE, rule, 1)]


def warmup_curves() -> dict[str, Curve]:
    """Return the curves of `WARMUPS` that have been trained."""
    trials = {name: at_width(*where) for name, where in WARMUPS.items()}
    return {name: Curve(name, WIDE, tuple(members)) for name, members in trials.items() if members}


def warmups() -> list[str]:
    """Return the losses of every warmup over the LR, as lines of Markdown."""
    curves = warmup_curves()
    lrs = sorted({point.lr for curve in curves.values() for point in curve.points})
    lines = [
        "| warmup | " + " | ".join(f"2^{math.log2(lr):g}" for lr in lrs) + " | optimum |",
        "|" + "---|" * (len(lrs) + 2),
    ]
    for name, curve in curves.items():
        losses = {point.lr: point.loss for point in curve.points}
        cells = [f"{losses[lr]:.4f}" if lr in losses else "" for lr in lrs]
        optimum = f"2^{curve.optimum.log2_lr:.2f}" if curve.optimum else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {optimum} |")
    return lines


def warmup_figure() -> Figure:
    """Return the same as a figure."""
    traces = [
        Trace(name, LIGHT[place % len(LIGHT)], curve) for place, (name, curve) in enumerate(warmup_curves().items())
    ]
    losses = [point.loss for trace in traces for point in trace.curve.points]
    limits = min(losses) - 0.01, max(losses) + 0.02
    return grid_figure("width 128, 1,000 steps", [Picture("", "", partial(draw_losses, traces=traces, limits=limits))])


def schedule() -> list[float]:
    """Return the LR of every step in the setting of arXiv 2510.19093, fig. 7: 10% linear warmup, linear decay to 0."""
    return [linear_warmup_linear_decay(t, PEAK, STEPS // 10, STEPS) for t in range(STEPS)]


def schedule_factors() -> dict[str, list[float]]:
    """Return what multiplies that LR, or the relative update, at every step."""
    lrs = schedule()
    course = [(lr, DECAY) for lr in lrs]
    at_rest = equilibrium_rho(PEAK, DECAY)
    return {
        "exp, T_W = 50%": [exp_increasing(t, STEPS // 2, TIMES) for t in range(STEPS)],
        "decay-away": list(decay_away_factors(lrs, DECAY, TIMES)),
        "independent, from equilibrium": list(equilibrium_factors(course, TIMES, at_rest)),
        "independent, from fan-in 2,048": list(equilibrium_factors(course, TIMES, 2048**-0.5)),
    }


def schedules() -> list[str]:
    """Return the factors of some steps, as lines of Markdown."""
    at = (0, STEPS // 10, STEPS // 4, STEPS // 2, 3 * STEPS // 4)
    lines = ["| step | " + " | ".join(f"{t:,}" for t in at) + " |", "|" + "---|" * (len(at) + 1)]
    for name, factors in schedule_factors().items():
        lines.append(f"| {name} | {' | '.join(f'{factors[t]:.4f}' for t in at)} |")
    return lines


def schedules_figure() -> Figure:
    """Return the same as a figure."""
    at, factors, lrs = range(0, STEPS, 50), schedule_factors(), schedule()
    only = tuple(Line(name, at, [values[t] for t in at]) for name, values in factors.items())
    with_lr = tuple(Line(name, at, [lrs[t] * values[t] for t in at]) for name, values in factors.items())
    return grid_figure(
        f"m = {TIMES}, peak LR {PEAK}, weight decay {DECAY}, {STEPS:,} steps",
        [
            Picture("factor", "", partial(draw_lines, lines=only, log=True)),
            Picture("LR * factor", "", partial(draw_lines, lines=with_lr)),
        ],
    )


def ridge() -> list[str]:
    """Return the best weight decay at every LR, and the product of both with the steps, as lines of Markdown."""
    trials = known("ridge")
    steps = int(sweep_file("ridge").flags["train-iters"])
    lines = ["| base LR | best weight decay | LR * weight decay * steps | loss there |", "|---|---|---|---|"]
    for lr in sorted({trial.lr for trial in trials}):
        own = [trial for trial in trials if trial.lr == lr]
        decays = np.log2(np.array([[trial.weight_decay] for trial in own], dtype=float))
        surface = fit(decays, np.array([trial.loss for trial in own]))
        if surface is None or not decays.min() < surface.minimum[0] < decays.max():
            lines.append(f"| 2^{math.log2(lr):g} | outside what was tried | | |")
            continue
        best = float(2 ** surface.minimum[0])
        lines.append(f"| 2^{math.log2(lr):g} | {best:.2g} | {lr * best * steps:.1f} | {surface.value:.4f} |")
    return lines


def ridge_figure() -> Figure:
    """Return the loss over LR and weight decay."""
    return grid_figure("loss over base LR and weight decay, 1,000 steps", heat_maps(study(known("ridge"))))


FINDINGS: dict[str, Callable[[], list[str]]] = {
    "sweeps": sweeps,
    "map": where_it_holds,
    "losses": at_proxy_lr,
    "forecasts": forecasts,
    "warmups": warmups,
    "spectrum": spectrum,
    "ridge": ridge,
    "schedules": schedules,
}
"""Tables of the page, by name."""
DRAWN: dict[str, Callable[[], Figure]] = {
    "warmup_exp": warmup_figure,
    "spectrum": spectrum_figure,
    "ridge": ridge_figure,
    "schedules": schedules_figure,
}
"""Figures of sweeps that are not about an optimum, by the folder they are put in."""
SHOWN_WITH = {name: "warmups" for name, _ in WARMUPS.values() if name.startswith("warmup")} | {
    "singular_values": "spectrum"
}
"""In which table of the page a sweep stands that has none of its own."""
