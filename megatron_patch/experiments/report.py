"""The report on runs: one HTML page that needs nothing else, the overview as a PNG file, a summary for the terminal."""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_patch.errors import ConfigError
from megatron_patch.experiments import pictures, tables
from megatron_patch.experiments.drawing import DARK, LIGHT, Picture, png, small_figure, svg, wide_figure
from megatron_patch.experiments.output import OutputFiles
from megatron_patch.experiments.runs import Run

MOST_DETAILED = 8
"""Runs of which one page shows everything; with more, it shows the training of each and leaves out the rest."""


@dataclass(frozen=True)
class _Figure:
    title: str
    caption: str
    svg: Markup


def write_report(runs: Sequence[Run], output: str) -> list[str]:
    """Write the report on `runs` and return the files: the page and the picture beside it, or only the picture.

    Args:
        runs: from `read_runs`.
        output: ends in ``.html`` (the page; the overview comes beside it as .png) or in ``.png`` (the overview alone).

    Raises:
        ConfigError: a name with another ending, a file that cannot be written, or a picture of runs without losses.
    """
    stem, ending = os.path.splitext(output)
    if ending not in (".html", ".png") or os.path.isdir(output):
        raise ConfigError("--output", output, "a file that ends in .html or .png", "give another name")
    figure = pictures.overview(runs[0]) if len(runs) == 1 else _comparison(runs)
    paths = ([f"{stem}.png"] if figure else []) + ([output] if ending == ".html" else [])
    if not paths:
        raise ConfigError("--output", output, "a page: these runs recorded no losses to draw", "let it end in .html")
    try:
        with OutputFiles(paths, overwrite=True) as files:
            for path in paths:
                content = png(figure) if figure and path.endswith(".png") else html_page(runs).encode()
                with open(files.temporary(path), "wb") as file:
                    file.write(content)
            files.publish()
    except ConfigError as error:
        raise ConfigError("--output", error.got, error.expected, error.fix) from None
    return paths[::-1]


def _comparison(runs: Sequence[Run]) -> Figure | None:
    drawn = pictures.comparison_pictures(runs)
    return wide_figure(f"{len(runs)} runs", drawn) if drawn else None


def print_summary(runs: Sequence[Run], files: Sequence[str], console: Console | None = None) -> None:
    """Print how each run went, what a reader should know of its files, and where the report is.

    Args:
        runs: from `read_runs`.
        files: from `write_report`.
        console: where to; by default standard output.
    """
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    for column in ("iterations", "time", "training loss", "validation", "best"):
        table.add_column(column, no_wrap=True)
    for run in runs:
        iterations = tables.iterations_text(run) + ("" if run.status == "finished" else f" ({run.status})")
        losses = tables.train_text(run), tables.loss_text(run.final_loss), tables.best_text(run)
        table.add_row(Text(run.name), iterations, tables.duration_text(run.seconds), *losses)
    console.print(table)
    for run in runs:
        for note in run.notes:
            console.print(Text(f"{run.name}: {note}"), soft_wrap=True)
    if len(runs) == 1:
        console.print(Text(f"files:   {os.path.relpath(runs[0].folder)}"), soft_wrap=True)
    for path in files:
        console.print(Text(f"{'report:' if path.endswith('.html') else 'picture:':8} {path}"), soft_wrap=True)


def html_page(runs: Sequence[Run]) -> str:
    """Return the report as the text of one HTML page that loads nothing else."""
    environment = Environment(
        loader=FileSystemLoader(os.path.dirname(__file__)), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    several = len(runs) > 1
    detailed = len(runs) <= MOST_DETAILED
    return environment.get_template("report_template.html").render(
        title=f"{len(runs)} runs" if several else f"Run {runs[0].name}",
        subtitle=_subtitle(runs, detailed),
        light=LIGHT,
        dark=DARK,
        overall=tables.runs_table(runs) if several else None,
        comparison=_figures(pictures.comparison_pictures(runs), "all") if several else [],
        runs=[_section(run, f"r{place}", detailed) for place, run in enumerate(runs)],
    )


def _subtitle(runs: Sequence[Run], detailed: bool) -> str:
    text = "megatron-patch: layer-wise learning rate and weight decay across width."
    if not detailed:
        text += f" More than {MOST_DETAILED} runs: for alignment and all arguments of a run, make a report of it alone."
    return text


def _section(run: Run, prefix: str, detailed: bool) -> dict[str, Any]:
    """Return what the template shows of a run."""
    section: dict[str, Any] = {
        "name": run.name,
        "notes": run.notes,
        "facts": tables.facts(run),
        "training": _figures(pictures.training_pictures(run), f"{prefix}t"),
        "classes": tables.class_table(run),
        "rule": tables.rule_text(run),
        "settings": tables.flags(run),
        "environment": tables.environment(run),
    }
    if detailed:
        section |= {
            "parameters": tables.parameter_table(run),
            "alignment": _figures(pictures.alignment_pictures(run), f"{prefix}a"),
            "kinds": tables.kind_table(run),
            "layers": tables.layer_table(run),
            "equilibrium": _figures(pictures.equilibrium_pictures(run), f"{prefix}e"),
            "arguments": tables.all_arguments(run),
        }
    return section


def _figures(drawn: Iterable[Picture], prefix: str) -> list[_Figure]:
    return [
        # Only numbers, names escaped by matplotlib, and a label that svg() escapes.
        _Figure(p.title, p.caption, Markup(svg(small_figure(p), f"{prefix}{place}-", p.text)))
        for place, p in enumerate(drawn)
    ]
