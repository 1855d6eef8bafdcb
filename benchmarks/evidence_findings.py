"""The tables of docs/evidence.md that put several sweeps together, or fit something else than an optimum."""

import csv
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from evidence import known, sweep_file, tables
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from megatron_patch.fit.curves import Curve, study
from megatron_patch.fit.report_card import Grade, report_card
from megatron_patch.report.charts_sweep import Trace, draw_losses, heat_maps
from megatron_patch.report.drawing import INK, LIGHT, Picture, grid_figure
from megatron_patch.runs.trial import Trial
from megatron_patch.theory.equilibrium import top_singular_value_scale

MAP = ("length_500", "length_1000", "transfer", "batch_512", "swept_1000")
"""Sweeps of the same rules over the same widths, at other lengths, batches and protocols."""
MAPPED = ("standard", "independent", "sqrt")
WARMUPS = {
    "10% linear": ("length_1000", "none"),
    "50% linear": ("warmup_linear", "none"),
    "10% linear, exp 50%": ("warmup_exp", "none"),
    "10% linear, decay-away": ("warmup_decay_away", "none"),
    "10% linear, independent scaling": ("length_1000", "independent"),
}
"""What was trained at width 128: its sweep and rule."""
WIDE = 128
COLLAPSED = ("linear_qkv/q", "linear_qkv/k")
"""Matrices that some runs of the spectrum let decay to nothing, with the attention."""


def signed(text: str) -> str:
    """Return numbers in a table with a minus sign of their own."""
    return text.replace("| -", "| −")


def where_it_holds() -> list[str]:
    """Return shift and lost loss of every rule, a row for each sweep of `MAP`."""
    lines = [
        "| steps | tokens a step | over the wide width | embedding and gains | "
        + " | ".join(f"{rule}: shift | loss lost" for rule in MAPPED)
        + " |",
        "|" + "---|" * (4 + 2 * len(MAPPED)),
    ]
    for name in MAP:
        if not (trials := known(name)):
            continue
        flags = sweep_file(name).flags
        tokens = int(flags["global-batch-size"]) * int(flags["seq-length"])
        grades = {grade.label: grade for grade in report_card(study(trials))}
        cells = [f"{int(flags['train-iters']):,}", f"{tokens:,}", f"{tokens / WIDE:g}"]
        cells.append("frozen" if flags.get("vector-lr") else "swept along")
        for rule in MAPPED:
            cells += shift_and_loss(grades.get(rule))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def shift_and_loss(grade: Grade | None) -> list[str]:
    """Return two cells, empty where nothing was found."""
    if grade is None or grade.shift is None:
        return ["", ""]
    return [grade.shift.text, "" if grade.lost is None else f"{grade.lost:.4f}"]


def at_width(sweep: str, rule: str) -> list[Trial]:
    """Return the trials of a rule at the wide width."""
    return [trial for trial in known(sweep) if trial.hidden_size == WIDE and trial.rule == rule]


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
    return grid_figure(
        "width 128 without a rule, under warmups", [Picture("", "", partial(draw_losses, traces=traces, limits=limits))]
    )


