"""From reduced sums to the lines that are written."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megatron_patch.files.lines import AlignmentLine, EquilibriumLine, SublayerLine, keys
from megatron_patch.metrics.forecast import NormForecast
from megatron_patch.metrics.meter import SLOTS, SUBLAYER_SLOTS
from megatron_patch.metrics.views import Row
from megatron_patch.theory import alignment, equilibrium

Line = dict[str, Any]

KEYS = keys(AlignmentLine)
"""Keys of a line of alignment.jsonl."""

METRICS = (
    "weight_norm",
    "update_norm",
    "relative_update",
    "weight_alignment",
    "update_alignment",
    "alignment_ratio",
    "relative_representation_change",
    "top_singular_value",
)
"""The measured ones among them: averaged over experts, and shown to TensorBoard and W&B."""

RESOLUTION = 2.0**-20
"""Relative update below which it is null. An optimizer rounds each weight at the decay, at the update, and the factor
1 - lr * weight decay itself: together at most 2^-23 + 2^-25 of it, a sixth of RESOLUTION (measured: 2^-25 with zero
gradients)."""

EQUILIBRIUM_METRICS = (
    "weight_rms",
    "predicted_weight_rms",
    "predicted_relative_update",
    "normalised_top_singular_value",
)
"""Keys of equilibrium.jsonl that are shown to TensorBoard and W&B."""


def alignment_line(
    iteration: int, row: Row, sums: Sequence[float], measured: bool, singular: bool, updated: bool
) -> Line:
    """Return one line of alignment.jsonl.

    Args:
        iteration: 1-based, as Megatron logs it.
        row: which layer.
        sums: its reduced sums, in the order of `SLOTS`.
        measured: whether alignment was measured, or only the top singular value.
        singular: whether the top singular value was measured.
        updated: whether every rank's optimizer made the step; otherwise there is no update to report.
    """
    s = dict(zip(SLOTS, sums, strict=True))
    line: Line = dict.fromkeys(KEYS)
    line.update(
        iteration=iteration,
        layer=row.layer,
        kind=row.kind,
        fan_in=row.fan_in,
        fan_out=row.fan_out,
        m=row.m,
        lr=s["lr"],
        weight_decay=s["weight_decay"],
        weight_norm=_root(s["weight"]),
    )
    if singular:
        for key in ("top_singular_value", "top_singular_value_error"):
            line[key] = _finite(s[key])
    if measured:
        line["tokens"] = round(s["tokens"])
        line["weight_alignment"] = alignment.alignment(s["weight_output"], s["weight"], s["input"])
    if measured and updated and s["lr"] > 0 and not _is_rounding(s["update"], s["weight"]):
        line.update(
            update_norm=_root(s["update"]),
            relative_update=alignment.relative_update(s["update"], s["weight"]),
            update_alignment=alignment.alignment(s["update_output"], s["update"], s["input"]),
            alignment_ratio=alignment.alignment_ratio(s["update_output"], s["update"], s["weight_output"], s["weight"]),
            relative_representation_change=alignment.relative_representation_change(
                s["update_output"], s["weight_output"]
            ),
        )
    return line


def expert_means(rows: Sequence[Row], lines: Sequence[Line], predicted: Sequence[Line]) -> Iterator[tuple[Line, Line]]:
    """Yield for every layer of experts the mean lines: each number weighted by the expert's sampled tokens.

    An expert without tokens, or without a value, does not count. Without any tokens (no alignment measured, or none
    routed) weights and singular values are averaged with equal weights and the rest is null.

    Args:
        rows: the lines of the model.
        lines: of alignment.jsonl, for each of them.
        predicted: of equilibrium.jsonl, likewise.
    """
    members: dict[str, list[tuple[Line, Line]]] = {}
    for row, line, prediction in zip(rows, lines, predicted, strict=True):
        if row.mean is not None:
            members.setdefault(row.mean, []).append((line, prediction))
    for name, group in members.items():
        tokens = [line["tokens"] for line, _ in group]
        total = None if None in tokens else sum(tokens)
        shares = tokens if total else [1] * len(group)
        mean: Line = {**group[0][0], "layer": name, "kind": "expert_mean", "tokens": total}
        for key in (*METRICS, "top_singular_value_error"):
            mean[key] = _mean([line[key] for line, _ in group], shares)
        prediction = {**group[0][1], "layer": name}
        for key in keys(EquilibriumLine)[2:]:
            prediction[key] = _mean([line[key] for _, line in group], shares)
        yield mean, prediction


def _mean(values: Sequence[float | None], shares: Sequence[float]) -> float | None:
    known = [(value, share) for value, share in zip(values, shares, strict=True) if value is not None]
    total = sum(share for _, share in known)
    return sum(value * share for value, share in known) / total if total else None


def equilibrium_line(line: Line, forecast: NormForecast, hidden_size: int) -> Line:
    """Return one line of equilibrium.jsonl: measured weight RMS and relative update beside what the model predicts.

    Args:
        line: of alignment.jsonl.
        forecast: the recurrence, at the state before this step.
        hidden_size: width d of the model.

    Source: arXiv 2510.19093, eqs. 30 and 36; arXiv 2510.15262 for the scale of the top singular value.
    """
    lr, weight_decay = line["lr"], line["weight_decay"]
    rms = forecast.weight_rms(line["layer"])
    decays = 0 < lr * weight_decay < 1
    top = line["top_singular_value"]
    scale = equilibrium.top_singular_value_scale(lr, weight_decay, hidden_size) if decays else None
    return asdict(
        EquilibriumLine(
            iteration=line["iteration"],
            layer=line["layer"],
            weight_rms=weight_rms(line["weight_norm"], line["fan_in"], line["fan_out"]),
            predicted_weight_rms=rms,
            relative_update=line["relative_update"],
            predicted_relative_update=forecast.relative_update(line["layer"], lr),
            equilibrium_relative_update=equilibrium.equilibrium_relative_update(lr, weight_decay) if decays else None,
            normalised_top_singular_value=None if top is None or scale is None else top / scale,
        )
    )


def weight_rms(norm: float | None, fan_in: int, fan_out: int) -> float | None:
    """Return the RMS of the entries of a weight from its Frobenius norm; None where that was not measured."""
    return None if norm is None else norm / math.sqrt(fan_in * fan_out)


def sublayer_line(
    iteration: int, name: str, width: int, output: Sequence[float], first_linear: Sequence[float]
) -> Line:
    """Return one line of sublayers.jsonl: RMS of input and output vectors, and their ratio, the sublayer gain.

    Args:
        iteration: 1-based.
        name: of the attention or MLP block.
        width: length of input and output vectors.
        output: its sums, in the order of `SUBLAYER_SLOTS`.
        first_linear: the sums, in the order of `SLOTS`, of the layer whose input is the block's normalised input.

    Source: arXiv 2510.15262.
    """
    y = dict(zip(SUBLAYER_SLOTS, output, strict=True))
    x = dict(zip(SLOTS, first_linear, strict=True))
    input_rms = _rms(x["input"], x["tokens"] * width)
    output_rms = _rms(y["output"], y["tokens"] * width)
    gain = output_rms / input_rms if input_rms and output_rms is not None else None
    return asdict(SublayerLine(iteration=iteration, layer=name, input_rms=input_rms, output_rms=output_rms, gain=gain))


def _is_rounding(update: float, weight: float) -> bool:
    """Return whether an update is so small beside its weight that rounding of the fp32 weights may be much of it.

    Args:
        update, weight: sums of squares.
    """
    return update < RESOLUTION**2 * weight


def _root(square: float) -> float | None:
    return math.sqrt(square) if math.isfinite(square) else None


def _rms(square: float, count: float) -> float | None:
    return _root(square / count) if count else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
