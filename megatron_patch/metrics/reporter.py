"""Where the sums of a measured step go: the files of the metrics folder, the writers, and the live alarm."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_patch.errors import ConfigError
from megatron_patch.files.json_lines import JsonLines
from megatron_patch.files.lines import CheckLine, read_lines
from megatron_patch.metrics.alarm import FILE, TransferCheck, collapsed, read_proxy
from megatron_patch.metrics.derive import (
    EQUILIBRIUM_METRICS,
    METRICS,
    Line,
    alignment_line,
    equilibrium_line,
    expert_means,
    sublayer_line,
)
from megatron_patch.metrics.forecast import NormForecast
from megatron_patch.metrics.registry import Registry
from megatron_patch.metrics.writers import scalars
from megatron_patch.theory.width import Rule

type Log = Callable[[Mapping[str, float], int], None]
"""Takes the values of an iteration by key: TensorBoard, W&B."""


@dataclass(frozen=True)
class Alarm:
    """The comparison with the proxy, and the file for it."""

    check: TransferCheck
    file: JsonLines

    def compare(self, lines: Sequence[Line]) -> None:
        """Write how the lines of alignment.jsonl of one iteration compare, and print a warning if one is due."""
        compared = self.check.compare(lines)
        self.file.write(compared)
        if warning := self.check.warning(compared):
            print(warning, flush=True)


@dataclass(frozen=True)
class Measured:
    """What the ranks have measured together in one step."""

    iteration: int
    """1-based."""
    alignment: bool
    spectral: bool
    updated: bool
    """Whether every rank's optimizer made the step."""
    table: Sequence[Sequence[float]]
    """Sums of every line of the model, [lines, SLOTS]."""
    sublayers: Sequence[Sequence[float]]
    """Sums of every sublayer of the model, [sublayers, SUBLAYER_SLOTS]."""


class Reporter:
    """Turns the sums of measured steps into lines and hands these on; on the one rank that writes.

    Args:
        registry: the lines and sublayers of the model.
        wanted: which of its lines are reported, in its order.
        hidden_size: width d of the model.
        log: takes the values for the writers.
        files: alignment.jsonl, equilibrium.jsonl and sublayers.jsonl, of `open_files`; None: no files.
        alarm: of `open_alarm`; None: nothing is compared.
        wanted_means: names of the means over experts that are reported.
    """

    def __init__(
        self,
        registry: Registry,
        wanted: Sequence[bool],
        hidden_size: int,
        log: Log,
        files: tuple[JsonLines, JsonLines, JsonLines] | None = None,
        alarm: Alarm | None = None,
        wanted_means: Sequence[str] = (),
    ) -> None:
        self._registry = registry
        self._wanted = wanted
        self._hidden_size = hidden_size
        self._log = log
        self._files = files
        self._alarm = alarm
        self._wanted_means = frozenset(wanted_means)
        self._said_not_finite = False

    def report(self, measured: Measured, forecast: NormForecast) -> None:
        """Write one step.

        Args:
            measured: its sums.
            forecast: the recurrence of the weights' sizes, at the state before this step.
        """
        registry, iteration = self._registry, measured.iteration
        every = [
            alignment_line(iteration, row, sums, measured.alignment, measured.spectral, measured.updated)
            for row, sums in zip(registry.rows, measured.table, strict=True)
        ]
        self._say_not_finite(measured)
        predicted = [equilibrium_line(line, forecast, self._hidden_size) for line in every]
        lines = [line for line, wanted in zip(every, self._wanted, strict=True) if wanted]
        equilibrium = [line for line, wanted in zip(predicted, self._wanted, strict=True) if wanted]
        for mean, mean_predicted in expert_means(registry.rows, every, predicted):
            if mean["layer"] in self._wanted_means:
                lines.append(mean)
                equilibrium.append(mean_predicted)
        gains = []
        if measured.alignment:
            gains = [
                sublayer_line(iteration, s.name, s.width, sums, measured.table[registry.row_index[s.input_row]])
                for s, sums in zip(registry.sublayers, measured.sublayers, strict=True)
            ]
        if self._files is not None:
            for file, content in zip(self._files, (lines, equilibrium, gains), strict=True):
                file.write(content)
        values = {
            **scalars(lines, METRICS),
            **scalars(equilibrium, EQUILIBRIUM_METRICS),
            **{f"sublayer_gain/{line['layer']}": line["gain"] for line in gains if line["gain"] is not None},
        }
        self._log(values, iteration)
        if self._alarm is not None and measured.alignment:
            self._alarm.compare(lines)

    def _say_not_finite(self, measured: Measured) -> None:
        """Say once that values are null because weights or activations are no numbers; the run goes on, as it would."""
        spoilt = [
            row.layer
            for row, sums, wanted in zip(self._registry.rows, measured.table, self._wanted, strict=True)
            if wanted and not all(map(math.isfinite, sums))
        ]
        if spoilt and not self._said_not_finite:
            self._said_not_finite = True
            print(
                f"WARNING: metrics of iteration {measured.iteration}: weights, updates or inputs of {spoilt[0]} "
                f"({len(spoilt)} of {sum(self._wanted)} lines) are not finite or beyond fp32; such values are null, "
                "and this is not said again",
                flush=True,
            )


def open_files(directory: str, last_iteration: int) -> tuple[JsonLines, JsonLines, JsonLines]:
    """Return alignment.jsonl, equilibrium.jsonl and sublayers.jsonl, cut back to where the run continues.

    Raises:
        OSError: a file cannot be written.
    """
    alignment, equilibrium, sublayers = (
        JsonLines(f"{directory}/{name}.jsonl", last_iteration) for name in ("alignment", "equilibrium", "sublayers")
    )
    return alignment, equilibrium, sublayers


def open_alarm(
    folder: str,
    directory: str,
    layers: Sequence[str],
    rule: Callable[[str], Rule],
    train_iterations: int,
    last_iteration: int,
    factor: float,
    count: int,
    pattern: str | None = None,
) -> Alarm:
    """Return the comparison with a proxy, and say on the terminal what is compared.

    Args:
        folder: the metrics folder of the proxy's run.
        directory: where transfer_check.jsonl goes; it is cut back to where the run continues.
        layers: what this run reports.
        rule, train_iterations, factor, count, pattern: as in `TransferCheck`.
        last_iteration: of the checkpoint that the run continues from; 0 for a new run.

    Raises:
        ConfigError: the folder cannot be read, or holds no layer of this model.
        OSError: the file cannot be written.
    """
    proxy, path = read_proxy(folder), os.path.join(directory, FILE)
    file = JsonLines(path, last_iteration)
    earlier = read_lines(path, CheckLine, [])
    check = TransferCheck(proxy, rule, train_iterations, factor, count, earlier, pattern)
    missing = check.unmatched(layers)
    if len(missing) == len(layers):
        raise ConfigError(
            "--reference-run",
            folder,
            f"a run in which a layer of this model was measured, {layers[0]} for one",
            "give the run of a proxy of the same architecture",
        )
    _announce(folder, len(layers) - len(missing), missing, factor, count)
    return Alarm(check, file)


def _announce(folder: str, matched: int, missing: Sequence[str], factor: float, count: int) -> None:
    compared = f"{matched} layers with {folder}, factor {factor:g}"
    print(f"> transfer check: {compared}, {count} times in a row", flush=True)
    if missing:
        print(f"> transfer check: no counterpart for {', '.join(collapsed(missing))}", flush=True)
