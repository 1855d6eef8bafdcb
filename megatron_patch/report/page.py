"""The report on runs: one HTML page that needs nothing else, the overview as a PNG file, a summary for the terminal."""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template
from markupsafe import Markup
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_patch.errors import ConfigError
from megatron_patch.files.output import OutputFiles
from megatron_patch.files.run_json import Status
from megatron_patch.report import charts_layers, charts_run, sweep_section, tables
from megatron_patch.report.charts_widths import comparison_galleries, comparisons
from megatron_patch.report.drawing import DARK, LIGHT, Picture, grid_figure, png, small_figure, wide_figure
from megatron_patch.report.svg import svg
from megatron_patch.report.sweep_section import Sweep
from megatron_patch.runs.run import Run, read_runs

MOST_DETAILED = 8
"""Runs of which one page shows everything; with more, it shows the loss of each and leaves out the rest."""
TERMINAL_COLUMNS = 8
"""Columns of the report card that the summary shows."""
MOST_IN_GRID = 9
"""Pictures of a sweep's PNG."""


@dataclass(frozen=True)
class _Figure:
    title: str
    caption: str
    svg: Markup


def write_report(runs: Sequence[Run], output: str, sweep: Sweep | None = None, notes: Sequence[str] = ()) -> list[str]:
    """Write the report on `runs` and return the files: the page and the picture beside it, or only the picture.

    Args:
        runs: from `read_runs`; may be empty if there is a sweep.
        output: ends in ``.html`` (the page; the overview comes beside it as .png) or in ``.png`` (the overview alone).
        sweep: what the runs, or a table of trials, are part of.
        notes: what a reader of the whole should know.

    Raises:
        ConfigError: a name with another ending, a file that cannot be written, or a picture of runs without losses.
    """
    stem, ending = os.path.splitext(output)
    if ending not in (".html", ".png") or os.path.isdir(output):
        raise ConfigError("--output", output, "a file that ends in .html or .png", "give another name")
    figure = _overview(runs, sweep)
    paths = ([f"{stem}.png"] if figure else []) + ([output] if ending == ".html" else [])
    if not paths:
        raise ConfigError("--output", output, "a page: these runs recorded no losses to draw", "let it end in .html")
    try:
        with OutputFiles(paths, overwrite=True) as files:
            for path in paths:
                is_picture = figure and path.endswith(".png")
                content = png(figure) if figure and is_picture else html_page(runs, sweep, notes).encode()
                with open(files.temporary(path), "wb") as file:
                    file.write(content)
            files.publish()
    except ConfigError as error:
        raise ConfigError("--output", error.got, error.expected, error.fix) from None
    return paths[::-1]


def report_on_run(folder: str) -> str:
    """Write the report on the run whose metrics folder is `folder` into it, and return the page's name.

    Raises:
        ConfigError: as `read_runs` and `write_report` do.
    """
    return write_report(read_runs([folder]), os.path.join(folder, "report.html"))[0]


def _overview(runs: Sequence[Run], sweep: Sweep | None) -> Figure | None:
    if sweep:
        drawn = sweep.curves + sweep.heat_maps
        return grid_figure("Loss against base LR", drawn[:MOST_IN_GRID])
    if len(runs) == 1:
        return charts_run.overview(runs[0])
    drawn = charts_run.comparison_pictures(runs)
    return wide_figure(f"{len(runs)} runs", drawn) if drawn else None


