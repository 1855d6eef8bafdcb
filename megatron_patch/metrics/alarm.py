"""The live comparison of a run with its proxy: does what was tuned there happen here?"""

import bisect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_patch.config import Settings
from megatron_patch.config.pattern import as_in_gpt, pattern_of
from megatron_patch.errors import ConfigError
from megatron_patch.files.lines import FADED, AlignmentLine, CheckLine, read_lines
from megatron_patch.files.run_json import RUN_JSON, RunJson
from megatron_patch.files.whole import NotAsWritten, as_written
from megatron_patch.metrics.derive import Line, weight_rms
from megatron_patch.theory.deviation import UNKNOWN, Trained, likely_cause
from megatron_patch.theory.width import Rule

FILE = "transfer_check.jsonl"
QUANTITIES = {"relative_update": "relative update", "relative_representation_change": "RRC"}
"""What is compared, and what a warning calls it."""


class Curve:
    """A quantity over the fraction of training, linear between its measurements and nothing beyond them.

    >>> curve = Curve([(0.25, 1.0), (0.75, 3.0)])
    >>> curve.at(0.5), curve.at(0.75), curve.at(0.8)
    (2.0, 3.0, None)
    """

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        ordered = sorted(dict(points).items())
        self._fractions = [fraction for fraction, _ in ordered]
        self._values = [value for _, value in ordered]

    def at(self, fraction: float) -> float | None:
        """Return the value at a fraction of training; None before the first measurement and after the last."""
        right = bisect.bisect_left(self._fractions, fraction)
        if right == len(self._fractions):
            return None
        if self._fractions[right] == fraction:
            return self._values[right]
        if right == 0:
            return None
        a, b = self._fractions[right - 1], self._fractions[right]
        share = (fraction - a) / (b - a)
        return (1 - share) * self._values[right - 1] + share * self._values[right]


@dataclass(frozen=True)
class Proxy:
    """The reference run, as far as it has got."""

    folder: str
    rule: Callable[[str], Rule]
    """Layer -> the rule it was trained by."""
    curves: Mapping[str, Mapping[str, Curve]]
    """Layer, by the name it has in a GPT -> what was measured -> curve."""

    def trained(self, layer: str, fraction: float) -> Trained | None:
        """Return what a layer was trained with at a fraction of training; None where that was not measured."""
        curves = self.curves[layer]
        lr, decay, m = (curves[name].at(fraction) for name in ("lr", "weight_decay", "m"))
        if lr is None or decay is None or m is None:
            return None
        return Trained(lr, decay, m, curves["weight_rms"].at(fraction), self.rule(layer))


def read_proxy(folder: str) -> Proxy:
    """Read the metrics folder of the proxy's run; the run may still be going on.

    Measurements at an LR below `FADED` of the layer's peak are left out: they are meaningless, and so the end of a
    schedule that decays to 0 is compared with nothing.

    Raises:
        ConfigError: no readable run.json or alignment.jsonl in it, or no measured relative update.
    """

    def unusable(why: str) -> ConfigError:
        expected = "the metrics folder of a run with --alignment-interval, with run.json and alignment.jsonl in it"
        return ConfigError("--reference-run", folder, expected, f"check the path ({why})")

    try:
        run = RunJson.read(os.path.join(folder, RUN_JSON))
        total = run.train_iterations
        if total is None:
            raise NotAsWritten("train_iterations is None")
        with as_written():
            rule = Settings.of(run.arguments).width.trained_by()
    except OSError as error:
        raise unusable(f"run.json: {error.strerror}") from None
    except ValueError as error:
        raise unusable(f"run.json is not what megatron_patch writes: {error}") from None
    path = os.path.join(folder, "alignment.jsonl")
    if not os.path.isfile(path):
        raise unusable("there is no alignment.jsonl")
    lines = read_lines(path, AlignmentLine, [])
    if total < 1 or not any(line.relative_update is not None for line in lines):
        raise unusable("alignment.jsonl has no measured relative update")
    return Proxy(folder, rule, _curves(lines, total, pattern_of(run.arguments)))


