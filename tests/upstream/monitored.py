"""A training run of tests/training.py that is monitored."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_patch.config import MetricsConfig, WidthConfig
from tests.training import Hooks, Run
from tests.upstream.reference import scatter_weights


@dataclass
class Monitored(Hooks):
    """Builds a monitor as the package does; the settings are those of `MetricsConfig`.

    `directory` must be the same for all ranks; with `scatter` the weights are those of the float64 reference.
    """

    directory: str
    interval: int = 1
    spectral: int = 0
    tokens: int | None = 10
    layers: str = ".*"
    scatter: bool = True
    monitor: Any = field(default=None, repr=False)

    def built(self, run: Run) -> None:
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config

        from megatron_patch.upstream.parameters import describe
        from megatron_patch.upstream.step import AlignmentMonitor, watch

        settings = MetricsConfig(self.interval, self.tokens, self.layers, self.spectral, self.directory)
        parameters = list(describe(run.model, get_model_config(run.model[0]), WidthConfig(), parallel_state))
        if self.scatter:
            scatter_weights(parameters, run.optimizer, parallel_state)
        self.monitor = AlignmentMonitor(settings, run.model, parameters, run.optimizer, run.args)
        watch(self.monitor, run.optimizer)

    def result(self, run: Run) -> Any:
        return self.monitor.layers


def read_lines(directory: str | Path, name: str = "alignment") -> dict[tuple[int, str], dict[str, Any]]:
    """Return the lines of a metrics file by iteration and layer."""
    text = (Path(directory) / f"{name}.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return {(line["iteration"], line["layer"]): line for line in lines}
