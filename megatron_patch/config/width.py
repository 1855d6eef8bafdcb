"""How LR, weight decay, eps and initial weights depend on width: the flags, and what contradicts what."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from megatron_patch.config.optimizer import OptimizerChoice
from megatron_patch.config.options import check_choices, flag, option, options
from megatron_patch.errors import ConfigError
from megatron_patch.theory.updates import rule_under
from megatron_patch.theory.width import RULES, Rule, rule

WIDTH_RULES = (*RULES, "custom")
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


@dataclass(frozen=True)
class WidthConfig:
    """How LR, weight decay, eps and initial weights depend on width."""

    rule: str = option("none", "rule for LR and weight decay across width", name="width_scaling", choices=WIDTH_RULES)
    base_hidden_size: int | None = option(None, "hidden size of the proxy; required by any rule but none")
    base_dimensions: Mapping[str, int] = options(
        "base_",
        {
            name: f"the proxy's {meaning}; default: by the ratio of the hidden sizes, or Megatron's choice"
            for name, meaning in BASE_DIMENSIONS.items()
        },
    )
    """The proxy's other fan-ins, keys of `BASE_DIMENSIONS`."""
    lr_exponent: float | None = option(
        None, "a of lr = base * m^-a; only with --width-scaling custom", name="lr_width_exponent"
    )
    wd_exponent: float | None = option(
        None, "b of weight decay = base * m^b; only with --width-scaling custom", name="wd_width_exponent"
    )
    vector_lr: float | None = option(None, "peak LR of embeddings, gains and biases; default: --lr")
    embedding_weight_decay: float | None = option(None, "weight decay of embeddings; default: what the rule says")
    scale_output_layer: bool = option(
        True, "the LM head keeps the base LR and weight decay", name="no_scale_output_layer"
    )
    scale_adam_eps: bool = option(False, "eps = --adam-eps * m^-a")
    init_scaling: str = option(
        "megatron",
        "fan-in: std 1/sqrt(own global fan-in) for every linear layer, 1/sqrt(hidden) for embeddings",
        choices=INIT_SCALINGS,
    )
    megatrons_mup: bool = False
    """Megatron's own --use-mup."""
    megatrons_base: int | None = None
    """Its --mup-base-hidden-size."""
    optimizer: OptimizerChoice = field(default_factory=OptimizerChoice)
    """Its --optimizer."""

    @property
    def active(self) -> bool:
        """Whether any parameter group may differ from what Megatron builds by itself."""
        return self.rule != "none" or self.vector_lr is not None or self.embedding_weight_decay is not None

    @property
    def scaling(self) -> Rule:
        """The rule with its exponents.

        Raises:
            KeyError: a rule that this version does not know.
        """
        return rule(self.rule, self.lr_exponent, self.wd_exponent)

    @property
    def mup_alone(self) -> bool:
        """Whether Megatron's --use-mup stands without a rule of ours: that is the rule standard, but for the LM head.

        It divides LR and eps of the matrices by m and leaves the weight decay.
        """
        return self.megatrons_mup and self.rule == "none"

    @property
    def described(self) -> "WidthConfig":
        """The settings with the base size that every m refers to: Megatron's own where its --use-mup stands alone."""
        return replace(self, base_hidden_size=self.megatrons_base) if self.mup_alone else self

    def trained_by(self) -> Callable[[str], Rule]:
        """Return which rule each linear layer is trained by, Megatron's own --use-mup included, by the layer's name.

        Under Muon the rule has the exponents of a layer that grows with the width in both directions.

        Raises:
            KeyError: a rule that this version does not know.
        """
        matrices = RULES["standard"] if self.mup_alone else self.scaling
        output = RULES["none"] if self.megatrons_mup or not self.scale_output_layer else matrices
        if self.mup_alone and self.optimizer.name == "muon":
            matrices = RULES["none"]  # Megatron's muP leaves the matrices that Muon trains alone
        matrices = rule_under(matrices, self.optimizer.of_matrices)
        return lambda layer: output if layer.startswith("output_layer") else matrices

    def validate(self, warmup: bool = False) -> None:
        """Raise ConfigError on the first setting that contradicts itself or another one.

        Args:
            warmup: there is an extra warmup, which needs the base hidden size whatever the rule is.
        """
        check_choices(self)
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