def _curves(lines: Sequence[AlignmentLine], train_iterations: int, pattern: str | None) -> dict[str, dict[str, Curve]]:
    layers: dict[str, list[AlignmentLine]] = {}
    for line in lines:
        layers.setdefault(as_in_gpt(line.layer, pattern), []).append(line)
    found = {}
    for layer, measured in layers.items():
        floor = FADED * max(line.lr for line in measured)
        usable = [line for line in measured if line.lr > 0 and line.lr >= floor]
        found[layer] = {
            name: Curve(
                (line.iteration / train_iterations, value) for line in usable if (value := read(line)) is not None
            )
            for name, read in _MEASURED.items()
        }
    return found


_MEASURED: dict[str, Callable[[Any], float | None]] = {
    "relative_update": lambda line: line.relative_update,
    "relative_representation_change": lambda line: line.relative_representation_change,
    "lr": lambda line: line.lr,
    "weight_decay": lambda line: line.weight_decay,
    "m": lambda line: line.m,
    "weight_rms": lambda line: weight_rms(line.weight_norm, line.fan_in, line.fan_out),
}


class TransferCheck:
    """Compares every measurement of a run with its proxy's at the same fraction of training.

    Args:
        proxy: the reference run.
        rule: layer -> the rule it is trained by here, of `WidthConfig.trained_by`.
        train_iterations: of this run.
        factor: > 1; a ratio above it, or below 1 over it, is a deviation.
        count: after how many deviations of a layer's quantity in a row it is warned of.
        earlier: the lines written before the checkpoint that this run continues from.
        pattern: this run's --hybrid-layer-pattern. Proxy and target meet in the names of a GPT's layers.
    """

    def __init__(
        self,
        proxy: Proxy,
        rule: Callable[[str], Rule],
        train_iterations: int,
        factor: float,
        count: int,
        earlier: Iterable[CheckLine] = (),
        pattern: str | None = None,
    ) -> None:
        self._proxy = proxy
        self._pattern = pattern
        self._rule = rule
        self._train_iterations = train_iterations
        self._factor = factor
        self._count = count
        self._in_a_row: dict[tuple[str, str], int] = {}
        for line in earlier:
            self._counted(line.layer, line.quantity, line.ratio)

    def _counted(self, layer: str, quantity: str, ratio: float) -> int:
        """Return how many measurements in a row, this one included, deviate."""
        deviates = not 1 / self._factor <= ratio <= self._factor
        key = layer, quantity
        self._in_a_row[key] = self._in_a_row.get(key, 0) + 1 if deviates else 0
        return self._in_a_row[key]

    def unmatched(self, layers: Iterable[str]) -> list[str]:
        """Return the layers that the proxy does not have."""
        return [layer for layer in layers if as_in_gpt(layer, self._pattern) not in self._proxy.curves]

    def compare(self, measured: Sequence[Mapping[str, Any]]) -> list[Line]:
        """Return the lines of transfer_check.jsonl for the lines of alignment.jsonl of one iteration.

        What is null here, and what the proxy has not measured around this fraction of training, has no line and neither
        continues nor ends a row of deviations.
        """
        found = []
        for line in measured:
            curves = self._proxy.curves.get(as_in_gpt(line["layer"], self._pattern))
            if curves is None:
                continue
            fraction = line["iteration"] / self._train_iterations
            ratios: dict[str, float] = {}
            for quantity in QUANTITIES:
                value, reference = line[quantity], curves[quantity].at(fraction)
                if value is None or not reference:
                    continue
                ratio = ratios[quantity] = value / reference
                in_a_row = self._counted(line["layer"], quantity, ratio)
                alarm = in_a_row >= self._count
                compared = CheckLine(
                    iteration=line["iteration"],
                    fraction=fraction,
                    layer=line["layer"],
                    quantity=quantity,
                    value=value,
                    reference=reference,
                    ratio=ratio,
                    in_a_row=in_a_row,
                    alarm=alarm,
                    cause=self._cause(line, fraction, quantity, ratios) if alarm else None,
                )
                found.append(asdict(compared))
        return found

    def _cause(self, line: Mapping[str, Any], fraction: float, quantity: str, ratios: Mapping[str, float]) -> str:
        layer, ratio = line["layer"], ratios[quantity]
        proxy = self._proxy.trained(as_in_gpt(layer, self._pattern), fraction)
        if proxy is None or ratio <= 0 or line["lr"] <= 0:
            return UNKNOWN
        rms = weight_rms(line["weight_norm"], line["fan_in"], line["fan_out"])
        here = Trained(line["lr"], line["weight_decay"], line["m"], rms, self._rule(layer))
        aligned = None
        if quantity == "relative_representation_change" and ratios.get("relative_update"):
            aligned = ratio / ratios["relative_update"]  # eq. 4: RRC = alignment ratio * relative update
        return likely_cause(ratio, here, proxy, aligned)

    def warning(self, lines: Sequence[Line]) -> str | None:
        """Return one line of text on the layers whose row of deviations has become long enough with these lines.

        A row is warned of once; None if there is nothing new.
        """
        new = [line for line in lines if line["in_a_row"] == self._count]
        if not new:
            return None
        blocks: dict[tuple[str, str], list[Line]] = {}
        causes: dict[str, Line] = {}
        for line in new:
            blocks.setdefault((anonymous(line["layer"]), line["quantity"]), []).append(line)
            kind = re.sub(r"[\d./]+( of| times)?", "", line["cause"])  # the same sentence with other numbers
            if kind not in causes or abs(_log(line)) > abs(_log(causes[kind])):
                causes[kind] = line
        deviations = ", ".join(_deviation(quantity, block) for (_, quantity), block in blocks.items())
        reasons = sorted(causes.values(), key=lambda line: -abs(_log(line)))
        several = len(reasons) > 1
        reason = "; or ".join(f"{line['layer']}: {line['cause']}" if several else line["cause"] for line in reasons)
        first = new[0]
        return (
            f"WARNING: transfer alarm at iteration {first['iteration']} ({first['fraction']:.1%} of training): not "
            f"within a factor {self._factor:g} of the proxy's, {self._count} times in a row: {deviations}; likely "
            f"cause: {reason}; all values are in {FILE}"
        )


