"""Pictures that put runs of several widths side by side: alignment, updates against prediction, singular values.

All runs of a picture were trained with the same base LR, weight decay and number of iterations, so that what differs
between them is the width, and what the rule made of it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from megatron_patch.files.lines import AlignmentLine
from megatron_patch.fit.curves import Study, grouped, label, setting
from megatron_patch.report.charts_run import Measurement, bands, line_picture, present
from megatron_patch.report.drawing import INK, LIGHT, Line, Picture, hover, name_ends, readable_log
from megatron_patch.report.layers import layer_kind, lines_by_kind, measurable_updates
from megatron_patch.runs.run import Run
from megatron_patch.runs.trial import Trial
from megatron_patch.theory.width import RULES

MOST_TOGETHER = 7
"""Runs that one picture can tell apart."""


@dataclass(frozen=True)
class Member:
    """A run in a comparison."""

    name: str
    color: str
    run: Run


@dataclass(frozen=True)
class Comparison:
    """Runs of several widths, or of several rules at one width, with the proxy."""

    title: str
    lr: float
    proxy: Member | None
    members: tuple[Member, ...]
    """The proxy, if there is one, first."""


def comparisons(study: Study, runs: Mapping[str, Run]) -> list[Comparison]:
    """Return what can be compared at the one base LR at which most rules and widths were measured.

    All runs together if they are few, else all rules at the widest width, and then the widths rule by rule.

    Args:
        study: the sweep.
        runs: those with a trial in the study, by the trial's source.
    """
    chosen = _same_lr(study, runs)
    if len(chosen) < 2:
        return []
    base = study.base_hidden_size
    proxy_trial = next((trial for (_, width), trial in chosen.items() if width == base), None)
    lr = next(iter(chosen.values())).lr

    def member(trial: Trial, name: str, place: int) -> Member:
        return Member(name, LIGHT[place % len(LIGHT)], runs[trial.source])

    def comparison(title: str, trials: Sequence[tuple[str, int]], named: Callable[[str, int], str]) -> Comparison:
        proxy = member(proxy_trial, f"proxy {base}", 0) if proxy_trial else None
        members = [member(chosen[key], named(*key), place + 1) for place, key in enumerate(trials)]
        return Comparison(title, lr, proxy, (*([proxy] if proxy else []), *members))

    wide = [key for name in study.labels for key in sorted(chosen) if key[0] == name and key[1] != base]
    widths = sorted({width for _, width in wide})
    if not wide:
        return []
    if len(wide) < MOST_TOGETHER:
        named = (lambda name, _: name) if len(widths) == 1 else (lambda name, width: f"{name} {width}")
        return [comparison("All rules and widths" if len(widths) > 1 else f"Width {widths[0]}", wide, named)]
    widest = [key for key in wide if key[1] == widths[-1]]
    found = [comparison(f"All rules at width {widths[-1]}", widest[:MOST_TOGETHER], lambda name, _: name)]
    for rule in study.labels:
        own = [key for key in wide if key[0] == rule]
        if own and len(widths) > 1:
            found.append(comparison(rule, own[-MOST_TOGETHER:], lambda _, width: f"width {width}"))
    return found


def _same_lr(study: Study, runs: Mapping[str, Run]) -> dict[tuple[str, int], Trial]:
    """Return a trial for each rule and width, all with one LR: that of most, nearest to the proxy's optimum."""
    measured = [
        t for t in study.trials if setting(t) == study.setting and t.source in runs and runs[t.source].alignment
    ]
    optima = [c.optimum.log2_lr for (_, w), c in study.curves.items() if w == study.base_hidden_size and c.optimum]
    by_lr = {}
    for lr, trials in grouped(measured, lambda t: t.lr).items():
        found: dict[tuple[str, int], Trial] = {}
        for trial in sorted(trials, key=lambda t: (t.seed is None, t.seed or 0)):
            found.setdefault((label(trial), trial.hidden_size), trial)
        by_lr[lr] = found

    def rank(lr: float) -> tuple[bool, int, float]:
        has_proxy = any(width == study.base_hidden_size for _, width in by_lr[lr])
        wide = sum(width != study.base_hidden_size for _, width in by_lr[lr])
        return has_proxy, wide, -abs(math.log2(lr) - optima[0]) if optima else 0.0

    return by_lr[max(by_lr, key=rank)] if by_lr else {}