def print_summary(
    runs: Sequence[Run],
    files: Sequence[str],
    console: Console | None = None,
    sweep: Sweep | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Print how each run went, the report card, what a reader should know of the files, and where the report is.

    Args:
        runs: from `read_runs`.
        files: from `write_report`.
        console: where to; by default standard output.
        sweep, notes: as for `write_report`.
    """
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    for column in ("iterations", "time", "training loss", "validation", "best"):
        table.add_column(column, no_wrap=True)
    for run in runs:
        iterations = tables.iterations_text(run) + ("" if run.status == Status.FINISHED else f" ({run.status})")
        losses = tables.train_text(run), tables.loss_text(run.final_loss), tables.best_text(run)
        table.add_row(Text(run.name), iterations, tables.duration_text(run.seconds), *losses)
    if runs:
        console.print(table)
    for run in runs:
        for note in run.notes:
            console.print(Text(f"{run.name}: {note}"), soft_wrap=True)
    for note in notes:
        console.print(Text(note), soft_wrap=True)
    if sweep:
        _print_card(sweep, console)
    if len(runs) == 1:
        console.print(Text(f"files:   {os.path.relpath(runs[0].folder)}"), soft_wrap=True)
    for path in files:
        console.print(Text(f"{'report:' if path.endswith('.html') else 'picture:':8} {path}"), soft_wrap=True)


def _print_card(sweep: Sweep, console: Console) -> None:
    card = sweep_section.card_table(sweep.grades)
    if card.rows:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="transfer report card", title_justify="left")
        for column in card.columns[:TERMINAL_COLUMNS]:
            table.add_column(column, overflow="fold")
        for row in card.rows:
            table.add_row(*(Text(cell.text) for cell in row[:TERMINAL_COLUMNS]))
        console.print(table)
        for grade in sweep.grades:
            if grade.remarks:
                console.print(Text(f"{grade.label}, width {grade.curve.hidden_size}: {grade.remarks}"), soft_wrap=True)
    for sentence in sweep.verdicts:
        console.print(Text(sentence), soft_wrap=True)


def template(name: str) -> Template:
    """Return one of the pages' templates."""
    loader = FileSystemLoader(os.path.dirname(__file__))
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(name)


def html_page(runs: Sequence[Run], sweep: Sweep | None = None, notes: Sequence[str] = ()) -> str:
    """Return the report as the text of one HTML page that loads nothing else."""
    several = len(runs) > 1
    detailed = len(runs) <= MOST_DETAILED
    title = f"{len(runs)} runs" if several else f"Run {runs[0].name}" if runs else ""
    if sweep:
        title = f"Transfer across width: {len(sweep.study.trials)} trials"
    return template("page.html").render(
        title=title,
        subtitle=_subtitle(runs, detailed),
        light=LIGHT,
        dark=DARK,
        notes=notes,
        sweep=_sweep_section(sweep, runs) if sweep else None,
        overall=tables.runs_table(runs) if several else None,
        comparison=figures(charts_run.comparison_pictures(runs), "all") if several else [],
        runs=[_section(run, f"r{place}", detailed) for place, run in enumerate(runs)],
    )


def _sweep_section(sweep: Sweep, runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the template shows of a sweep."""
    by_source = {run.file.path: run for run in runs}
    compared = []
    for place, comparison in enumerate(comparisons(sweep.study, by_source)):
        overall, by_kind = comparison_galleries(comparison)
        widest = comparison.members[-1].run
        compared.append(
            {
                "title": comparison.title,
                "lr": comparison.lr,
                "overall": figures([*overall, *charts_layers.warmup_pictures(widest)], f"w{place}o"),
                "by_kind": figures(by_kind, f"w{place}k"),
            }
        )
    return {
        "verdicts": sweep.verdicts,
        "card": sweep_section.card_table(sweep.grades),
        "proxy": sweep_section.proxy_text(sweep),
        "curves": figures(sweep.curves, "s"),
        "heat_maps": figures(sweep.heat_maps, "h"),
        "compared": compared,
        "trials": sweep_section.trials_table(sweep),
    }


def _subtitle(runs: Sequence[Run], detailed: bool) -> str:
    text = "megatron-patch: layer-wise learning rate and weight decay across width."
    if not detailed:
        text += f" More than {MOST_DETAILED} runs: for everything about one of them, make a report of it alone."
    return text


def _section(run: Run, prefix: str, detailed: bool) -> dict[str, Any]:
    """Return what the template shows of a run."""
    section: dict[str, Any] = {
        "name": run.name,
        "notes": run.notes,
        "facts": tables.facts(run),
        "training": figures(
            (charts_run.training_pictures if detailed else charts_run.loss_pictures)(run), f"{prefix}t"
        ),
        "classes": tables.class_table(run),
        "rule": tables.rule_text(run),
        "settings": tables.flags(run),
        "environment": tables.environment(run),
    }
    if detailed:
        section |= {
            "parameters": tables.parameter_table(run),
            "alignment": figures(charts_run.alignment_pictures(run), f"{prefix}a"),
            "kinds": tables.kind_table(run),
            "layers": tables.layer_table(run),
            "every_layer": figures(charts_layers.every_layer(run), f"{prefix}l"),
            "warmups": figures(charts_layers.warmup_pictures(run), f"{prefix}w"),
            "equilibrium": figures(charts_run.equilibrium_pictures(run), f"{prefix}e"),
            "arguments": tables.all_arguments(run),
        }
    return section


def figures(drawn: Iterable[Picture], prefix: str) -> list[_Figure]:
    """Return pictures for a template; `prefix` is put before their ids."""
    return [
        # Only numbers, names escaped by matplotlib, and a label that svg() escapes.
        _Figure(p.title, p.caption, Markup(svg(small_figure(p), f"{prefix}{place}-", p.text)))
        for place, p in enumerate(drawn)
    ]
