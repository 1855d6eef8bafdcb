"""How pictures are drawn: style, colours, lines named where they end, PNG and SVG.

Drawn with matplotlib's figure objects alone, without pyplot and its global state. The colours can be told apart by
colour-blind readers, on a white page and on a black one.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

INK = "#24292f"
LIGHT = ("#0072b2", "#c44e00", "#00795a", "#a8437f", "#8a6400", "#2b87b8", "#6b5bb5", "#5f6b76")
DARK = ("#4aa8e8", "#ff8a4c", "#2fc79a", "#e58cc0", "#e0b040", "#86d2ff", "#b3a4ff", "#a9b4bf")
"""The colours of lines on a light and on a dark page: Okabe and Ito's, made darker and lighter."""
DASHES = ("-", "--", ":")
"""What tells lines of one colour apart."""

_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.xmargin": 0,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.7,
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron-patch",
    "path.simplify": False,  # every point of a line has its hover value
}


@dataclass(frozen=True)
class Line:
    """A line with a name; `low` and `high`, if given, bound the band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashes: str = "-"
    marker: str = ""
    faint: bool = False
    """Whether it is thin and grey, behind the others."""
    color: str = ""
    """One of `LIGHT`; by default that of its place among the lines of the picture."""


@dataclass(frozen=True)
class Picture:
    """One set of axes and what to say about it."""

    title: str
    text: str
    """For those who cannot see it: what is drawn, and the numbers that matter."""
    draw: Callable[[Axes], None]
    caption: str = ""


def draw_lines(
    axes: Axes,
    lines: Sequence[Line],
    log: bool = False,
    references: Sequence[tuple[str, float]] = (),
    x_label: str = "iteration",
) -> None:
    """Draw lines in the colours of their order, each with its name at its end, and horizontal dotted references.

    Args:
        axes: empty.
        lines: not empty.
        log: whether the y axis is logarithmic; values that are not positive are left out then.
        references: name and value of each.
        x_label: what x is; whole numbers.
    """
    if log:
        axes.set_yscale("log", nonpositive="mask")
    for place, line in enumerate(lines):
        if line.faint:
            axes.plot(line.x, line.y, color=INK, linewidth=0.8, alpha=0.35, zorder=1.5)
            continue
        color = line.color or LIGHT[place % len(LIGHT)]
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.15, linewidth=0)
        (artist,) = axes.plot(
            line.x, line.y, line.dashes, color=color, marker=line.marker, markersize=4, clip_on=not line.marker
        )
        artist.set_gid(hover(line.name))
    for _, value in references:
        axes.axhline(value, color=INK, linestyle=":", linewidth=1.1, alpha=0.7)
    _ticks(axes, log)
    axes.set_xlabel(x_label)
    ends = []
    for place, line in enumerate(lines):
        drawn = [(x, y) for x, y in zip(line.x, line.y, strict=True) if np.isfinite(y) and (y > 0 or not log)]
        if line.name and drawn:
            ends.append((line.name, *drawn[-1], line.color or LIGHT[place % len(LIGHT)]))
    right = axes.get_xlim()[1]
    name_ends(axes, [*ends, *((name, right, value, INK) for name, value in references)])


def hover(name: str, texts: Sequence[str] = ()) -> str:
    """Return what, set as the gid of a line, shows its name and the values of its nearest point under the pointer.

    Args:
        name: of the line.
        texts: what to say of every point; without it, its coordinates are read off the axes.
    """
    return _gid("hover", [name, list(texts)] if texts else [name])


def hover_cells(texts: Sequence[str]) -> str:
    """Return what, set as the gid of a collection of one path at many places, makes a text appear on each of them."""
    return _gid("cells", list(texts))


def _gid(kind: str, content: list[Any]) -> str:
    return f"{kind}:{quote(json.dumps(content), safe='')}:"


def _ticks(axes: Axes, log: bool) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if log:
        readable_log(axes)


def readable_log(axes: Axes) -> None:
    """Give a logarithmic y axis ticks and labels in plain numbers."""
    low, high = axes.get_ylim()
    decades = np.log10(high / low)
    if decades < 1.2:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def name_ends(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write names right of the axes, at the height where their lines end, moved apart where they would overlap.

    Args:
        axes: with its final limits.
        ends: name, x and y of the end of the line, color.
    """
    ends = sorted(ends, key=lambda end: end[2])
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [to_axes.transform((x, y)) for _, x, y, _ in ends]
    line_height = 9 * 1.25 / 72 / (axes.get_window_extent().height / axes.get_figure(root=True).dpi)  # type: ignore[union-attr]
    heights = _spread([float(y) for _, y in places], line_height)
    for (name, _, _, color), (x, y), height in zip(ends, places, heights, strict=True):
        leader = Line2D([x, 1.03], [y, height], linewidth=0.7, alpha=0.6, color=color, transform=axes.transAxes)
        leader.set_clip_on(False)
        axes.add_artist(leader)
        axes.text(1.04, height, name, color=color, fontsize=9, va="center", transform=axes.transAxes)


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Return rising `places` in [0, 1] moved as little as possible (least squares) so that neighbours are `gap` apart.

    >>> _spread([0.0, 0.5, 0.5], 0.25), _spread([0.0, 0.0], 0.25)
    ([0.0, 0.375, 0.625], [0.0, 0.25])
    """
    blocks: list[tuple[float, int]] = []  # neighbours that move together: sum of place - index * gap, number
    for index, place in enumerate(places):
        total, count = place - index * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            total, count = total + blocks[-1][0], count + blocks[-1][1]
            blocks.pop()
        blocks.append((total, count))
    means = [total / count for total, count in blocks for _ in range(count)]
    highest = 1 - (len(means) - 1) * gap
    return [max(0.0, min(mean, highest)) + index * gap for index, mean in enumerate(means)]


def small_figure(picture: Picture) -> Figure:
    """Return a figure of one picture, without its title, to be read on a phone too."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        figure.patch.set_alpha(0)
        picture.draw(figure.subplots())
    return figure


def wide_figure(title: str, pictures: Sequence[Picture]) -> Figure:
    """Return a figure with the first picture large and the others one above the other at its right."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 5.4) if len(pictures) > 1 else (7, 4.6), layout="constrained", dpi=130)
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
        grid = figure.add_gridspec(max(len(pictures) - 1, 1), 2 if len(pictures) > 1 else 1)
        for place, picture in enumerate(pictures):
            axes = figure.add_subplot(grid[:, 0] if place == 0 else grid[place - 1, 1])
            axes.set_title(picture.title)
            picture.draw(axes)
    return figure


def grid_figure(title: str, pictures: Sequence[Picture]) -> Figure:
    """Return a figure of pictures of equal size, up to three beside each other."""
    columns = min(len(pictures), 3 if len(pictures) != 4 else 2)
    rows = -(-len(pictures) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2 * columns, 3.5 * rows + 0.4), layout="constrained", dpi=130)
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
        for place, picture in enumerate(pictures):
            axes = figure.add_subplot(rows, columns, place + 1)
            axes.set_title(picture.title)
            picture.draw(axes)
    return figure


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file on white."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
