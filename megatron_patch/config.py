"""Everything the flags of the group "width transfer" say, as frozen values that know what contradicts what."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_patch.errors import ConfigError

WIDTH_RULES = ("none", "standard", "independent", "sqrt", "sqrt-decay", "no-decay", "custom")
WARMUPS = ("none", "exp", "decay-away")
SCOPES = ("all", "width-dependent")
INIT_SCALINGS = ("megatron", "fan-in")

BASE_DIMENSIONS: dict[str, str] = {
    "ffn_hidden_size": "MLP width, the fan-in of linear_fc2",
    "kv_projection_size": "attention heads times (value) head size, the fan-in of the attention's linear_proj",
    "moe_ffn_hidden_size": "width of one expert, the fan-in of its linear_fc2",
    "moe_shared_expert_intermediate_size": "width of the shared experts, the fan-in of their linear_fc2",
    "moe_latent_size": "latent width of the experts, their fan-in under --moe-latent-size",
    "q_lora_rank": "MLA query rank, the fan-in of linear_q_up_proj",
    "kv_lora_rank": "MLA key/value rank, the fan-in of linear_kv_up_proj",
    "mamba_inner_size": "Mamba heads times head size, the fan-in of the mixer's out_proj",
    "linear_attention_inner_size": "value heads times head size of a linear attention, the fan-in of its out_proj",
}
"""Every fan-in that is not the hidden size: each has a flag ``--base-<name>``."""


def flag(name: str) -> str:
    """Return the command-line spelling of a setting: ``"q_lora_rank"`` -> ``"--q-lora-rank"``."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class WidthConfig:
    """How LR, weight decay, eps and initial weights depend on width."""

    rule: str = "none"
    base_hidden_size: int | None = None
    """Hidden size of the proxy; required by every rule but none."""
    base_dimensions: Mapping[str, int] = field(default_factory=dict)
    """The proxy's other fan-ins, keys of `BASE_DIMENSIONS`; absent = same ratio as the hidden sizes."""
    lr_exponent: float | None = None
    """a, only with the rule custom."""
    wd_exponent: float | None = None
    """b, only with the rule custom."""
    vector_lr: float | None = None
    """Peak LR of embeddings, gains and biases; None = `--lr`."""
    embedding_weight_decay: float | None = None
    """Weight decay of embeddings; None = what the rule says."""
    scale_output_layer: bool = True
    scale_adam_eps: bool = False
    init_scaling: str = "megatron"
    override: bool = False
    """Resume although rule, base, exponents, LR or weight decay differ from the checkpoint's."""

    @property
    def active(self) -> bool:
        """Whether any parameter group may differ from what Megatron builds by itself."""
        return self.rule != "none" or self.vector_lr is not None or self.embedding_weight_decay is not None

    def validate(self, warmup: bool = False) -> None:
        """Raise ConfigError on the first setting that contradicts itself or another one.

        Args:
            warmup: there is an extra warmup, which needs the base hidden size whatever the rule is.
        """
        if self.rule not in WIDTH_RULES:
            raise ConfigError("--width-scaling", self.rule, f"one of {', '.join(WIDTH_RULES)}", "choose one of them")
        if self.rule != "none" and self.base_hidden_size is None:
            raise ConfigError(
                "--base-hidden-size",
                None,
                f"the hidden size of the proxy, which --width-scaling {self.rule} needs",
                "give the hidden size of the model whose hyperparameters you tuned",
            )
        sizes = {"base_hidden_size": self.base_hidden_size}
        sizes.update({f"base_{name}": size for name, size in self.base_dimensions.items()})
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ConfigError(flag(name), size, "a positive integer", "give the proxy's size")
            if size is not None and self.rule == "none" and not (warmup and name == "base_hidden_size"):
                raise ConfigError(
                    flag(name),
                    size,
                    "a width rule to use it with",
                    "add --width-scaling (for example sqrt) or drop this flag",
                )
        exponents = {"--lr-width-exponent": self.lr_exponent, "--wd-width-exponent": self.wd_exponent}
        for name, exponent in exponents.items():
            if self.rule == "custom" and exponent is None:
                raise ConfigError(name, None, "a number with --width-scaling custom", "give the exponent")
            if self.rule != "custom" and exponent is not None:
                raise ConfigError(
                    name,
                    exponent,
                    f"no exponent, since --width-scaling {self.rule} fixes it",
                    "use --width-scaling custom or drop this flag",
                )
            if exponent is not None and not abs(exponent) <= 4:
                raise ConfigError(name, exponent, "a number between -4 and 4", "check the exponent")
        for name, value in (
            ("--vector-lr", self.vector_lr),
            ("--embedding-weight-decay", self.embedding_weight_decay),
        ):
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(name, value, "a finite number >= 0", "correct the value")
        if self.rule == "none":
            for name, given in (
                ("--no-scale-output-layer", not self.scale_output_layer),
                ("--scale-adam-eps", self.scale_adam_eps),
            ):
                if given:
                    raise ConfigError(
                        name, "given", "a width rule to use it with", "add --width-scaling or drop this flag"
                    )