def comparison_galleries(comparison: Comparison) -> tuple[list[Picture], list[Picture]]:
    """Return pictures of medians over all layers but the LM head, and alignment ratio and RRC kind by kind."""
    members = comparison.members
    metrics = (
        ("Weight alignment α_W", "‖WX‖ / (‖W‖ ‖X‖)", "weight_alignment", False, ()),
        ("Update alignment α_ΔW", "‖ΔWX‖ / (‖ΔW‖ ‖X‖)", "update_alignment", True, ()),
        ("Alignment ratio", "α_ΔW / α_W", "alignment_ratio", True, [("1", 1.0)]),
        ("Relative weight update", "RWU = ‖ΔW‖ / ‖W‖", "relative_update", True, ()),
        ("Relative representation change", "RRC = ‖ΔWX‖ / ‖WX‖", "relative_representation_change", True, ()),
    )
    overall = [
        line_picture(title, meaning, _lines(members, key, updates, lambda layer: layer != "output_layer"), references)
        for title, meaning, key, updates, references in metrics
    ]
    overall += [_against_proxy(comparison), _gains(members), *singular_values(members)]
    kinds = list(dict.fromkeys(layer_kind(line.layer) for m in members for line in lines_by_kind(m.run)))
    by_kind = [
        line_picture(
            f"{kind}: {title[0].lower() + title[1:]}",
            meaning,
            _lines(members, key, updates, lambda layer, kind=kind: layer_kind(layer) == kind),  # type: ignore[misc]
            references,
        )
        for title, meaning, key, updates, references in (metrics[2], metrics[4])
        for kind in kinds
    ]
    return present(*overall), present(*by_kind)


def _lines(members: Iterable[Member], key: str, updates: bool, wanted: Callable[[str], bool]) -> list[Line]:
    """Return a line for each member: the medians of a metric over the wanted layers."""
    drawn = []
    for member in members:
        measurable = measurable_updates(member.run)
        points: list[Measurement] = [
            (line.iteration, member.name, getattr(line, key))
            for line in lines_by_kind(member.run)
            if wanted(line.layer) and (not updates or (line.iteration, line.layer) in measurable)
        ]
        drawn += [replace(line, color=member.color, low=(), high=()) for line in bands(points)]
    return drawn


def _against_proxy(comparison: Comparison) -> Picture | None:
    """Return the relative update over the proxy's in the same layer and iteration, measured and predicted."""
    proxy = comparison.proxy
    if proxy is None:
        return None
    measurable = measurable_updates(proxy.run)
    base = {
        (li.iteration, li.layer): (li.relative_update, li.predicted_relative_update)
        for li in proxy.run.equilibrium
        if (li.iteration, li.layer) in measurable and li.layer != "output_layer"
    }
    lines = []
    for member in comparison.members[1:]:
        ratios: list[Measurement] = []
        for li in member.run.equilibrium:
            measured, predicted = base.get((li.iteration, li.layer), (None, None))
            if measured and li.relative_update:
                ratios.append((li.iteration, "measured", li.relative_update / measured))
            if predicted and li.predicted_relative_update:
                ratios.append((li.iteration, "predicted", li.predicted_relative_update / predicted))
        for line in bands(ratios):
            name, dashes = (member.name, "-") if line.name == "measured" else ("", ":")
            lines.append(replace(line, name=name, dashes=dashes, color=member.color, low=(), high=()))
    if not lines:
        return None
    return line_picture(
        "Relative update over the proxy's",
        "Solid: measured; dotted: predicted from LR and weight decay. 1: as in the proxy; below it at first: a warmup.",
        lines,
        [("1", 1.0)],
    )