def _log(line: Line) -> float:
    return math.log(line["ratio"]) if line["ratio"] > 0 else -math.inf


def _deviation(quantity: str, lines: Sequence[Line]) -> str:
    """Return e.g. ``decoder.layers.0-3.mlp.linear_fc2 relative update 0.031 for 0.012 (2.5 to 2.7 times)``."""
    worst = max(lines, key=lambda line: abs(_log(line)))
    low, high = min(line["ratio"] for line in lines), max(line["ratio"] for line in lines)
    span = f"{low:.3g} to {high:.3g}" if f"{low:.3g}" != f"{high:.3g}" else f"{low:.3g}"
    (names,) = collapsed(line["layer"] for line in lines)
    return f"{names} {QUANTITIES[quantity]} {worst['value']:.3g} for {worst['reference']:.3g} ({span} times)"


_NUMBER = re.compile(r"(?<=layers\.)\d+")


def anonymous(layer: str) -> str:
    """Return a layer's name with a star for its number in the stack."""
    return _NUMBER.sub("*", layer, count=1)


def collapsed(layers: Iterable[str]) -> list[str]:
    """Return names with those that differ in the layer's number taken together.

    >>> collapsed(["output_layer", "decoder.layers.0.mlp.linear_fc2", "decoder.layers.1.mlp.linear_fc2"])
    ['output_layer', 'decoder.layers.0-1.mlp.linear_fc2']
    """
    numbers: dict[str, list[int]] = {}
    for layer in layers:
        number = _NUMBER.search(layer)
        numbers.setdefault(anonymous(layer), []).extend([int(number[0])] if number else [])
    return [name.replace("*", _ranges(found), 1) for name, found in numbers.items()]


def _ranges(numbers: Iterable[int]) -> str:
    """Return ``0-2,5`` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
