"""The lines of the files in a metrics folder: their keys, in the order in which they are written, and their reader."""

import os
from dataclasses import MISSING, dataclass, fields
from typing import Any, cast

from megatron_patch.errors import ConfigError
from megatron_patch.files.whole import parse_json

FADED = 0.005
"""Share of its peak LR below which a layer's update is too small to be measured (arXiv 2510.19093 drops 0.5%)."""


@dataclass(frozen=True, slots=True)
class AlignmentLine:
    """One line of alignment.jsonl: a layer at an iteration. None where not measured."""

    iteration: int
    layer: str
    kind: str
    """How the layer is split: column, row or replicated; ``expert_mean`` for the mean over the experts of a layer."""
    fan_in: int
    fan_out: int
    m: float
    lr: float
    weight_decay: float
    tokens: int | None
    weight_norm: float | None
    update_norm: float | None
    relative_update: float | None
    weight_alignment: float | None
    update_alignment: float | None
    alignment_ratio: float | None
    relative_representation_change: float | None
    top_singular_value: float | None
    top_singular_value_error: float | None = None
    """Bound of its relative error: the true value is at most that much larger, and no smaller."""


@dataclass(frozen=True, slots=True)
class EquilibriumLine:
    """One line of equilibrium.jsonl: measured and predicted size of a layer's weight and of its update."""

    iteration: int
    layer: str
    weight_rms: float | None
    predicted_weight_rms: float | None
    relative_update: float | None
    predicted_relative_update: float | None
    equilibrium_relative_update: float | None
    normalised_top_singular_value: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SublayerLine:
    """One line of sublayers.jsonl: an attention or MLP block at an iteration."""

    iteration: int
    layer: str
    input_rms: float | None = None
    output_rms: float | None = None
    gain: float | None
    """RMS of the block's output over RMS of its normalised input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckLine:
    """One line of transfer_check.jsonl: a quantity of a layer at an iteration, beside its proxy's."""

    iteration: int
    fraction: float | None = None
    """Of the run's iterations."""
    layer: str
    quantity: str
    value: float | None = None
    reference: float | None = None
    """The proxy's at the same fraction."""
    ratio: float
    in_a_row: int | None = None
    """Measurements that deviate, this one and those right before it."""
    alarm: bool | None = None
    cause: str | None = None
    """The likely one, in words; None without an alarm."""


def keys(line_type: type[Any]) -> tuple[str, ...]:
    """Return the keys of a line of this type, in the order in which they are written."""
    return tuple(field.name for field in fields(line_type))


def read_lines[Line](path: str, line_type: type[Line], notes: list[str]) -> tuple[Line, ...]:
    """Return the lines of a JSON-lines file of the metrics folder; none, if there is no such file.

    Args:
        path: the file; it may be growing.
        line_type: one of the types above; a line may have more keys. A field with a default is one that nothing here
            needs, so a line is read without it.
        notes: gets a note if the last line is unfinished, which is then left out.

    Raises:
        ConfigError: the file cannot be read, or a line of it is not of this type.
    """
    if not os.path.exists(path):
        return ()
    name = os.path.basename(path)
    lines = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, text in enumerate(file, start=1):
                try:
                    lines.append(_line(text, line_type))
                except (KeyError, TypeError, ValueError) as error:
                    if not text.endswith("\n"):
                        notes.append(f"the last line of {name} is unfinished and was left out")
                        break
                    detail = f"no {error}" if isinstance(error, KeyError) else str(error)
                    raise ConfigError(
                        f"{path} line {number}",
                        f"({detail})",
                        "a JSON object with the keys of this file",
                        "delete the line, or restore the file",
                    ) from None
    except OSError as error:
        raise ConfigError(path, "", "a readable file", f"check its permissions ({error.strerror})") from None
    return tuple(lines)


def _line[Line](text: str, line_type: type[Line]) -> Line:
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("not an object")
    values = {}
    for field in fields(cast(Any, line_type)):
        needed = field.default is MISSING
        value = content[field.name] if needed else content.get(field.name)
        wanted: Any = field.type
        if isinstance(value, wanted) or (isinstance(value, int) and isinstance(0.0, wanted)):
            values[field.name] = value
        elif needed:
            raise ValueError(f"{field.name} is {value!r}")
    return line_type(**values)
