"""Pictures of a sweep: loss against base LR for every rule and width, against LR and weight decay."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.ticker import FuncFormatter, MultipleLocator
from matplotlib.transforms import AffineDeltaTransform

from megatron_patch.fit.curves import CONTROLS, Curve, Point, Study, grouped, label
from megatron_patch.fit.found import NoOptimum, Ridge
from megatron_patch.fit.optimum import fit_lr_weight_decay
from megatron_patch.fit.report_card import Grade
from megatron_patch.report.drawing import INK, LIGHT, Picture, hover, hover_cells, name_ends
from megatron_patch.runs.trial import Trial

TALLEST = 1.0
"""Nats above the highest best loss that a picture of losses shows; what is higher sits at its upper edge."""
MOST_POINTS = 60
"""LRs that a line shows one by one; more are pooled in this many bins."""
MOST_LEVELS = 24
"""LRs, and weight decays, that a heat map shows one by one; the same."""
MOST_TICKS = 8
"""LRs, and weight decays, that the axis of a heat map names; of more, every second, third ... one."""
FEWEST_CELLS = 2
"""Weight decays, and LRs, from which a heat map is worth drawing."""


@dataclass(frozen=True)
class Trace:
    """A curve in a picture of losses."""

    name: str
    color: str
    curve: Curve
    offset: float = 0.0
    """Subtracted from log2 of the LR."""
    dashes: str = "-"


def transfer_pictures(study: Study, grades: Sequence[Grade]) -> list[Picture]:
    """Return the LR-transfer curves, a picture for each rule, then all rules at the widest width."""
    colors = {width: LIGHT[place % len(LIGHT)] for place, width in enumerate(study.widths)}
    pictures = []
    limits = _limits(list(study.curves.values()))
    for name in study.labels:
        proxy = study.proxy(name)
        curves = [*([proxy] if proxy else []), *study.targets(name)]
        traces = [Trace(f"width {c.hidden_size}", colors[c.hidden_size], c) for c in curves]
        control = " (control)" if name in CONTROLS else ""
        pictures.append(
            Picture(
                f"{name}{control}",
                f"Loss against base LR under {name}. {' '.join(_said(trace) for trace in traces)}",
                partial(draw_losses, traces=traces, limits=limits),
                _caption(name, grades, proxy),
            )
        )
    together = _together(study)
    return [*pictures, together] if together else pictures


def _caption(name: str, grades: Sequence[Grade], proxy: Curve | None) -> str:
    shifts = [
        f"{g.shift.text} octaves at {g.curve.hidden_size}" if g.shift else f"at {g.curve.hidden_size}: {g.remarks}"
        for g in grades
        if g.label == name
    ]
    if not shifts:
        return proxy.refusal if proxy else ""
    return f"Shift of the optimum: {'; '.join(shifts)}."


def _said(trace: Trace) -> str:
    losses = ", ".join(f"{p.loss:.4g} at {p.lr:.3g}" for p in shown_points(trace.curve))
    fit = trace.curve.optimum
    found = f"optimum {2**fit.log2_lr:.3g}" if fit else "no optimum"
    return f"{trace.name}, {found}: {losses}."


def _together(study: Study) -> Picture | None:
    """Return the curves of all rules at the widest width over the distance from the proxy's optimum."""
    widest = max(study.widths)
    traces = []
    for place, name in enumerate(study.labels):
        proxy, curve = study.proxy(name), study.curves.get((name, widest))
        start = proxy.optimum if proxy else None
        if curve and start and widest != study.base_hidden_size:
            dashes = "--" if name in CONTROLS else "-"
            traces.append(Trace(name, LIGHT[place % len(LIGHT)], curve, start.log2_lr, dashes))
    if len(traces) < 2:
        return None
    return Picture(
        f"All rules at width {widest}",
        f"Loss at width {widest} over octaves from the proxy's optimal LR. {' '.join(_said(t) for t in traces)}",
        partial(draw_losses, traces=traces, limits=_limits([trace.curve for trace in traces]), octaves=True),
        "Over the distance from the proxy's optimal LR, where a rule that transfers has its minimum; dashed: controls.",
    )


