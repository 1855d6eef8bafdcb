"""A training run of tests/support/training.py that is monitored."""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_patch.config import MetricsConfig, WidthConfig
from tests.support.reference import scatter_weights
from tests.support.training import Hooks, Run


def causal_attention(scale: float, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Return plain causal attention of [s, b, heads, size] tensors, [s, b, heads * value size]."""
    import torch

    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


def allow_on_cpu(flag: str) -> None:
    """Let a flag pass that --cpu refuses, where a test stands in for what is missing."""
    from megatron_patch.upstream import refusals

    kept = (row for row in refusals.TABLE if (row.feature, row.flag) != (refusals.Feature.CPU, flag))
    refusals.TABLE = tuple(kept)


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

    def before_arguments(self) -> None:
        """Let MLA be built from the local spec, whose attention does not know its head sizes in 0.19.2; let pipelines
        be interleaved, for which the trainer wants a data set provider with another signature."""
        from megatron.core.transformer.dot_product_attention import DotProductAttention

        from tests.support import training

        allow_on_cpu("--multi-latent-attention")

        provider = training._datasets

        def staged(sizes: Any, vp_stage: int | None = None) -> Any:
            return provider(sizes)

        staged.is_distributed = True  # type: ignore[attr-defined]
        training._datasets = staged

        original = DotProductAttention.__init__

        def init(
            self: Any, config: Any, *args: Any, k_channels: Any = None, v_channels: Any = None, **kwargs: Any
        ) -> None:
            original(self, config, *args, **kwargs)
            if k_channels is not None:
                self.forward = partial(causal_attention, k_channels**-0.5)

        DotProductAttention.__init__ = init

    def built(self, run: Run) -> None:
        from megatron.core import parallel_state
        from megatron.core.utils import get_model_config

        from megatron_patch.upstream.monitor.monitor import AlignmentMonitor, watch
        from megatron_patch.upstream.width.parameters import describe

        settings = MetricsConfig(self.interval, self.tokens, self.layers, self.spectral, self.directory)
        parameters = list(describe(run.model, get_model_config(run.model[0]), WidthConfig(), parallel_state))
        if self.scatter:
            scatter_weights(parameters, run.optimizer, parallel_state, bool(run.args.swiglu))
        self.monitor = AlignmentMonitor(settings, run.model, parameters, run.optimizer, run.args)
        watch(self.monitor, run.optimizer)

    def ended(self, run: Run) -> None:
        self.monitor.flush()

    def result(self, run: Run) -> Any:
        return self.monitor.layers


def read_lines(directory: str | Path, name: str = "alignment") -> dict[tuple[int, str], dict[str, Any]]:
    """Return the lines of a metrics file by iteration and layer."""
    text = (Path(directory) / f"{name}.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return {(line["iteration"], line["layer"]): line for line in lines}
