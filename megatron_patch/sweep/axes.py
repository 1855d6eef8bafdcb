"""What a sweep varies: axes of points, each point a few flags that change together."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.files.yaml_flags import FLAG_NAME, flag_name, is_flag_value
from megatron_patch.sweep.placeholders import check_placeholders

OWN_PLACES = ("{folder}", "{name}", "{config}")
"""In the value of a flag: what no other trial has."""
OWN_FLAGS = ("metrics-dir", "tensorboard-dir")
"""The sweep gives each trial its own."""


@dataclass(frozen=True)
class AxisPoint:
    """One value of an axis."""

    label: str
    """For the trial's name, e.g. ``"0.0078125"``."""
    flags: Mapping[str, Any]
    """What it sets; None leaves a flag out."""


@dataclass(frozen=True)
class Axis:
    """One thing that a sweep varies."""

    name: str
    """The flag, or the name given to a bundle of flags."""
    points: tuple[AxisPoint, ...]


@dataclass(frozen=True)
class PlannedTrial:
    """One training that a sweep asks for."""

    name: str
    """Of its folder: made from its own axis values, so it stays when the sweep grows."""
    changes: Mapping[str, Any]
    """Flags on top of the sweep's; None leaves a flag out."""


def value_label(value: object) -> str:
    """Return a value as it stands in names: floats with 10 digits."""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def safe_name(text: str) -> str:
    """Return `text` as the name of a folder: no separators, no spaces, not hidden or empty, at most 200 characters."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", text).lstrip(".-")[:200] or "_"


def flag_of(where: str, key: object) -> str:
    """Return the flag that a YAML key names.

    Raises:
        ConfigError: it names none, or one that only the sweep may set.
    """
    name = flag_name(str(key))
    if not isinstance(key, str) or not FLAG_NAME.fullmatch(name):
        raise ConfigError(where, key, "the name of a flag", "correct or quote it")
    if name in OWN_FLAGS:
        raise ConfigError(where, name, "another flag: the sweep gives each trial its own", "delete it")
    return name


def check_value(where: str, flag: str, value: object) -> None:
    """Raise ConfigError if a flag cannot have this value, or would make trials write over each other."""
    if not is_flag_value(value):
        raise ConfigError(f"{where}.{flag}", value, "a value or a list of values", "write flags flat")
    check_placeholders(f"{where}.{flag}", value)
    if flag == "save" and value is not None and not any(own in str(value) for own in OWN_PLACES):
        raise ConfigError(
            f"{where}.save", value, "a folder of each trial's own", 'write "{folder}/checkpoints", or null for none'
        )


def read_axes(where: str, content: object) -> tuple[Axis, ...]:
    """Return the axes of a grid.

    Args:
        where: the place in the file, for messages.
        content: what YAML made of it.

    Raises:
        ConfigError: no mapping, an axis that cannot be read, or a flag in two axes.
    """
    if not isinstance(content, dict) or not content:
        raise ConfigError(where, content, "a mapping of axes", "write for example `lr: {log2: [-9, -4]}`")
    axes = [read_axis(where, key, values) for key, values in content.items()]
    owner: dict[str, str] = {}
    for axis in axes:
        for flag in dict.fromkeys(flag for point in axis.points for flag in point.flags):
            if flag in owner:
                raise ConfigError(where, flag, f"each flag in one axis, and {owner[flag]} has it", "drop it from one")
            owner[flag] = axis.name
    return tuple(axes)


def read_axis(where: str, key: object, values: object) -> Axis:
    """Return the axis that one entry of a grid describes: a list of values, a list of bundles, or powers of 2.

    Raises:
        ConfigError: it is none of them, or two of its points would have one name.
    """
    name = flag_of(where, key)
    where = f"{where}.{name}"
    if isinstance(values, dict):
        points = [AxisPoint(value_label(value), {name: value}) for value in powers_of_two(where, values)]
    elif isinstance(values, list) and values:
        points = [_point(where, name, value) for value in values]
        bundles = sum(isinstance(value, dict) for value in values)
        if bundles not in (0, len(values)):
            raise ConfigError(where, values, "values, or mappings of flags, but not both", "make them all mappings")
    else:
        raise ConfigError(where, values, "a list of values, or {log2: [low, high]}", "write `[...]` around the value")
    labels: set[str] = set()
    for point in points:
        if point.label in labels:
            fix = "remove one; where both are meant, put the flag that tells them apart first"
            raise ConfigError(where, point.label, "points that differ in their first flag", fix)
        labels.add(point.label)
    return Axis(name, tuple(points))


def _point(where: str, name: str, value: object) -> AxisPoint:
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ConfigError(where, value, "one value", f"for a flag that takes several write `- {{{name}: [...]}}`")
        check_value(where, name, value)
        return AxisPoint(value_label(value), {name: value})
    if not value:
        raise ConfigError(where, value, "at least one flag", "delete the empty mapping")
    flags = {}
    for key, content in value.items():
        flag = flag_of(where, key)
        check_value(where, flag, content)
        flags[flag] = content
    return AxisPoint(value_label(next(iter(flags.values()))), flags)


def read_number(where: str, value: object) -> float:
    """Return a YAML value as a finite number; ``1e-3``, which YAML takes for text, is one.

    Raises:
        ConfigError: it is none.
    """
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        result = float(value)
        if not math.isfinite(result):
            raise ValueError
    except ValueError:
        raise ConfigError(where, value, "a number", "correct it") from None
    return result


def bounds(where: str, value: object) -> tuple[float, float]:
    """Return ``[low, high]``.

    Raises:
        ConfigError: not two numbers, the lower first.
    """
    if not isinstance(value, list) or len(value) != 2:
        raise ConfigError(where, value, "[low, high]", "give two numbers")
    low, high = (read_number(where, entry) for entry in value)
    if low > high:
        raise ConfigError(where, value, "the lower one first", "swap them")
    return low, high


def powers_of_two(where: str, content: Mapping[Any, Any]) -> list[float | int]:
    """Return the values that ``{log2: [low, high], step: 1}`` means: 2^low to 2^high, both included.

    Whole powers from 2^0 up are integers, so that widths can be written this way.

    Raises:
        ConfigError: another form, or a step that does not end at the upper bound.
    """
    if "log2" not in content or not set(content) <= {"log2", "step"}:
        raise ConfigError(where, content, "a list of values, or {log2: [low, high], step: 1}", "write one of them")
    low, high = bounds(f"{where}.log2", content["log2"])
    step = read_number(f"{where}.step", content.get("step", 1))
    if max(abs(low), abs(high)) > 1000 or step < 1e-3 or (high - low) / step > 10_000:
        raise ConfigError(where, content, "exponents within 1000, and a step above 0.001", "correct them")
    steps = round((high - low) / step)
    if abs(low + steps * step - high) > 1e-9 * max(1, abs(high)):
        raise ConfigError(where, content, f"steps that lead from {low:g} to {high:g}", "change the step or a bound")
    exponents = [low + i * step for i in range(steps + 1)]
    if low >= 0 and all(exponent == int(exponent) for exponent in exponents):
        return [2 ** int(exponent) for exponent in exponents]
    return [2.0**exponent for exponent in exponents]


def combinations(axes: Sequence[Axis], prefix: str = "") -> Iterator[PlannedTrial]:
    """Yield every combination of the points of the axes, the last axis varying fastest."""
    for points in itertools.product(*(axis.points for axis in axes)):
        parts = [f"{axis.name}={point.label}" for axis, point in zip(axes, points, strict=True)]
        changes = {flag: value for point in points for flag, value in point.flags.items()}
        yield PlannedTrial(safe_name(prefix + "_".join(parts)), changes)


def plan(where: str, grids: Sequence[Sequence[Axis]], prefix: str = "") -> tuple[PlannedTrial, ...]:
    """Return the trials of all grids, each once.

    Raises:
        ConfigError: two different trials have one name.
    """
    found: dict[str, PlannedTrial] = {}
    for axes in grids:
        for trial in combinations(axes, prefix):
            if found.setdefault(trial.name, trial).changes != trial.changes:
                fix = "tell them apart by the first flag of a bundle, or by the name of an axis"
                raise ConfigError(where, trial.name, "one name for one trial, and two differ in other flags", fix)
    return tuple(found.values())
