"""Singular values in docs/evidence.md: fitted exponents, the shape of the spectrum, the figure."""

import csv
import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from evidence import SETTINGS, tables
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from megatron_patch.report.drawing import INK, LIGHT, Line, Picture, draw_lines, grid_figure
from megatron_patch.theory.equilibrium import top_singular_value_scale

COLLAPSED = ("linear_qkv/q", "linear_qkv/k")
"""Matrices that some runs of the spectrum let decay to nothing, with the attention."""


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


def shapes() -> Iterator[Line]:
    """Yield the spectrum of every run of `singular_values`: its singular values over the scale that is expected of the
    largest, over their place as a share of the width; medians over the matrices, without q and k."""
    with (tables("singular_values") / "singular_values.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if kind_of(row) not in COLLAPSED]
    runs = sorted(
        {tuple(row[setting] for setting in SETTINGS) for row in rows},
        key=lambda run: [float(run[i]) for i in (0, 2, 3)],
    )
    for place, run in enumerate(runs):
        width, lr, decay = int(run[0]), float(run[2]), float(run[3])
        own = [row for row in rows if tuple(row[setting] for setting in SETTINGS) == run]
        scale = top_singular_value_scale(lr, decay, width)
        places = sorted({int(row["place"]) for row in own})
        medians = [
            statistics.median(float(row["value"]) for row in own if int(row["place"]) == i) / scale for i in places
        ]
        name = f"{width}, LR 2^{math.log2(lr):g}, {decay:g}"
        yield Line(name, [(i + 0.5) / width for i in places], medians, color=LIGHT[place % len(LIGHT)])


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
            Picture(
                "all singular values / (sqrt(LR / weight decay) * width^0.75)",
                "",
                partial(
                    draw_lines, lines=tuple(shapes()), log=True, x_label="place / width; lines: width, LR, weight decay"
                ),
            ),
        ],
    )