def _limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the range of losses to show."""
    losses = [p.loss for c in curves for p in c.points if math.isfinite(p.loss)]
    bests = [c.best for c in curves if math.isfinite(c.best)]
    if not losses:
        return 0.0, 1.0
    low, high = min([*losses, *bests]), min(max(losses), max(bests) + TALLEST)
    margin = 0.04 * max(high - low, 1e-3)
    return low - margin, high + margin


def draw_losses(axes: Axes, traces: Sequence[Trace], limits: tuple[float, float], octaves: bool = False) -> None:
    """Draw losses over log2 of the LR: means of seeds, their range, the fitted parabola, optima with intervals.

    Args:
        axes: empty.
        traces: the curves.
        limits: lowest and highest loss to show; an LR that diverged, or is higher, is a cross at the upper edge. The
            intervals are drawn below the lowest.
        octaves: whether the x axis is the distance in octaves from `Trace.offset`, not the LR.
    """
    low, high = limits
    fitted = [trace for trace in traces if trace.curve.optimum]
    row = 0.035 * (high - low)
    for trace in traces:
        _draw_trace(axes, trace, high)
    for place, trace in enumerate(fitted):
        _draw_optimum(axes, trace, low - (place + 0.5) * row)
    axes.set_ylim(low - len(fitted) * row, high)
    axes.set_xmargin(0.04)
    axes.autoscale_view(scalex=True, scaley=False)
    if octaves:
        axes.axvline(0, color=INK, linestyle=":", linewidth=1.1, alpha=0.7)
        axes.set_xlabel("octaves from the proxy's optimal LR")
        axes.xaxis.set_major_locator(MultipleLocator(1 if np.ptp(axes.get_xlim()) < 9 else 2))
    else:
        axes.set_xlabel("base LR")
        axes.xaxis.set_major_locator(MultipleLocator(max(1, math.ceil(np.ptp(axes.get_xlim()) / 7))))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{2**value:.2g}"))
    ends = []
    for trace in traces:
        shown = [p for p in shown_points(trace.curve) if math.isfinite(p.loss) and not p.diverged]
        if shown:
            ends.append((trace.name, _x(shown[-1], trace), min(shown[-1].loss, high), trace.color))
    name_ends(axes, ends)


def shown_points(curve: Curve) -> Sequence[Point]:
    """Return the points of a curve as they are drawn: of many, means over bins of LRs, evenly spaced in log2."""
    bins = _bins([p.lr for p in curve.points], MOST_POINTS)
    return [_pooled(lr, members) for lr, members in grouped(curve.points, lambda p: bins[p.lr]).items()]


def _bins(values: Sequence[float], most: int) -> dict[float, float]:
    """Value -> what stands for it: itself, or if there are more than `most`, the middle of its bin in log2."""
    single = sorted(set(values))
    if len(single) <= most or single[0] <= 0:
        return {value: value for value in single}
    x = np.log2(single)
    step = (x[-1] - x[0]) / most
    places = np.minimum(((x - x[0]) / step).astype(int), most - 1)
    return {value: float(2 ** (x[0] + (place + 0.5) * step)) for value, place in zip(single, places, strict=True)}


def _pooled(lr: float, members: Sequence[Point]) -> Point:
    if len(members) == 1:
        return members[0]
    known = [p for p in members if math.isfinite(p.loss)]
    seeds, lost = sum(p.seeds for p in members), sum(p.diverged for p in members)
    blown = tuple(loss for p in members for loss in p.blown)
    if not known:
        return Point(lr, math.nan, math.nan, math.nan, seeds, lost, blown)
    loss = fmean(p.loss for p in known)
    return Point(lr, loss, min(p.low for p in known), max(p.high for p in known), seeds, lost, blown)


def _x(point: Point, trace: Trace) -> float:
    return math.log2(point.lr) - trace.offset


def _draw_trace(axes: Axes, trace: Trace, high: float) -> None:
    every = shown_points(trace.curve)
    points = [p for p in every if math.isfinite(p.loss) and not p.diverged]
    x, y = [_x(p, trace) for p in points], [p.loss for p in points]
    if any(p.high > p.low for p in points):
        axes.vlines(x, [p.low for p in points], [p.high for p in points], color=trace.color, linewidth=1, alpha=0.7)
    (line,) = axes.plot(x, y, trace.dashes, color=trace.color, marker="o", markersize=4, linewidth=1.5)
    line.set_gid(hover(trace.name, [_point_text(p) for p in points]))
    above = [p for p in every if p.diverged or not p.loss <= high]
    if above:
        (marks,) = axes.plot(
            [_x(p, trace) for p in above],
            [high] * len(above),
            linestyle="",
            marker="x",
            color=trace.color,
            markersize=5,
            clip_on=False,
        )
        marks.set_gid(hover(trace.name, [_point_text(p) for p in above]))


def _point_text(point: Point) -> str:
    text = f"base LR {point.lr:.4g}: "
    if point.diverged:
        ended = f", at losses of {min(point.blown):.4g} to {max(point.blown):.4g}" if point.blown else ""
        if point.seeds == 1:
            return f"{text}diverged" + (f", at a loss of {point.blown[0]:.4g}" if point.blown else "")
        return f"{text}{point.diverged} of {point.seeds} seeds diverged{ended}"
    seeds = f" ({point.seeds} seeds, {point.low:.4f} to {point.high:.4f})" if point.seeds > 1 else ""
    return f"{text}loss {point.loss:.4f}{seeds}"


def _draw_optimum(axes: Axes, trace: Trace, height: float) -> None:
    """Draw the fit within its points' reach, a star at its minimum, and the interval at `height`."""
    fit = trace.curve.optimum
    assert fit is not None
    text = f"optimum {2**fit.log2_lr:.3g} [{2**fit.low:.3g}, {2**fit.high:.3g}]: loss {fit.loss:.4f}"
    at = fit.log2_lr - trace.offset
    axes.plot([at, at], [height, fit.loss], color=trace.color, linewidth=0.7, alpha=0.6)
    (bar,) = axes.plot([fit.low - trace.offset, fit.high - trace.offset], [height] * 2, color=trace.color, linewidth=3)
    bar.set_gid(hover(trace.name, [text] * 2))
    (star,) = axes.plot([at], [fit.loss], marker="*", markersize=11, color=trace.color, linestyle="")
    star.set_gid(hover(trace.name, [text]))


