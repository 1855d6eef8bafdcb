"""Pictures that tell the layers of one run apart, and the warmups of a run: which factor its LR was multiplied with."""

import math
import re
from collections.abc import Sequence
from functools import partial

import numpy as np

from megatron_patch.files.lines import AlignmentLine
from megatron_patch.fit.curves import grouped
from megatron_patch.report.charts_run import MOST_POINTS, bands, line_picture, present
from megatron_patch.report.drawing import Line, Picture, draw_lines
from megatron_patch.report.layers import layer_kind, lines_by_kind, measurable_updates
from megatron_patch.runs.run import Run
from megatron_patch.runs.tensorboard import Series
from megatron_patch.theory.schedules import (
    decay_away,
    decay_away_factors,
    decay_away_step,
    equilibrium_factors,
    exp_increasing,
)

MOST_LAYERS = 6
"""Layers of one kind that one picture tells apart; of more, this many evenly spaced ones are drawn."""
MOST_STEPS = 200_000
"""Longer runs get no warmup picture: the factors follow from all steps one by one."""


def layer_number(layer: str) -> int | None:
    """Return the global number of the layer that a line of alignment.jsonl is of.

    >>> layer_number("decoder.layers.3.mlp.linear_fc1/gate"), layer_number("output_layer")
    (3, None)
    """
    found = re.search(r"\.layers\.(\d+)\.", layer)
    return int(found[1]) if found else None


def every_layer(run: Run) -> list[Picture]:
    """Return the alignment ratio over training, a picture for each kind and a line for each layer, and by depth."""
    measurable = measurable_updates(run)
    lines = [line for line in lines_by_kind(run) if (line.iteration, line.layer) in measurable]
    numbered = [(line, number) for line in lines if (number := layer_number(line.layer)) is not None]
    if len({number for _, number in numbered}) < 2:
        return []
    pictures = [_by_depth(lines, "Alignment ratio by depth", "α_ΔW / α_W", "alignment_ratio")]
    pictures.append(_by_depth(lines, "Relative weight update by depth", "RWU = ‖ΔW‖ / ‖W‖", "relative_update"))
    for kind, members in grouped(numbered, lambda pair: layer_kind(pair[0].layer)).items():
        numbers = sorted({number for _, number in members})
        shown = {numbers[i] for i in np.linspace(0, len(numbers) - 1, min(len(numbers), MOST_LAYERS)).astype(int)}
        members.sort(key=lambda pair: pair[1])
        drawn = bands((line.iteration, f"layer {n}", line.alignment_ratio) for line, n in members if n in shown)
        pictures.append(line_picture(f"{kind}: alignment ratio", "of every layer", drawn, [("1", 1.0)]))
    return present(*pictures)


def _by_depth(lines: Sequence[AlignmentLine], title: str, meaning: str, key: str) -> Picture | None:
    """Return a metric over the layer number, a line for each kind: medians over the second half of the run."""
    half = max((line.iteration for line in lines), default=0) / 2
    values = (
        (number, layer_kind(line.layer), getattr(line, key))
        for line in lines
        if line.iteration > half and (number := layer_number(line.layer)) is not None
    )
    drawn = bands(values)
    if not drawn:
        return None
    said = "; ".join(f"{line.name} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in drawn)
    return Picture(
        title,
        f"{title}, {meaning}, from the first layer to the last: {said}.",
        partial(draw_lines, lines=drawn, log=True, x_label="layer"),
        f"{meaning}, medians over the second half of the run.",
    )


def warmup_pictures(run: Run) -> list[Picture]:
    """Return the extra warmups at the width and under the schedule of a run (arXiv 2510.19093, fig. 7).

    None for a run of the base width, without --base-hidden-size, or whose LR was not logged.
    """
    arguments = run.arguments
    steps = int(run.train_iterations or run.iteration)
    decay = float(arguments.get("weight_decay") or 0.0)
    if run.m == 1 or not 0 < steps <= MOST_STEPS:
        return []
    rates = _schedule(run, steps)
    if rates is None or max(rates) * decay >= 1:
        return []
    warmup, base = run.settings.warmup, run.settings.width.base_hidden_size
    at = sorted({*range(0, steps, max(1, steps // MOST_POINTS)), steps - 1})
    fan_in = run.settings.width.init_scaling == "fan-in"
    start = 1 / math.sqrt(base) if fan_in and base else float(arguments.get("init_method_std", 0.02))
    implied = list(equilibrium_factors(((rate, decay) for rate in rates), run.m, start))
    factors = {"implicit": implied, "decay-away": list(decay_away_factors(rates, decay, run.m))}
    length = warmup.steps(steps)
    if warmup.kind == "exp" and length is not None:
        factors["exp"] = [exp_increasing(t, length, run.m) for t in range(steps)]
    lines = [
        Line(f"{name} (in use)" if name == warmup.kind else name, at, [values[t] for t in at])
        for name, values in factors.items()
    ]
    said = "; ".join(f"{line.name} {line.y[0]:.3g} at first, {line.y[len(at) // 2]:.3g} half-way" for line in lines)
    used = f"{warmup.kind} multiplies the LR" if warmup.active else "no extra warmup is in use"
    return [
        Picture(
            "Extra warmups",
            f"Factors of extra warmups for m = {run.m:g} over iterations: {said}; {used}.",
            partial(draw_lines, lines=lines, log=True, references=[(f"1/m = 1/{run.m:g}", 1 / run.m)]),
            f"Factor on the LR schedule at m = {run.m:g}; {used}. Implicit: what independent scaling does to relative "
            "updates by itself (eq. 38); decay-away: eq. 15.",
        )
    ]


def _schedule(run: Run, steps: int) -> list[float] | None:
    """Return the base LR of every step without an extra warmup, from what was logged of a class that no rule scales."""
    peaks = {p.role: p.lr for p in run.hyperparameters.parameters} if run.hyperparameters else {}
    logged = run.per_class("lr")
    role = next((r for r in ("vector", "embedding") if peaks.get(r) and r in logged), None)
    if role is None or not logged[role].values:
        return None
    peak = float(run.arguments["lr"])
    rates = _interpolated(logged[role], steps, bool(run.arguments.get("lr_warmup_iters")))
    rates = [rate / peaks[role] * peak for rate in rates]
    warmup = run.settings.warmup
    if not warmup.active or warmup.scope == "width-dependent":
        return rates
    if warmup.kind == "exp":
        length = warmup.steps(steps)
        return None if length is None else [r / exp_increasing(t, length, run.m) for t, r in enumerate(rates)]
    product, plain = 1.0, []
    for rate in rates:  # decay-away's factor follows from the plain LRs before it
        plain.append(rate / decay_away(product, run.m))
        product = decay_away_step(product, plain[-1], float(run.arguments.get("weight_decay") or 0.0))
    return plain


def _interpolated(series: Series, steps: int, from_zero: bool) -> list[float]:
    """Return a logged LR at every step; what is logged at iteration i is the LR of step i, counted from 0."""
    known = [(float(i), v) for i, v in zip(series.iterations, series.values, strict=True)]
    if from_zero and known[0][0] > 0:
        known.insert(0, (0.0, 0.0))
    x, y = zip(*known, strict=True)
    return [float(value) for value in np.interp(range(steps), x, y)]
