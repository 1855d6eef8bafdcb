"""What is measured, how often, and where it is written: the flags, and what contradicts what."""

from dataclasses import dataclass

from megatron_patch.config.options import option
from megatron_patch.errors import ConfigError


@dataclass(frozen=True)
class MetricsConfig:
    """What is measured, how often, and where it is written."""

    alignment_interval: int = option(0, "measure alignment every N iterations; 0 = off")
    alignment_tokens: int | None = option(
        None, "sampled tokens per data-parallel rank; default: 1/64 of the rank's tokens in a step, at least 64"
    )
    alignment_layers: str = option(".*", "regular expression: only layers whose name matches are measured")
    """Matched by `re.search`."""
    spectral_interval: int = option(0, "measure top singular values every N iterations; 0 = off")
    directory: str | None = option(
        None, "folder for our files; default: transfer/ under --save, else under --tensorboard-dir", name="metrics_dir"
    )
    """Where the files go: the flag's value, or what it says is the default."""
    record: bool = False
    """--metrics-dir was given: write run.json and hyperparameters.json even if nothing else is asked for."""
    reference_run: str | None = option(
        None, "the proxy's metrics folder: warn where this run's updates are not the proxy's"
    )
    reference_factor: float = option(1.5, "with --reference-run: how far updates may be from the proxy's, as a factor")
    reference_count: int = option(
        3, "with --reference-run: warn after this many measurements in a row beyond the factor"
    )
    report: bool = option(
        True, "leave out the report (report.html, report.png) that a run with metrics ends with", name="no_report"
    )

    @property
    def active(self) -> bool:
        """Whether anything is measured."""
        return self.alignment_interval > 0 or self.spectral_interval > 0

    def validate(self) -> None:
        """Raise ConfigError on the first setting that contradicts itself or another one."""
        for name, interval in (
            ("--alignment-interval", self.alignment_interval),
            ("--spectral-interval", self.spectral_interval),
        ):
            if interval < 0:
                raise ConfigError(name, interval, "an integer >= 0", "give 0 to switch it off")
        if self.alignment_tokens is not None and self.alignment_tokens < 1:
            raise ConfigError(
                "--alignment-tokens", self.alignment_tokens, "a positive integer", "give a number of tokens"
            )
        if self.alignment_tokens is not None and self.alignment_interval == 0:
            raise ConfigError(
                "--alignment-tokens",
                self.alignment_tokens,
                "an --alignment-interval at which to sample them",
                "add --alignment-interval or drop this flag",
            )
        if self.alignment_layers != ".*" and not self.active:
            raise ConfigError(
                "--alignment-layers",
                self.alignment_layers,
                "an --alignment-interval or --spectral-interval at which to measure them",
                "add one of the two or drop this flag",
            )
        self._validate_reference()
        if self.active and self.directory is None:
            raise ConfigError(
                "--metrics-dir", None, "a folder for alignment.jsonl", "give --metrics-dir, --save or --tensorboard-dir"
            )

    def _validate_reference(self) -> None:
        if self.reference_run is not None and self.alignment_interval == 0:
            raise ConfigError(
                "--reference-run",
                self.reference_run,
                "an --alignment-interval at which to compare with it",
                "add --alignment-interval or drop this flag",
            )
        for name, value, default in (
            ("--reference-factor", self.reference_factor, MetricsConfig.reference_factor),
            ("--reference-count", self.reference_count, MetricsConfig.reference_count),
        ):
            if value != default and self.reference_run is None:
                raise ConfigError(name, value, "a --reference-run to compare with", "add it or drop this flag")
        if not 1 < self.reference_factor < float("inf"):
            raise ConfigError("--reference-factor", self.reference_factor, "a number above 1", "give 1.5, for example")
        if self.reference_count < 1:
            raise ConfigError("--reference-count", self.reference_count, "a positive integer", "give 3, for example")
