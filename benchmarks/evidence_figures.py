"""The figures and tables of docs/evidence.md, drawn from what docs/evidence/ holds; no run is needed.

    python benchmarks/evidence_figures.py [NAME ...]

For every sweep that docs/evidence.md shows: NAME/transfer.png, losses over LR; NAME/mechanism.png, what was measured in
the layers; NAME/figure.png of what is not about an optimum. The tables stand in docs/evidence.md between a line
`<!-- TABLE -->` and `<!-- end -->`: TABLE is a sweep, `SWEEP forecast`, or one of `FINDINGS`.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from functools import partial

from evidence import QUICK, TABLES, known, names, tables
from evidence_findings import DRAWN, FINDINGS, SHOWN_WITH
from evidence_forecast import course_of, forecast_table
from evidence_layers import Key, Measured

from megatron_patch.fit.curves import Curve, Study, study
from megatron_patch.fit.report_card import Grade, report_card
from megatron_patch.report.charts_sweep import transfer_pictures
from megatron_patch.report.drawing import Line, Picture, draw_lines, grid_figure, png
from megatron_patch.theory.equilibrium import trajectory
from megatron_patch.theory.width import RULES

PAGE = TABLES.parent / "evidence.md"
BLOCK = re.compile(r"(<!-- ([\w ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
"""A table of the page: its first line, its name, what is written, its last line."""
FORECAST = " forecast"
FITTED = 3
"""Of fewer LRs nobody expects an optimum."""


def named(key: Key, measured: Measured) -> str:
    """Return what a curve is called."""
    width, rule = key
    if width != measured.narrow:
        return f"{rule}, {width}"
    return f"proxy, {width}" if key == measured.keys[0] else f"proxy of {rule}, {width}"


def line(measured: Measured, key: Key, x: Sequence[float], y: Sequence[float], marker: str = "") -> Line:
    """Return the line of a width and rule, with its name and as it looks in every picture."""
    return Line(named(key, measured), x, y, marker=marker, color=measured.color(key), dashes=measured.dashes(key))


def over_time(measured: Measured, column: str) -> Callable[..., None]:
    """Return what draws a quantity of every width and rule over the iterations."""
    lines = []
    for key in measured.keys:
        if values := measured.median(key, column):
            lines.append(line(measured, key, tuple(values), tuple(values.values())))
    return partial(draw_lines, lines=lines, log=True)


def over_proxy(measured: Measured, column: str, predicted: dict[Key, list[float]]) -> Callable[..., None]:
    """Return what draws a quantity of every wide model over its proxy's; dotted, what is predicted of each step."""
    lines = []
    for key in (key for key in measured.keys if key[0] != measured.narrow):
        values = measured.over_proxy(key, column)
        lines.append(line(measured, key, tuple(values), tuple(values.values())))
        if key in predicted:
            base = predicted[measured.proxy_of(key)]
            told = [predicted[key][i - 1] / base[i - 1] for i in values]
            lines.append(Line("", tuple(values), told, dashes=":", color=measured.color(key)))
    return partial(draw_lines, lines=lines, log=True, references=[("1", 1.0)])


def predicted_updates(name: str, measured: Measured) -> dict[Key, list[float]]:
    """Return the relative update of every step as the weight-norm model (eq. 38) has it from the settings alone."""
    course = course_of(name)

    def of(key: Key) -> list[float]:
        rule, m = RULES[key[1]], key[0] / measured.narrow
        lr, decay = measured.lr * m**-rule.lr_exponent, course.weight_decay * m**rule.wd_exponent
        schedule = ((lr * factor, decay) for factor in course.factors)
        return [step.relative_update for step in trajectory(schedule, key[0] ** -0.5)]

    return {key: of(key) for key in measured.keys}


def half_way(measured: Measured) -> Callable[..., None]:
    """Return what draws the alignment ratio of every matrix at half time."""
    lines = []
    for key in measured.keys:
        values = list(measured.layers_half_way(key, "alignment_ratio").values())
        lines.append(line(measured, key, range(1, len(values) + 1), values, marker="o"))
    return partial(draw_lines, lines=lines, log=True, references=[("1", 1.0)], x_label="matrix, in the model's order")


def mechanism(name: str, measured: Measured) -> list[Picture]:
    """Return the pictures of what weight decay does to the layers."""
    predicted = predicted_updates(name, measured) if name in names() else {}  # the ResNets have no sweep file
    update = "relative update, over the proxy's" + ("; dotted: eq. 38" if predicted else "")
    change = over_proxy(measured, "relative_representation_change", {})
    return [
        Picture("relative representation change, over the proxy's", "", change),
        Picture(update, "", over_proxy(measured, "relative_update", predicted)),
        Picture("alignment ratio", "", over_time(measured, "alignment_ratio")),
        Picture("alignment ratio of every matrix, half-way", "", half_way(measured)),
    ]


def table(found: Study) -> list[str]:
    """Return the report card as lines of Markdown."""
    lines = [
        "| rule | width | shift of the optimum, octaves | loss lost by the proxy's LR | loss at it | best loss |"
        " LR sensitivity |",
        "|---|---|---|---|---|---|---|",
    ]
    proxies = {id(proxy): (label, proxy) for label in found.labels if (proxy := found.proxy(label))}
    for label, proxy in proxies.values():
        optimum = f"2^{proxy.optimum.log2_lr:.2f}" if proxy.optimum else f"none: {proxy.refusal}"
        whose = f" of {label}" if proxy.label == label else ""
        told = sensitivity(proxy)
        lines.append(f"| (proxy{whose}) | {proxy.hidden_size} | optimum {optimum} | | | {proxy.best:.4f} | {told} |")
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
    return curve.optimum.sensitivity.text if curve.optimum else ""


def block(name: str) -> list[str]:
    """Return the lines of a table of the page."""
    if name in FINDINGS:
        return FINDINGS[name]()
    if name.endswith(FORECAST):
        return forecast_table(name.removesuffix(FORECAST))
    return table(study(known(name)))


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
        figure = grid_figure(title, mechanism(name, measured))
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
