"""DeepSpeed's engine in the place of Megatron's DDP and optimizer: the flags, and what contradicts what."""

from dataclasses import dataclass

from megatron_patch.config.options import option
from megatron_patch.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """Which back end trains."""

    active: bool = option(
        False, "train with DeepSpeed's ZeRO engine in place of Megatron's DDP and optimizer", name="deepspeed"
    )
    file: str | None = option(None, "DeepSpeed's JSON file, with --deepspeed", name="deepspeed_config")

    def validate(self) -> None:
        """Raise ConfigError where one of the two flags is given without the other."""
        if self.active and self.file is None:
            raise ConfigError(
                "--deepspeed-config",
                None,
                "DeepSpeed's JSON file, which --deepspeed needs",
                "give one, for example configs/deepspeed/zero1.json",
            )
        if self.file is not None and not self.active:
            raise ConfigError(
                "--deepspeed-config", self.file, "--deepspeed beside it", "add --deepspeed or drop this flag"
            )