def _gains(members: Iterable[Member]) -> Picture | None:
    lines = []
    for member in members:
        points = [(line.iteration, member.name, line.gain) for line in member.run.sublayers]
        lines += [replace(line, color=member.color, low=(), high=()) for line in bands(points)]
    return line_picture("Sublayer gain", "RMS of a block's output / RMS of its normalised input", lines)


def singular_values(members: Sequence[Member]) -> list[Picture]:
    """Return top singular values over training, and the last ones over width (arXiv 2510.15262)."""
    over_time = line_picture(
        "Top singular value",
        "of W, medians over all layers but the LM head",
        _lines(members, "top_singular_value", False, lambda layer: layer != "output_layer"),
    )
    values = [(member, last) for member in members if (last := _last_singular_values(member.run))]
    if len({member.run.arguments["hidden_size"] for member, _ in values}) < 2:
        return present(over_time)
    kinds = list(dict.fromkeys(kind for _, last in values for kind in last))
    said = "; ".join(
        f"{member.name}: " + ", ".join(f"{kind} {value:.3g}" for kind, value in last.items()) for member, last in values
    )
    across = Picture(
        "Top singular value of every kind across widths",
        f"Top singular values of W at the last measurement, by kind of layer. {said}.",
        partial(_draw_kinds, values=values, kinds=kinds),
        f"At the last measurement, medians over layers. {_expected(members)}",
    )
    return present(over_time, across)


def _expected(members: Iterable[Member]) -> str:
    """Return how top singular values go with width in steady state under every rule: as d^(0.75 - (a + b) / 2)."""
    names = dict.fromkeys(member.run.rule for member in members if member.run.m != 1)
    powers = [
        f"{name} d^{0.75 - (RULES[name].lr_exponent + RULES[name].wd_exponent) / 2:g}"
        for name in names
        if name in RULES and RULES[name].decays
    ]
    return f"Expected in steady state: {', '.join(powers)} (arXiv 2510.15262)." if powers else ""


def _last_singular_values(run: Run) -> dict[str, float]:
    last: dict[str, AlignmentLine] = {}
    for line in lines_by_kind(run):
        if line.top_singular_value:
            last[line.layer] = line
    by_kind = grouped(last.values(), lambda line: layer_kind(line.layer))
    return {
        kind: median(line.top_singular_value for line in lines if line.top_singular_value)
        for kind, lines in by_kind.items()
        if kind != "output"
    }


def _draw_kinds(axes: Axes, values: Sequence[tuple[Member, Mapping[str, float]]], kinds: Sequence[str]) -> None:
    """Draw a row of points for each kind of layer, a point for each member."""
    axes.set_yscale("log")
    for member, last in values:
        places = [i for i, kind in enumerate(kinds) if kind in last]
        heights = [last[kinds[i]] for i in places]
        (points,) = axes.plot(places, heights, linestyle="", marker="o", markersize=5, color=member.color)
        points.set_gid(hover(member.name, [f"{kinds[i]}: {last[kinds[i]]:.4g}" for i in places]))
    for place, kind in enumerate(kinds):
        own = [last[kind] for _, last in values if kind in last]
        axes.plot([place, place], [min(own), max(own)], color=INK, linewidth=0.8, alpha=0.35, zorder=1)
    axes.set_xlim(-0.6, len(kinds) - 0.4)
    axes.xaxis.set_major_locator(FixedLocator(range(len(kinds))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: kinds[round(value)]))
    axes.margins(y=0.1)
    readable_log(axes)
    last_kind = len(kinds) - 1
    ends = [(m.name, float(last_kind), last[kinds[-1]], m.color) for m, last in values if kinds[-1] in last]
    name_ends(axes, ends)
