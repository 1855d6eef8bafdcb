"""The figures and tables of docs/evidence.md, drawn from what docs/evidence/ holds; no run is needed.

    python benchmarks/evidence_figures.py [NAME ...]

For every sweep that docs/evidence.md shows: NAME/transfer.png, losses over LR; NAME/mechanism.png, what was measured in
the layers. The tables stand in docs/evidence.md between a line `<!-- TABLE -->` and `<!-- end -->`: TABLE is a sweep,
`SWEEP forecast`, or one of several sweeps: `forecasts` and `FINDINGS`.
"""

import argparse
import re
from collections.abc import Callable
from functools import partial

from evidence import QUICK, TABLES, known, names, tables
from evidence_findings import DRAWN, FINDINGS, SHOWN_WITH
from evidence_forecast import course_of, forecast_table, forecasts
from evidence_layers import Key, Measured

from megatron_patch.fit.curves import Curve, Study, study
from megatron_patch.fit.report_card import Grade, report_card
from megatron_patch.report.charts_sweep import transfer_pictures
from megatron_patch.report.drawing import Line, Picture, draw_lines, grid_figure, png
from megatron_patch.report.sweep_section import sensitivity_text
from megatron_patch.theory.equilibrium import trajectory
from megatron_patch.theory.width import RULES