def heat_maps(study: Study) -> list[Picture]:
    """Return the loss over base LR and weight decay for every rule and width that was swept in both."""
    pictures = []
    for (name, width), trials in grouped(study.trials, lambda t: (label(t), t.hidden_size)).items():
        for _, members in grouped(trials, lambda t: (t.vector_lr, t.steps)).items():
            decays = {t.weight_decay for t in members if t.weight_decay is not None}
            if len(decays) < FEWEST_CELLS or len({t.lr for t in members}) < FEWEST_CELLS:
                continue
            pictures.append(_heat_map(f"{name}, width {width}", [t for t in members if t.weight_decay in decays]))
    return pictures


def _heat_map(title: str, trials: Sequence[Trial]) -> Picture:
    lrs = _bins([t.lr for t in trials], MOST_LEVELS)
    decays = _bins([t.weight_decay or 0.0 for t in trials], MOST_LEVELS)
    cells = {}
    for decay, members in sorted(grouped(trials, lambda t: decays[t.weight_decay or 0.0]).items()):
        curve = Curve(title, trials[0].hidden_size, tuple(members))
        for lr, points in grouped(curve.points, lambda p: lrs[p.lr]).items():
            cells[lr, decay] = _pooled(lr, points)
    finite = {place: p.loss for place, p in cells.items() if not p.diverged}
    best = min(finite, key=lambda place: finite[place], default=None)
    ridge, caption = None, ""
    found = f"Lowest at LR {best[0]:.3g}, weight decay {best[1]:.3g}: {finite[best]:.4g}." if best else "All diverged."
    try:
        ridge = fit_lr_weight_decay(trials)
    except NoOptimum as error:
        caption = f"No joint optimum: {error}."
    if ridge:
        caption = (
            f"Star: fitted optimum, LR {ridge.lr:.3g} [{2**ridge.low:.3g}, {2**ridge.high:.3g}], weight decay "
            f"{ridge.weight_decay:.3g} [{2**ridge.weight_decay_low:.3g}, {2**ridge.weight_decay_high:.3g}]. "
        )
        slope = ridge.direction[1] / ridge.direction[0] if ridge.direction[0] else math.inf
        caption += (
            f"Line: the ridge, along which weight decay goes as LR^{slope:.2g} and the loss bends "
            f"{ridge.across / ridge.along:.2g} times less than across."
            if ridge.is_ridge and ridge.along > 0
            else "There is no ridge: the loss bends alike along both."
        )
    return Picture(
        title,
        f"Loss over base LR and weight decay, {title}. {found} {caption}",
        partial(draw_heat_map, cells=cells, ridge=ridge),
        f"{found} {caption}",
    )


