"""The extra warmup on top of the LR schedule: the flags, and what contradicts what."""

from dataclasses import dataclass

from megatron_patch.config.options import check_choices, option
from megatron_patch.config.width import WidthConfig
from megatron_patch.errors import ConfigError
from megatron_patch.theory.schedules import warmup_length

WARMUPS = ("none", "exp", "decay-away")
SCOPES = ("all", "width-dependent")


@dataclass(frozen=True)
class WarmupConfig:
    """The extra warmup factor on top of the LR schedule (arXiv 2510.19093, eqs. 14, 15)."""

    kind: str = option("none", "factor 1/m -> 1 on top of the LR schedule", name="extra_warmup", choices=WARMUPS)
    iters: int | None = option(None, "length of --extra-warmup exp in optimizer steps", name="extra_warmup_iters")
    fraction: float | None = option(
        None, "length of --extra-warmup exp as a fraction of the iterations", name="extra_warmup_fraction"
    )
    scope: str = option(
        "all",
        "all parameters, or only those whose LR or weight decay depends on width",
        name="extra_warmup_scope",
        choices=SCOPES,
    )

    @property
    def active(self) -> bool:
        """Whether the LR schedule is multiplied by anything."""
        return self.kind != "none"

    def steps(self, train_iterations: int) -> int | None:
        """Return T_W of exp in optimizer steps; None where no length is given, as for the other kinds."""
        if self.iters is not None:
            return self.iters
        return None if self.fraction is None else warmup_length(self.fraction, train_iterations)

    def validate(self, width: WidthConfig, hidden_size: int | None = None) -> None:
        """Raise ConfigError on the first setting that contradicts itself or another one.

        Args:
            width: which names the base.
            hidden_size: of the model, where it is known.
        """
        check_choices(self)
        length = {"--extra-warmup-iters": self.iters, "--extra-warmup-fraction": self.fraction}
        given = {name: value for name, value in length.items() if value is not None}
        if self.kind == "exp" and len(given) != 1:
            raise ConfigError(
                "--extra-warmup-iters/--extra-warmup-fraction",
                " and ".join(f"{name} {value}" for name, value in given.items()) or None,
                "exactly one of the two with --extra-warmup exp",
                "give the length of the warmup once",
            )
        if self.kind != "exp" and given:
            name, value = next(iter(given.items()))
            raise ConfigError(name, value, "--extra-warmup exp", "add --extra-warmup exp or drop this flag")
        if self.iters is not None and self.iters < 0:
            raise ConfigError("--extra-warmup-iters", self.iters, "an integer >= 0", "give the number of iterations")
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise ConfigError(
                "--extra-warmup-fraction", self.fraction, "a number between 0 and 1", "give a fraction of the run"
            )
        if self.active and width.base_hidden_size is None:
            raise ConfigError(
                "--extra-warmup",
                self.kind,
                "--base-hidden-size, since the warmup starts at base_hidden_size / hidden_size",
                "add --base-hidden-size, or drop --extra-warmup",
            )
        if self.active and hidden_size and width.base_hidden_size and width.base_hidden_size > hidden_size:
            raise ConfigError(
                "--base-hidden-size",
                width.base_hidden_size,
                f"at most the model's own hidden size {hidden_size} with --extra-warmup {self.kind}, whose factor"
                f" starts at {width.base_hidden_size / hidden_size:g}, above 1",
                "give the narrow proxy's hidden size (was it swapped with the target's?), or drop --extra-warmup",
            )
        if not self.active and self.scope != "all":
            raise ConfigError(
                "--extra-warmup-scope",
                self.scope,
                "an --extra-warmup to restrict",
                "add --extra-warmup or drop this flag",
            )