@dataclass(frozen=True)
class WarmupConfig:
    """The extra warmup factor on top of the LR schedule (arXiv 2510.19093, eqs. 14, 15)."""

    kind: str = "none"
    iters: int | None = None
    """T_W of exp, in optimizer steps."""
    fraction: float | None = None
    """T_W of exp, as a fraction of the training iterations."""
    scope: str = "all"

    @property
    def active(self) -> bool:
        """Whether the LR schedule is multiplied by anything."""
        return self.kind != "none"

    def validate(self, width: WidthConfig) -> None:
        """Raise ConfigError on the first setting that contradicts itself or another one."""
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
        if not self.active and self.scope != "all":
            raise ConfigError(
                "--extra-warmup-scope",
                self.scope,
                "an --extra-warmup to restrict",
                "add --extra-warmup or drop this flag",
            )


@dataclass(frozen=True)
class MetricsConfig:
    """What is measured, how often, and where it is written."""

    alignment_interval: int = 0
    """Every how many iterations alignment is measured; 0 = never."""
    alignment_tokens: int | None = None
    """Sampled tokens per data-parallel rank; None = 1/64 of the rank's tokens in a step, at least 64."""
    alignment_layers: str = ".*"
    """Regular expression that a layer's name must match (`re.search`)."""
    spectral_interval: int = 0
    """Every how many iterations the top singular values are measured; 0 = never."""
    directory: str | None = None
    """Where the files go: --metrics-dir, else ``transfer/`` under --save, else under --tensorboard-dir."""
    record: bool = False
    """--metrics-dir was given: write run.json and hyperparameters.json even if nothing else is asked for."""
    reference_run: str | None = None
    """The proxy's metrics folder, with which every measurement is compared; None = nothing is."""
    reference_factor: float = 1.5
    """Beyond this factor a measurement deviates from the proxy's."""
    reference_count: int = 3
    """After how many deviations in a row a warning comes."""

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


@dataclass(frozen=True)
class Settings:
    """All of the group "width transfer"."""

    width: WidthConfig = WidthConfig()
    warmup: WarmupConfig = WarmupConfig()
    metrics: MetricsConfig = MetricsConfig()
    cpu: bool = False

    @property
    def active(self) -> bool:
        """Whether anything beyond Megatron's own behaviour was asked for."""
        return (
            self.width.active
            or self.width.override
            or self.width.init_scaling != "megatron"
            or self.warmup.active
            or self.metrics.active
            or self.metrics.record
        )

    def validate(self) -> None:
        """Raise ConfigError on the first contradiction."""
        self.width.validate(warmup=self.warmup.active)
        self.warmup.validate(self.width)
        self.metrics.validate()
