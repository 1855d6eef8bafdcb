"""A selfcheck as one HTML page and as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from megatron_patch.files.selfcheck_json import Judged, Selfcheck
from megatron_patch.files.selfcheck_json import Line as CheckLine
from megatron_patch.report.drawing import DARK, DASHES, LIGHT, Line, Picture, draw_lines
from megatron_patch.report.page import figures, template
from megatron_patch.report.tables import Cell, Table, exact, number

STYLES = {Judged.PASS: "green", Judged.FAIL: "bold red", Judged.SKIPPED: "dim", Judged.WAITING: "yellow"}
WORDS = {
    Judged.PASS: "passed",
    Judged.FAIL: "failed",
    Judged.SKIPPED: "left out",
    Judged.WAITING: "not judged yet",
}


def verdict(found: Selfcheck) -> str:
    """Return in one sentence how it went."""
    counts = found.counts
    text = ", ".join(f"{counts[judged]} {word}" for judged, word in WORDS.items() if counts[judged])
    return f"{text}, in {found.seconds:.0f} s on {found.device}"


def selfcheck_page(found: Selfcheck) -> str:
    """Return the text of one HTML page that loads nothing else."""
    shown = [line for line in found.lines if line.judged is not Judged.SKIPPED]
    skipped = [line for line in found.lines if line.judged is Judged.SKIPPED]
    rows = tuple(
        (
            Cell(line.judged.value),
            Cell(line.name),
            Cell(line.compared),
            number(line.figure),
            number(line.bound),
            Cell(line.why),
            number(line.seconds),
        )
        for line in shown
    )
    names = ("", "line", "compared", "figure", "bound", "remark", "seconds")
    left_out = tuple((Cell(line.name), Cell(line.compared), Cell(line.why)) for line in skipped)
    return template("selfcheck.html").render(
        title=f"Selfcheck on {found.device}",
        verdict=verdict(found) + ("" if found.complete else "; it has not ended"),
        light=LIGHT,
        dark=DARK,
        failed=[line for line in shown if line.judged is Judged.FAIL],
        table=Table(names, rows),
        skipped=Table(("line", "compared", "why"), left_out) if left_out else None,
        pictures=figures(loss_pictures(found.series), "l"),
        machine=Table(("name", "value"), tuple((Cell(k), exact(v)) for k, v in flat(found.machine).items())),
    )


def loss_pictures(series: Mapping[str, Any]) -> list[Picture]:
    """Return the losses of all runs in one picture, if there are any."""
    if not series:
        return []
    longest = max(map(len, series.values()))
    lines = [
        # A resumed run's are the last ones.
        Line(name, range(longest - len(losses) + 1, longest + 1), losses, dashes=DASHES[place // len(LIGHT) % 3])
        for place, (name, losses) in enumerate(series.items())
    ]

    def draw(axes: Axes) -> None:
        draw_lines(axes, lines, x_label="step")
        axes.set_ylabel("loss")

    ends = ", ".join(f"{name} {losses[-1]:.4f}" for name, losses in series.items())
    return [Picture("Training loss of each run", f"Last losses: {ends}", draw)]


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested facts with names like ``versions torch``."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name} ")
        else:
            found[prefix + name] = value
    return found


def line_text(line: CheckLine) -> str:
    """Return what is printed of a line when it has been judged."""
    figure = "" if line.figure is None else f" {line.figure:.3g}"
    bound = "" if line.bound is None else f" (at most {line.bound:g})"
    return f"{line.judged.value:7} {line.name}:{figure}{bound if figure else ''} {line.why}".rstrip()


def print_selfcheck(found: Selfcheck, console: Console | None = None) -> None:
    """Print the table."""
    console = console or Console(highlight=False)
    table = TerminalTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "line", "compared"):
        table.add_column(name, overflow="fold")
    for name in ("figure", "bound"):
        table.add_column(name, no_wrap=True, justify="right")
    for line in found.lines:
        text = line.compared if line.judged is not Judged.SKIPPED else f"{line.compared} [{line.why}]"
        numbers = ["–" if value is None else f"{value:.3g}" for value in (line.figure, line.bound)]
        table.add_row(Text(line.judged.value, STYLES[line.judged]), Text(line.name), Text(text), *numbers)
    console.print(table)
    console.print(Text(verdict(found)), soft_wrap=True)
