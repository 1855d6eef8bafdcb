"""Scaling rules: how learning rate and weight decay change with the width of ONE layer.

Conventions are PyTorch AdamW's, `W <- (1 - eta*lambda) W - eta*u`, so the shrink per step is the product eta*lambda.
`m` is the width multiplier of a layer: its own global fan-in over the fan-in of the same layer in the base model.
"""

from dataclasses import dataclass
from typing import Literal

Role = Literal["matrix", "output", "embedding", "vector"]
ROLES: tuple[Role, ...] = ("matrix", "output", "embedding", "vector")


@dataclass(frozen=True)
class Rule:
    """One width rule: `eta = eta_base * m^-a`, `lambda = lambda_base * m^b`, hence `eta*lambda ~ m^(b-a)`."""

    name: str
    lr_exponent: float
    """a."""
    wd_exponent: float
    """b."""
    source: str
    decays: bool = True
    """False: every weight decay is zero."""
    embedding_decays: bool = True
    """False: embeddings have zero weight decay although matrices decay."""

    @property
    def follows_updates(self) -> bool:
        """Whether the exponents are AdamW's, and others follow under another optimizer: see `theory.updates`."""
        return self.name not in ("none", "custom")


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("none", 0.0, 0.0, "arXiv 2510.19093, control"),
        Rule("standard", 1.0, 0.0, "arXiv 2510.19093, eq. 7"),
        Rule("independent", 1.0, 1.0, "arXiv 2510.19093, eq. 8"),
        Rule("sqrt", 0.5, 0.5, "arXiv 2510.19093, appendix B.1"),
        Rule("sqrt-decay", 1.0, 0.5, "arXiv 2510.15262", embedding_decays=False),
        Rule("no-decay", 1.0, 0.0, "arXiv 2510.19093, appendix C", decays=False),
    )
}


def rule(name: str, a: float | None = None, b: float | None = None) -> Rule:
    """Return a rule by its name; `a` and `b` are the exponents of the rule custom, and of no other.

    Raises:
        KeyError: there is no such rule.
        ValueError: custom without an exponent.

    >>> rule("sqrt").wd_exponent, rule("custom", 1.0, 0.25).wd_exponent
    (0.5, 0.25)
    """
    if name != "custom":
        return RULES[name]
    if a is None or b is None:
        raise ValueError(f"exponents {a}, {b}: expected two numbers for the rule custom")
    return Rule("custom", a, b, "--lr-width-exponent, --wd-width-exponent")


@dataclass(frozen=True)
class ParamSpec:
    """What the rule needs to know of one parameter of the whole, unsharded model."""

    name: str
    """Megatron's parameter name without wrappers, with the global layer and expert number."""
    shape: tuple[int, ...]
    """Global shape, tensor-parallel shards undone."""
    role: Role
    fan_in: int
    """Global fan-in; 1 for vectors."""
    base_fan_in: float
    """Fan-in of the same parameter in the base model; need not be whole where it follows the hidden sizes' ratio."""
    dimension: str | None = None
    """The config dimension that is this fan-in, e.g. ``ffn_hidden_size``."""
    base_fan_out: float | None = None
    """First dimension of the same parameter in the base model, where it is known to differ from this one's."""

    @property
    def m(self) -> float:
        """Width multiplier, fan-in over base fan-in; 1 for embeddings and vectors, which no rule scales."""
        return self.fan_in / self.base_fan_in if self.role in ("matrix", "output") else 1.0


@dataclass(frozen=True)
class Multipliers:
    """Factors on the base learning rate, base weight decay and base Adam eps of one parameter."""

    lr: float
    weight_decay: float
    eps: float = 1.0


def multipliers(
    rule: Rule,
    role: Role,
    m: float,
    *,
    vector_lr: float = 1.0,
    embedding_weight_decay: float | None = None,
    scale_output: bool = True,
    scale_eps: bool = False,
) -> Multipliers:
    """Return the factors that a rule gives a parameter.

        lr = m^-a,  weight_decay = m^b,  eps = m^-a      matrix-like, and the LM head when `scale_output`
        lr = vector_lr,  weight_decay = 1 (0 for [F])     embeddings
        lr = vector_lr,  weight_decay = 0                 gains, biases, other vectors

    Args:
        rule: exponents a and b.
        role: the class of the parameter.
        m: its own width multiplier, positive.
        vector_lr: LR of embeddings and vectors over the base LR (the frozen LR of the two-phase sweep).
        embedding_weight_decay: weight decay of embeddings over the base weight decay; `None` = what the rule says.
        scale_output: whether the untied LM head follows the matrices; if not it keeps base LR and weight decay.
        scale_eps: whether Adam's eps is scaled like the LR.

    Source: arXiv 2510.19093, eqs. 7, 8, B.1, G.2; arXiv 2510.15262.

    >>> multipliers(RULES["sqrt"], "matrix", 16.0)
    Multipliers(lr=0.25, weight_decay=4.0, eps=1.0)
    >>> multipliers(RULES["sqrt-decay"], "embedding", 16.0)
    Multipliers(lr=1.0, weight_decay=0.0, eps=1.0)
    """
    decay = 1.0 if rule.decays else 0.0
    if role == "vector":
        return Multipliers(vector_lr, 0.0)
    if role == "embedding":
        if embedding_weight_decay is not None:
            return Multipliers(vector_lr, embedding_weight_decay)
        return Multipliers(vector_lr, decay if rule.embedding_decays else 0.0)
    if role == "output" and not scale_output:
        return Multipliers(1.0, decay)
    lr = m**-rule.lr_exponent
    return Multipliers(lr, decay * m**rule.wd_exponent, lr if scale_eps else 1.0)
