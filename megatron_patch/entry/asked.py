"""What the command line of a launch says of its run, read without Megatron."""

import argparse
import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_patch.config import Settings
from megatron_patch.config.arguments import add_arguments
from megatron_patch.entry.run import split_command_line, yaml_arguments
from megatron_patch.errors import ConfigError
from megatron_patch.files.yaml_flags import load_yaml
from megatron_patch.hosts.check import Wanted
from megatron_patch.hosts.same import DATA, FILES


@dataclass(frozen=True)
class Asked:
    """What is known of a run before it starts. What is wrong with a flag, the run itself says best: then it is None."""

    config: str = ""
    """The file of --config; empty if there is none."""
    save: str | None = None
    """--save."""
    load: str | None = None
    """--load."""
    metrics: str | None = None
    """The folder of run.json; None if the run writes none."""
    cpu: bool = False
    """Whether it needs no GPU."""
    wait: float | None = None
    """--distributed-timeout-minutes, in seconds."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The flags that name data and tokenizer, by attribute name."""

    @classmethod
    def of(cls, run: Sequence[str]) -> "Asked":
        """Read what follows ``megatron_patch run``.

        Raises:
            ConfigError: the config cannot be read, or the script is missing.
        """
        config, _, arguments = split_command_line(run)
        return cls.of_flags(config, load_yaml(config) if config else {}, arguments)

    @classmethod
    def of_flags(cls, config: str | None, flags: Mapping[str, Any], arguments: Sequence[str]) -> "Asked":
        """Read the flags of a YAML file, and a command line that wins over them."""
        parser = add_arguments(argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False))
        for flag in ("--save", "--load", "--tensorboard-dir", *map(_flag, FILES)):
            parser.add_argument(flag)
        for flag in map(_flag, DATA):
            parser.add_argument(flag, nargs="*")
        parser.add_argument("--distributed-timeout-minutes", type=float)
        parser.add_argument("--skip-train", action="store_true")
        with contextlib.suppress(argparse.ArgumentError, ConfigError):
            known, _ = parser.parse_known_args([*yaml_arguments(flags, parser, arguments), *arguments])
            settings, values = Settings.of(vars(known)), vars(known)
            writes = settings.active and not known.skip_train
            return cls(
                config or "",
                known.save,
                known.load,
                settings.metrics.directory if writes else None,
                settings.cpu,
                known.distributed_timeout_minutes and 60 * known.distributed_timeout_minutes,
                {name: values[name] for name in (*DATA, *FILES) if values[name]},
            )
        return cls(config or "")

    def wanted(self, port: int, slots: Mapping[str, int]) -> Wanted:
        """Return what the run wants of its hosts, which have so many slots for GPUs."""
        files = (self.config,) if self.config else ()
        save = self.save and os.path.abspath(self.save)
        return Wanted(os.getcwd(), files, save, port, self.data, None if self.cpu else slots)


def _flag(attribute: str) -> str:
    return f"--{attribute.replace('_', '-')}"