def draw_heat_map(axes: Axes, cells: dict[tuple[float, float], Point], ridge: Ridge | None) -> None:
    """Draw a cell for every LR and weight decay, darker where the loss is lower, with the ridge of the fit."""
    lrs, decays = (sorted({place[i] for place in cells}) for i in (0, 1))
    losses = [p.loss for p in cells.values() if not p.diverged]
    low = min(losses, default=0.0)
    span = max(min(max(losses, default=1.0) - low, TALLEST), 1e-6)
    colors = matplotlib.colormaps["viridis"]
    few = len(lrs) * len(decays) <= 64
    places, faces, texts = [], [], []
    for (lr, decay), point in cells.items():
        x, y = lrs.index(lr), decays.index(decay)
        share = 1.0 if point.diverged else min((point.loss - low) / span, 1.0)
        places.append((x, y))
        faces.append("#888888" if point.diverged else matplotlib.colors.to_hex(colors(share)))
        texts.append(f"weight decay {decay:.4g}, {_point_text(point)}")
        if few:
            text = "div." if point.diverged else f"{point.loss:.2f}"
            ink = "#ffffff" if share < 0.55 else "#000000"
            axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=ink)
    squares = PolyCollection(  # one artist: hundreds of patches take a second each to draw
        [[(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]],
        transform=AffineDeltaTransform(axes.transData),  # type: ignore[arg-type]
        offsets=places,
        offset_transform=axes.transData,
        facecolors=faces,
        edgecolors="none",
    )
    squares.set_gid(hover_cells(texts))
    axes.add_collection(squares, autolim=False)
    axes.set_xlim(-0.5, len(lrs) - 0.5)
    axes.set_ylim(-0.5, len(decays) - 0.5)
    axes.set_xticks(*_ticks(lrs))
    axes.set_yticks(*_ticks(decays))
    axes.grid(False)
    axes.set_xlabel("base LR")
    axes.set_ylabel("base weight decay")
    if ridge is not None:
        _draw_ridge(axes, ridge, lrs, decays)


def _ticks(values: Sequence[float]) -> tuple[range, list[str]]:
    """Return the places of the values to name, and their names."""
    places = range(0, len(values), math.ceil(len(values) / MOST_TICKS))
    return places, [f"{values[place]:.2g}" for place in places]


def _draw_ridge(axes: Axes, ridge: Ridge, lrs: Sequence[float], decays: Sequence[float]) -> None:
    """Draw the line through the optimum along which the loss rises least, a star at the optimum, and its intervals."""

    def x(log2_lr: Any) -> Any:
        return np.interp(log2_lr, np.log2(lrs), range(len(lrs)))

    def y(log2_decay: Any) -> Any:
        return np.interp(log2_decay, np.log2(decays), range(len(decays)))

    at, decay_at = ridge.log2_lr, ridge.log2_weight_decay
    if ridge.is_ridge:
        along = np.linspace(-20, 20, 2001)
        points = np.array([at, decay_at]) + along[:, None] * np.array(ridge.direction)
        inside = [
            (x(lr), y(decay))
            for lr, decay in points
            if math.log2(lrs[0]) <= lr <= math.log2(lrs[-1]) and math.log2(decays[0]) <= decay <= math.log2(decays[-1])
        ]
        axes.plot(*zip(*inside, strict=True), color="#ffffff", linewidth=2.6, alpha=0.8)
        axes.plot(*zip(*inside, strict=True), color="#d0021b", linewidth=1.4)
    span = [max(min(value, 40.0), -40.0) for value in (ridge.low, ridge.high)]
    decay_span = [max(min(value, 40.0), -40.0) for value in (ridge.weight_decay_low, ridge.weight_decay_high)]
    for xs, ys in ((x(span), [y(decay_at)] * 2), ([x(at)] * 2, y(decay_span))):
        axes.plot(xs, ys, color="#d0021b", linewidth=1)
    axes.plot([x(at)], [y(decay_at)], "*", markersize=12, color="#d0021b", markeredgecolor="#ffffff")
