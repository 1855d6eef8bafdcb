"""The figures and tables of docs/evidence.md, drawn from what docs/evidence/ holds; no run is needed.

    python benchmarks/evidence_figures.py [NAME ...]

For every sweep: NAME/transfer.png, losses over LR; NAME/mechanism.png, what was measured in the layers; and its
table in docs/evidence.md, between the lines `<!-- NAME -->` and `<!-- end -->`.
"""

import argparse
import csv
import math
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from evidence import TABLES, known, names

from megatron_patch.fit.curves import Study, study
from megatron_patch.fit.report_card import Grade, report_card
from megatron_patch.report.charts_sweep import transfer_pictures
from megatron_patch.report.drawing import Line, Picture, draw_lines, grid_figure, png

PAGE = TABLES.parent / "evidence.md"
Key = tuple[int, str]
"""Width and rule."""


class Measured:
    """The rows of a layers.csv whose LR is nearest to the proxy's optimum, matrices of one seed."""

    def __init__(self, path: Path, lr: float) -> None:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["layer"].startswith("decoder.")]
        seed = min((row["seed"] for row in rows), default="")
        rows = [row for row in rows if row["seed"] == seed]
        self.lr = min((float(row["lr"]) for row in rows), key=lambda one: abs(math.log2(one / lr)))
        self.rows = [row for row in rows if float(row["lr"]) == self.lr]
        self.keys: list[Key] = sorted({(int(row["hidden_size"]), row["rule"]) for row in self.rows})

    def median(self, key: Key, column: str) -> dict[int, float]:
        """Return a quantity over the iterations, the median over the matrices."""
        by_iteration: dict[int, list[float]] = {}
        for row in self.rows:
            if (int(row["hidden_size"]), row["rule"]) == key and row[column]:
                by_iteration.setdefault(int(row["iteration"]), []).append(float(row[column]))
        return {iteration: statistics.median(values) for iteration, values in sorted(by_iteration.items())}

    def layers_half_way(self, key: Key, column: str) -> dict[str, float]:
        """Return a quantity of every matrix at the measured iteration nearest to half of the run."""
        own = [row for row in self.rows if (int(row["hidden_size"]), row["rule"]) == key and row[column]]
        half = max(int(row["iteration"]) for row in own) / 2
        at = min({int(row["iteration"]) for row in own}, key=lambda one: abs(one - half))
        return {row["layer"]: float(row[column]) for row in own if int(row["iteration"]) == at}


def named(key: Key, proxy: Key) -> str:
    """Return what a curve is called."""
    return f"proxy, {key[0]}" if key == proxy else f"{key[1]}, {key[0]}"


def over_time(measured: Measured, column: str, proxy: Key | None) -> Callable[..., None]:
    """Return what draws a quantity of every width and rule over the iterations, over the proxy's where one is given."""
    base = measured.median(proxy, column) if proxy else {}
    lines = []
    for key in measured.keys:
        values = measured.median(key, column)
        if proxy:
            values = {i: value / base[i] for i, value in values.items() if i in base and key != proxy}
        if values:
            lines.append(Line(named(key, proxy or measured.keys[0]), tuple(values), tuple(values.values())))
    return partial(draw_lines, lines=lines, log=True, references=[("1", 1.0)] if proxy else [])


def half_way(measured: Measured, proxy: Key) -> Callable[..., None]:
    """Return what draws the alignment ratio of every matrix at half time."""
    lines = []
    for key in measured.keys:
        values = list(measured.layers_half_way(key, "alignment_ratio").values())
        lines.append(Line(named(key, proxy), range(1, len(values) + 1), values, marker="o"))
    return partial(draw_lines, lines=lines, log=True, references=[("1", 1.0)], x_label="matrix, in the model's order")


def mechanism(measured: Measured, proxy: Key) -> list[Picture]:
    """Return the pictures of what weight decay does to the layers."""
    return [
        Picture("relative representation change, over the proxy's", "", over_time(
            measured, "relative_representation_change", proxy)),
        Picture("relative update, over the proxy's", "", over_time(measured, "relative_update", proxy)),
        Picture("alignment ratio", "", over_time(measured, "alignment_ratio", None)),
        Picture("alignment ratio of every matrix, half-way", "", half_way(measured, proxy)),
    ]  # fmt: skip


def table(found: Study) -> list[str]:
    """Return the report card as lines of Markdown."""
    lines = [
        "| rule | width | shift of the optimum, octaves | loss lost by the proxy's LR | loss at it | best loss |",
        "|---|---|---|---|---|---|",
    ]
    for name in found.labels:
        proxy = found.proxy(name)
        if proxy and not any("(proxy)" in line for line in lines):
            optimum = f"2^{proxy.optimum.log2_lr:.2f}" if proxy.optimum else f"none: {proxy.refusal}"
            lines.append(f"| (proxy) | {proxy.hidden_size} | optimum {optimum} | | | {proxy.best:.4f} |")
    return [*lines, *(row(grade) for grade in report_card(found))]


def row(grade: Grade) -> str:
    """Return a line of the table."""
    lost = "" if grade.lost is None else f"{'at least ' if grade.lost_at_least else ''}{grade.lost:.4f}"
    at = "" if grade.transferred is None else f"{grade.transferred:.4f}"
    shift = grade.shift.text if grade.shift else grade.remarks
    return f"| {grade.label} | {grade.curve.hidden_size} | {shift} | {lost} | {at} | {grade.curve.best:.4f} |"


def write_table(name: str, lines: Sequence[str]) -> None:
    """Put a table between its two lines in docs/evidence.md, if they are there."""
    page = PAGE.read_text()
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    PAGE.write_text(pattern.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], page))


def draw(name: str) -> None:
    """Write the figures and the table of one sweep."""
    trials = known(name)
    if not trials:
        print(f"{name}: no runs yet")
        return
    found = study(trials)
    grades = report_card(found)
    folder = TABLES / name
    (folder / "transfer.png").write_bytes(
        png(grid_figure(f"{name}: loss over base LR", transfer_pictures(found, grades)))
    )
    start = next((c.optimum for c in map(found.proxy, found.labels) if c and c.optimum), None)
    layers = folder / "layers.csv"
    if start and layers.exists():
        measured = Measured(layers, 2**start.log2_lr)
        proxy = measured.keys[0]
        figure = grid_figure(
            f"{name}: medians over the matrices at base LR {measured.lr:.4g}", mechanism(measured, proxy)
        )
        (folder / "mechanism.png").write_bytes(png(figure))
    write_table(name, table(found))
    print(*table(found), sep="\n")


def main() -> None:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; default: all")
    for name in parser.parse_args().sweeps or names():
        draw(name)


if __name__ == "__main__":
    main()