PAGE = TABLES.parent / "evidence.md"
BLOCK = re.compile(r"(<!-- ([\w ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
"""A table of the page: its first line, its name, what is written, its last line."""
FITTED = 3
"""Of fewer LRs nobody expects an optimum."""


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
            name = named(key, proxy or measured.keys[0])
            lines.append(Line(name, tuple(values), tuple(values.values()), color=measured.color(key)))
    return partial(draw_lines, lines=lines, log=True, references=[("1", 1.0)] if proxy else [])


def warmup_effect(name: str, measured: Measured, proxy: Key) -> Callable[..., None]:
    """Return what draws the relative update over the proxy's, measured and as the weight-norm model has it (eq. 38)."""
    course = course_of(name)
    base = measured.median(proxy, "relative_update")

    def predicted(key: Key) -> list[float]:
        rule, m = RULES[key[1]], key[0] / proxy[0]
        lr, decay = measured.lr * m**-rule.lr_exponent, course.weight_decay * m**rule.wd_exponent
        schedule = ((lr * factor, decay) for factor in course.factors)
        return [step.relative_update for step in trajectory(schedule, key[0] ** -0.5)]

    lines, of_proxy = [], predicted(proxy)
    for key in (key for key in measured.keys if key != proxy):
        values = {i: v / base[i] for i, v in measured.median(key, "relative_update").items() if i in base}
        model = predicted(key)
        color = measured.color(key)
        lines.append(Line(named(key, proxy), tuple(values), tuple(values.values()), color=color))
        told = [model[i - 1] / of_proxy[i - 1] for i in values]
        lines.append(Line("", tuple(values), told, dashes=":", color=color))
    return partial(draw_lines, lines=lines, log=True, references=[("1", 1.0)])


def half_way(measured: Measured, proxy: Key) -> Callable[..., None]:
    """Return what draws the alignment ratio of every matrix at half time."""
    lines = []
    for key in measured.keys:
        values = list(measured.layers_half_way(key, "alignment_ratio").values())
        places, color = range(1, len(values) + 1), measured.color(key)
        lines.append(Line(named(key, proxy), places, values, marker="o", color=color))
    return partial(draw_lines, lines=lines, log=True, references=[("1", 1.0)], x_label="matrix, in the model's order")


def mechanism(name: str, measured: Measured, proxy: Key) -> list[Picture]:
    """Return the pictures of what weight decay does to the layers."""
    update = Picture("relative update, over the proxy's", "", over_time(measured, "relative_update", proxy))
    if name in names():
        update = Picture(f"{update.title}; dotted: eq. 38", "", warmup_effect(name, measured, proxy))
    return [
        Picture("relative representation change, over the proxy's", "", over_time(
            measured, "relative_representation_change", proxy)),
        update,
        Picture("alignment ratio", "", over_time(measured, "alignment_ratio", None)),
        Picture("alignment ratio of every matrix, half-way", "", half_way(measured, proxy)),
    ]  # fmt: skip


def table(found: Study) -> list[str]:
    """Return the report card as lines of Markdown."""
    lines = [
        "| rule | width | shift of the optimum, octaves | loss lost by the proxy's LR | loss at it | best loss |"
        " LR sensitivity |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in found.labels:
        proxy = found.proxy(name)
        if proxy and not any("(proxy)" in line for line in lines):
            optimum = f"2^{proxy.optimum.log2_lr:.2f}" if proxy.optimum else f"none: {proxy.refusal}"
            lines.append(
                f"| (proxy) | {proxy.hidden_size} | optimum {optimum} | | | {proxy.best:.4f} | {sensitivity(proxy)} |"
            )
    return [*lines, *(row(grade) for grade in report_card(found))]


def row(grade: Grade) -> str:
    """Return a line of the table."""
    lost = "" if grade.lost is None else f"{'at least ' if grade.lost_at_least else ''}{grade.lost:.4f}"
    at = "" if grade.transferred is None else f"{grade.transferred:.4f}"
    trained = len(grade.curve.points)
    shift = grade.shift.text if grade.shift else f"{trained} LR trained so far" if trained < FITTED else grade.remarks
    told = sensitivity(grade.curve)
    return f"| {grade.label} | {grade.curve.hidden_size} | {shift} | {lost} | {at} | {grade.curve.best:.4f} | {told} |"


def sensitivity(curve: Curve) -> str:
    """Return the LR sensitivity of a curve, empty where it has no optimum."""
    return sensitivity_text(curve.optimum) if curve.optimum else ""


def block(name: str) -> list[str]:
    """Return the lines of a table of the page."""
    if name == "forecasts":
        return forecasts()
    if name in FINDINGS:
        return FINDINGS[name]()
    sweep, _, kind = name.partition(" ")
    return forecast_table(sweep) if kind else table(study(known(sweep)))


def write_tables() -> None:
    """Write every table of docs/evidence.md anew."""
    page = PAGE.read_text()
    PAGE.write_text(BLOCK.sub(lambda found: found[1] + "\n".join(block(found[2])) + "\n" + found[4], page))


def draw(name: str) -> None:
    """Write the figures of one sweep."""
    trials = known(name)
    if not trials:
        print(f"{name}: no runs yet")
        return
    found = study(trials)
    folder = tables(name)
    whole = [curve for curve in found.curves.values() if len(curve.points) >= FITTED]
    shown = study([trial for curve in whole for trial in curve.trials])
    pictures = transfer_pictures(shown, report_card(shown))
    (folder / "transfer.png").write_bytes(png(grid_figure(f"{name}: loss over base LR", pictures)))
    start = next((c.optimum for c in map(found.proxy, found.labels) if c and c.optimum), None)
    layers = folder / "layers.csv"
    if start and layers.exists():
        measured = Measured(layers, 2**start.log2_lr)
        title = f"{name}: medians over the matrices at base LR {measured.lr:.4g}"
        figure = grid_figure(title, mechanism(name, measured, measured.keys[0]))
        (folder / "mechanism.png").write_bytes(png(figure))
    if name == QUICK:
        print(*table(found), sep="\n")


def main() -> None:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; default: those shown")
    shown = sorted(path.name for path in TABLES.iterdir())
    for name in parser.parse_args().sweeps or shown:
        if name in DRAWN:
            (tables(name) / "figure.png").write_bytes(png(DRAWN[name]()))
        elif name not in SHOWN_WITH:
            draw(name)
    write_tables()


if __name__ == "__main__":
    main()
