"""Matplotlib's drawing as SVG that follows the page's colours and answers the pointer."""

import html
import io
import json
import re
from typing import Any
from urllib.parse import unquote

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_patch.report.drawing import _STYLE, INK, LIGHT


def _hover_attribute(gid: re.Match[str]) -> str:
    return f' class="{gid[1]}" data-hover="{html.escape(unquote(gid[2]))}"'


def svg(figure: Figure, prefix: str, label: str) -> str:
    """Return a figure as an ``<svg>`` element, small, in the colours and the font of its page.

    Args:
        figure: from `small_figure`; the page defines the CSS variables --line0 to --line7.
        prefix: put before every id, so that no two pictures of a page share one.
        label: the text alternative.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    # Before ids are stripped and prefixed: these are no ids.
    text = re.sub(r' id="(hover|cells):([^":]*):"', _hover_attribute, buffer.getvalue())
    text = text[text.index("</defs>") + len("</defs>") : text.rindex("</svg>")]
    text = re.sub(r' id="[^"]*_\d+"| transform="rotate\(-0 [^"]*"|font-family: [^;]*; ', "", text)
    text = re.sub(r' (?:d|x|y)="[^"]*"', _round_numbers, text)
    text = re.sub(r"\n\s*", "\n", text).replace("xlink:href", "href")
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, mark + prefix)
    for place, color in enumerate(LIGHT):
        text = text.replace(color, f"var(--line{place})")
    width, height = figure.get_size_inches() * 72
    plots = html.escape(json.dumps([_plot(axes, width, height) for axes in figure.axes]))
    start = (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(label)}" data-plots="{plots}">'
    )
    return start + text.replace(INK, "currentColor") + "</svg>"


def _plot(axes: Axes, width: float, height: float) -> list[Any]:
    """Return how to read values off a plot: for x and y two places on the page, their values, and the scale."""
    box = axes.get_position()
    x = [box.x0 * width, box.x1 * width, *axes.get_xlim(), axes.get_xscale()]
    y = [(1 - box.y0) * height, (1 - box.y1) * height, *axes.get_ylim(), axes.get_yscale()]
    rounded = [[float(f"{v:.7g}") if isinstance(v, float) else v for v in map(_python, axis)] for axis in (x, y)]
    return [*rounded, axes.get_xlabel()]


def _python(value: Any) -> Any:
    return value if isinstance(value, str) else float(value)


def _round_numbers(attribute: re.Match[str]) -> str:
    numbers = re.sub(r"-?\d+\.\d{2,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), attribute[0])
    return " " + " ".join(numbers.split())
