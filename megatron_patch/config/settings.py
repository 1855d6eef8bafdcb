"""All our flags together, read from whatever holds them by name."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_patch.config.engine import EngineConfig
from megatron_patch.config.metrics import MetricsConfig
from megatron_patch.config.optimizer import OptimizerChoice
from megatron_patch.config.options import option, options_of, read
from megatron_patch.config.warmup import WarmupConfig
from megatron_patch.config.width import WidthConfig
from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import METRICS_FOLDER


@dataclass(frozen=True)
class Settings:
    """All of the group "width transfer"."""

    width: WidthConfig = field(default_factory=WidthConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    audit_interval: int = option(
        0, "hold the live optimizer to the rule every N iterations, beside the start; 0 = at the start only"
    )
    override: bool = option(
        False,
        "resume although rule, base, exponents, LR or weight decay differ from the checkpoint's",
        name="override_width_scaling",
    )
    cpu: bool = option(False, "run on CPU with gloo; refused where CUDA is present")
    allow_rank_differences: bool = option(
        False, "train although code, data, versions or arguments are not the same on every rank; they are warned of"
    )
    allow_untested_megatron: bool = option(False, "try a Megatron version that this package was not tested with")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Settings":
        """Read the settings; the one place that knows what our flags are called where they are read back.

        Args:
            arguments: Megatron's, ours included, by attribute name: ``vars(args)``, the ``arguments`` of a run.json, or
                the flags of a YAML file after `attributes`. What is absent or None has its default.

        Raises:
            ConfigError: a value of another type. What contradicts what, `validate` says.
        """
        mup = bool(arguments.get("use_mup"))
        width = WidthConfig(
            **read(WidthConfig, arguments),
            megatrons_mup=mup,
            megatrons_base=arguments.get("mup_base_hidden_size"),
            optimizer=OptimizerChoice.of(arguments),
        )
        if mup and width.rule != "none":
            # Megatron's own muP never scales the LM head and always scales eps.
            width = replace(width, scale_output_layer=False, scale_adam_eps=True)
        metrics = MetricsConfig(**read(MetricsConfig, arguments))
        parent = arguments.get("save") or arguments.get("tensorboard_dir")
        if metrics.directory:
            metrics = replace(metrics, record=True)
        else:
            metrics = replace(metrics, directory=os.path.join(str(parent), METRICS_FOLDER) if parent else None)
        engine = EngineConfig(**read(EngineConfig, arguments))
        return cls(width, WarmupConfig(**read(WarmupConfig, arguments)), metrics, engine, **read(cls, arguments))

    @property
    def active(self) -> bool:
        """Whether anything beyond Megatron's own behaviour was asked for."""
        return (
            self.width.active
            or self.override
            or self.width.init_scaling != "megatron"
            or self.warmup.active
            or self.metrics.active
            or self.metrics.record
            or self.engine.active
            or self.audit_interval > 0
        )

    def validate(self, hidden_size: int | None = None) -> None:
        """Raise ConfigError on the first contradiction.

        Args:
            hidden_size: of the model, where it is known.
        """
        self.width.validate(warmup=self.warmup.active)
        self.warmup.validate(self.width, hidden_size)
        self.metrics.validate()
        self.engine.validate()
        if self.audit_interval < 0:
            raise ConfigError("--audit-interval", self.audit_interval, "an integer >= 0", "give 0 to switch it off")


OPTIONS = tuple(
    one
    for settings in (WidthConfig, WarmupConfig, MetricsConfig, EngineConfig, Settings)
    for one in options_of(settings)
)
"""Every flag, in the order of ``--help``."""
