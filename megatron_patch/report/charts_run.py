"""What the pictures of runs show: training, alignment per kind of layer, weights against the weight-norm model."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from megatron_patch.files.lines import AlignmentLine, EquilibriumLine
from megatron_patch.files.run_json import VALIDATION
from megatron_patch.report.drawing import DASHES, LIGHT, Line, Picture, draw_lines, wide_figure
from megatron_patch.report.layers import layer_kind, lines_by_kind, measurable_updates, ratio
from megatron_patch.runs.run import Run
from megatron_patch.runs.tensorboard import Series
from megatron_patch.theory.equilibrium import momentum_update_rms

MOST_POINTS = 300
"""Points of a line; a longer series is averaged in this many stretches."""
MOST_BAND_POINTS = 60
"""The same for a line with a band."""
NAMED_RUNS = 8
"""Runs that one picture can tell apart."""

type Measurement = tuple[int, str, float | None]
"""Iteration, kind of layer, value."""


def overview(run: Run) -> Figure | None:
    """Return the picture of a whole run: loss, LR and weight decay, alignment ratio; None if nothing was logged."""
    ratios = _alignment_ratio(run)
    pictures = present(_loss(run), _learning_rates(run), _weight_decays(run), ratios)
    scaling = "no width scaling" if run.rule == "none" else f"width scaling {run.rule}, m = {run.m:g}"
    return wide_figure(f"{run.name}: {scaling}", pictures) if pictures else None


def loss_pictures(run: Run) -> list[Picture]:
    """Return the loss alone."""
    return present(_loss(run))


def training_pictures(run: Run) -> list[Picture]:
    """Return loss, LR and weight decay per class, and gradient norm, as far as they were logged."""
    return present(_loss(run), _learning_rates(run), _weight_decays(run), _gradient_norm(run))


def present(*pictures: Picture | None) -> list[Picture]:
    return [picture for picture in pictures if picture is not None]


def _loss(run: Run) -> Picture | None:
    train, validation = run.train_loss, run.evaluated(VALIDATION)
    lines = []
    text = []
    if train.values:
        lines.append(_running("train", train))
        text.append(f"training loss from {train.values[0]:.4g} to {train.values[-1]:.4g}")
    if validation.values:
        lines.append(Line("validation", validation.iterations, validation.values, marker="o"))
        text.append(f"validation loss from {validation.values[0]:.4g} to {validation.values[-1]:.4g}")
    if not lines:
        return None
    return Picture(
        "Loss",
        f"Loss over {run.iteration} iterations: {'; '.join(text)}.",
        partial(draw_lines, lines=lines, log=True),
        "Training loss: running mean, and the range of the values in it." if train.values else "",
    )


def _learning_rates(run: Run) -> Picture | None:
    lines = _per_class(run, "lr") or _logged("all parameters", run.series.get("learning-rate"))
    peaks = [max(line.y) for line in lines]
    text = "; ".join(f"{line.name}: peak {peak:.4g}" for line, peak in zip(lines, peaks, strict=True))
    log = _far_apart(peaks)
    return _class_picture("Learning rate per class", text, lines, log, "Logarithmic." if log else "")


def _weight_decays(run: Run) -> Picture | None:
    lines = _per_class(run, "weight_decay")
    text = "; ".join(f"{line.name}: {line.y[-1]:.4g}" for line in lines)
    zero = [line.name for line in lines if max(line.y) == 0]
    log = _far_apart([max(line.y) for line in lines if max(line.y) > 0])
    caption = f"Logarithmic{', without ' + ', '.join(zero) + ': 0' if zero else ''}." if log else ""
    return _class_picture("Weight decay per class", text, lines, log, caption)


def _class_picture(title: str, text: str, lines: list[Line], log: bool, caption: str) -> Picture | None:
    if not lines:
        return None
    return Picture(title, f"{title} over iterations. {text}.", partial(draw_lines, lines=lines, log=log), caption)


def _per_class(run: Run, what: str) -> list[Line]:
    """Return a line for every class; classes that have the same values share one."""
    names: dict[Series, list[str]] = {}
    for name, series in run.per_class(what).items():
        names.setdefault(series, []).append(name)
    return [_line(", ".join(together), series) for series, together in names.items()]


def _far_apart(values: Sequence[float]) -> bool:
    """Return whether values differ so much that a linear scale would hide some."""
    return bool(values) and max(values) > 10 * min(values) > 0


def _gradient_norm(run: Run) -> Picture | None:
    lines = _logged("norm", run.series.get("grad-norm"))
    if not lines:
        return None
    return Picture(
        "Gradient norm",
        f"Norm of the whole gradient before clipping over iterations; last {lines[0].y[-1]:.4g}.",
        partial(draw_lines, lines=lines, log=True),
        "Of the whole model, before clipping.",
    )


def _logged(name: str, series: Series | None) -> list[Line]:
    return [_line(name, series)] if series else []


def _line(name: str, series: Series) -> Line:
    """Return the line of a series, averaged in stretches if it is long."""
    if len(series.values) <= MOST_POINTS:
        return Line(name, series.iterations, series.values)
    parts = np.array_split(np.arange(len(series.values)), MOST_POINTS)
    x, y = np.array(series.iterations), np.array(series.values)
    return Line(name, [float(x[part].mean()) for part in parts], [float(y[part].mean()) for part in parts])


def _running(name: str, series: Series) -> Line:
    """Return the mean of a series over windows of 1/25 of it, with the range of the values in each window."""
    count = len(series.values)
    values = np.array(series.values)
    centres = sorted({*range(0, count, max(1, count // MOST_POINTS)), count - 1})
    windows = [values[max(0, centre - count // 50) : centre + count // 50 + 1] for centre in centres]
    return Line(
        name,
        x=[series.iterations[centre] for centre in centres],
        y=[float(window.mean()) for window in windows],
        low=[float(window.min()) for window in windows],
        high=[float(window.max()) for window in windows],
    )


def alignment_pictures(run: Run) -> list[Picture]:
    """Return the metrics of arXiv 2510.19093, figs. 3 to 5, and the size of weights and outputs, per kind of layer."""
    lines = lines_by_kind(run)
    fan_ins = sorted({line.fan_in for line in lines})
    random = [(f"1/√{fan_in}", 1 / math.sqrt(fan_in)) for fan_in in (fan_ins if len(fan_ins) <= 3 else fan_ins[:1])]
    measurable = measurable_updates(run)

    def updated(value: Callable[[AlignmentLine], float | None]) -> list[Measurement]:
        return [(li.iteration, li.layer, value(li)) for li in lines if (li.iteration, li.layer) in measurable]

    def always(value: Callable[[AlignmentLine], float | None]) -> list[Measurement]:
        return [(li.iteration, li.layer, value(li)) for li in lines]

    return present(
        _metric("Weight alignment α_W", "‖WX‖ / (‖W‖ ‖X‖)", always(lambda li: li.weight_alignment), random),
        _metric("Update alignment α_ΔW", "‖ΔWX‖ / (‖ΔW‖ ‖X‖)", updated(lambda li: li.update_alignment), random),
        _alignment_ratio(run),
        _metric("Relative weight update", "RWU = ‖ΔW‖ / ‖W‖", updated(lambda li: li.relative_update)),
        _metric(
            "Relative representation change",
            "RRC = ‖ΔWX‖ / ‖WX‖",
            updated(lambda li: li.relative_representation_change),
        ),
        _metric("Top singular value", "of W", always(lambda li: li.top_singular_value)),
        _metric(
            "Sublayer gain",
            "RMS of a block's output / RMS of its normalised input",
            [(li.iteration, li.layer, li.gain) for li in run.sublayers],
        ),
    )


def _alignment_ratio(run: Run) -> Picture | None:
    measurable = measurable_updates(run)
    points = [
        (line.iteration, line.layer, line.alignment_ratio)
        for line in lines_by_kind(run)
        if (line.iteration, line.layer) in measurable
    ]
    return _metric("Alignment ratio", "α_ΔW / α_W", points, [("1", 1.0)])


def equilibrium_pictures(run: Run) -> list[Picture]:
    """Return weights and updates beside what the weight-norm model predicts (arXiv 2510.19093, appendix F)."""
    measurable = measurable_updates(run)
    updated = [li for li in run.equilibrium if (li.iteration, li.layer) in measurable]
    noise = momentum_update_rms(float(run.arguments.get("adam_beta1", 0.9)))
    return present(
        _sizes(updated),
        _metric(
            "Weight size, measured / predicted",
            "RMS of the entries of W over that of the recurrence",
            [(li.iteration, li.layer, ratio(li.weight_rms, li.predicted_weight_rms)) for li in run.equilibrium],
            [("1", 1.0)],
        ),
        _metric(
            "Relative update, measured / predicted",
            "1: steady gradients; lower line: pure noise, which Adam's momentum averages",
            [(li.iteration, li.layer, ratio(li.relative_update, li.predicted_relative_update)) for li in updated],
            [("steady gradients", 1.0), ("pure noise", noise)],
        ),
    )


def _sizes(lines: Sequence[EquilibriumLine]) -> Picture | None:
    """Return the relative update of all layers together: measured, predicted step by step, and in equilibrium."""
    points: list[Measurement] = []
    for line in lines:
        points += [
            (line.iteration, "measured", line.relative_update),
            (line.iteration, "predicted", line.predicted_relative_update),
            (line.iteration, "√(2ηλ)", line.equilibrium_relative_update),
        ]
    drawn = bands(points)
    if len(drawn) < 2:
        return None
    return Picture(
        "Relative update of all layers",
        "RWU = ‖ΔW‖ / ‖W‖ over iterations, measured and predicted. Last medians: "
        + "; ".join(f"{line.name} {line.y[-1]:.3g}" for line in drawn),
        partial(draw_lines, lines=drawn, log=True),
        "Predicted: RMS of the update 1, from the LR and weight decay of every step. √(2ηλ): in equilibrium.",
    )


def _metric(
    title: str, meaning: str, points: Iterable[Measurement], references: Sequence[tuple[str, float]] = ()
) -> Picture | None:
    """Return the picture of a number that every layer has, a line for each kind of layer."""
    return line_picture(
        title, meaning, bands((at, layer_kind(layer), value) for at, layer, value in points), references
    )


def line_picture(
    title: str, meaning: str, lines: Sequence[Line], references: Sequence[tuple[str, float]] = ()
) -> Picture | None:
    """Return the picture of lines over iterations on a logarithmic scale; None without lines."""
    if not lines:
        return None
    last = "; ".join(f"{line.name} {line.y[-1]:.3g}" for line in lines)
    return Picture(
        title,
        f"{title}, {meaning}, over iterations. Last medians: {last}.",
        partial(draw_lines, lines=lines, log=True, references=references),
        meaning,
    )


def bands(points: Iterable[Measurement]) -> list[Line]:
    """Return a line for each group of points: the median per iteration, in a band from 10th to 90th percentile."""
    groups: dict[str, dict[int, list[float]]] = {}
    for iteration, group, value in points:
        if value is not None and math.isfinite(value):
            groups.setdefault(group, {}).setdefault(iteration, []).append(value)
    lines = []
    for place, (group, by_iteration) in enumerate(groups.items()):
        iterations = sorted(by_iteration)
        stretches = np.array_split(np.array(iterations), min(len(iterations), MOST_BAND_POINTS))
        values = [[value for iteration in stretch for value in by_iteration[int(iteration)]] for stretch in stretches]
        low, middle, high = np.array([np.percentile(v, (10, 50, 90)) for v in values]).T.tolist()
        x = [float(stretch.mean()) for stretch in stretches]
        lines.append(Line(group, x, middle, low, high, dashes=DASHES[place // len(LIGHT) % len(DASHES)]))
    return lines


def comparison_pictures(runs: Sequence[Run]) -> list[Picture]:
    """Return the losses of several runs in one picture each; with many of them only the lowest is named."""
    return present(
        _comparison("Validation loss of all runs", [(run, run.evaluated(VALIDATION)) for run in runs]),
        _comparison("Training loss of all runs", [(run, run.train_loss) for run in runs]),
    )


def _comparison(title: str, series: Sequence[tuple[Run, Series]]) -> Picture | None:
    lines = [replace(_running(run.name, s), low=(), high=()) for run, s in series if len(s.values) > 1]
    if len(lines) < 2:
        return None
    lines.sort(key=lambda line: line.y[-1] if math.isfinite(line.y[-1]) else math.inf)
    best = f"Lowest at the end: {lines[0].name} with {lines[0].y[-1]:.4g}."
    caption = ""
    if len(lines) > NAMED_RUNS:
        lines = [lines[0], *(replace(line, name="", faint=True) for line in lines[1:])]
        caption = "Only the run that ends lowest is named."
    return Picture(title, f"{title} over iterations. {best}", partial(draw_lines, lines=lines, log=True), caption)