def spectrum_rows() -> list[dict[str, str]]:
    """Return what the last measured iteration of every run of the sweep says of its matrices."""
    with (tables("spectrum") / "layers.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["layer"].startswith("decoder.")]
    last = max(int(row["iteration"]) for row in rows if row["top_singular_value"])
    return [row for row in rows if int(row["iteration"]) == last]


def exponents(rows: Sequence[dict[str, str]], column: str) -> NDArray[np.float64]:
    """Return exponents of LR, weight decay and width [3] of a quantity, and their standard errors [3], stacked.

    Least squares of its log; every matrix has a factor of its own.
    """
    layers = sorted({row["layer"] for row in rows})
    logs = [[math.log(float(row[key])) for key in ("lr", "weight_decay", "hidden_size")] for row in rows]
    own = [[float(row["layer"] == layer) for layer in layers] for row in rows]
    x, y = np.hstack([np.array(logs), np.array(own)]), np.log([float(row[column]) for row in rows])
    solution, *_ = np.linalg.lstsq(x, y)
    residual = y - x @ solution
    covariance = np.linalg.inv(x.T @ x) * float(residual @ residual) / (len(y) - x.shape[1])
    return np.stack([solution[:3], np.sqrt(np.diag(covariance)[:3])])


def spectrum() -> list[str]:
    """Return the fitted exponents of every kind of matrix beside those of arXiv 2510.15262, as lines of Markdown."""
    rows = spectrum_rows()
    columns = ("top_singular_value", "weight_norm")
    lines = [
        "| matrix | top singular value: LR | weight decay | width | Frobenius norm: LR | weight decay | width |",
        "|---|---|---|---|---|---|---|",
        "| expected | 1/2 | −1/2 | 3/4 | 1/2 | −1/2 | 1 |",
    ]
    for kind in sorted({kind_of(row) for row in rows}):
        own = [row for row in rows if kind_of(row) == kind]
        found = [exponents(own, column) for column in columns]
        cells = [f"{value:+.2f} ± {error:.2f}" for each in found for value, error in zip(*each, strict=True)]
        lines.append(f"| {kind} | {' | '.join(cells).replace('-', '−')} |")
    return lines


def kind_of(row: dict[str, str]) -> str:
    """Return what a matrix is called in every layer: `linear_qkv/v`."""
    return row["layer"].rpartition(".")[2]


def spectrum_figure() -> Figure:
    """Return top singular values over `sqrt(eta / lambda) d^0.75`, and gains of sublayers over the width."""
    rows = spectrum_rows()
    widths = sorted({int(row["hidden_size"]) for row in rows})

    def singular(axes: Axes) -> None:
        for place, width in enumerate(widths):
            own = [row for row in rows if int(row["hidden_size"]) == width and kind_of(row) not in COLLAPSED]
            x = [top_singular_value_scale(float(r["lr"]), float(r["weight_decay"]), width) for r in own]
            y = [float(row["top_singular_value"]) for row in own]
            axes.plot(x, y, "o", markersize=3, color=LIGHT[place], label=f"width {width}")
        ends = np.array(axes.get_xlim())
        axes.plot(ends, statistics.median(np.array(y) / np.array(x)) * ends, ":", color=INK)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
        axes.set_xlabel("sqrt(LR / weight decay) * width^0.75")
        axes.legend(frameon=False)

    with (tables("spectrum") / "sublayers.csv").open(newline="") as file:
        gains = list(csv.DictReader(file))
    last = max(int(row["iteration"]) for row in gains)

    def gain(axes: Axes) -> None:
        for place, layer in enumerate(sorted({row["layer"] for row in gains})):
            own = [row for row in gains if row["layer"] == layer and int(row["iteration"]) == last]
            medians = [
                statistics.median(float(row["gain"]) for row in own if int(row["hidden_size"]) == width)
                for width in widths
            ]
            axes.plot(widths, medians, "o-", color=LIGHT[place], label=layer.removeprefix("decoder."))
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("width")
        axes.legend(frameon=False, fontsize=8)

    return grid_figure(
        "steady state at a constant LR, no rule",
        [
            Picture("top singular values, without q and k", "", singular),
            Picture("sublayer gain, median over the runs", "", gain),
        ],
    )


def ridge() -> list[str]:
    """Return what the fit of loss over LR and weight decay says."""
    (picture,) = heat_maps(study(known("ridge")))
    return [picture.caption]


def ridge_figure() -> Figure:
    """Return the loss over LR and weight decay."""
    return grid_figure("loss over base LR and weight decay, 1,000 steps", heat_maps(study(known("ridge"))))


FINDINGS: dict[str, Callable[[], list[str]]] = {
    "map": where_it_holds,
    "warmups": warmups,
    "spectrum": spectrum,
    "ridge": ridge,
}
"""Tables of the page, by name."""
DRAWN: dict[str, Callable[[], Figure]] = {
    "warmup_exp": warmup_figure,
    "spectrum": spectrum_figure,
    "ridge": ridge_figure,
}
"""Figures of sweeps that are not about an optimum, by the folder they are put in."""
SHOWN_WITH = {name: "warmups" for name, _ in WARMUPS.values() if name.startswith("warmup")}
"""In which table of the page a sweep stands that has none of its own."""
