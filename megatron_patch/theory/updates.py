"""What a width rule becomes where the optimizer scales the update of a whole matrix: Muon and its relatives.

The rules of `theory.width` are written for AdamW, whose update u has entries of order 1 whatever the shape of the
matrix. Muon makes all singular values of u equal (u = s O, with O a semi-orthogonal K x C matrix: K = fan-out,
C = fan-in) and multiplies them by a scale s(K, C). Then, with `‖O‖^2 = min(K, C)`,

    RMS(u) = s / sqrt(max(K, C))                                   1 for AdamW
    alpha_u = ‖u x‖ / (‖u‖ ‖x‖) <= 1 / sqrt(min(K, C))             1 for AdamW

The second is the update alignment of arXiv 2510.19093, eq. 3, where the gradient is as aligned with the inputs as it
can be, as it is early in training. The weight alignment is 1/sqrt(C) then, so the alignment ratio is at most `g(K, C)`,

    g = sqrt(C / min(K, C))                                        sqrt(C) for AdamW

and the relative representation change of a step (eq. 4), with initial weights of RMS 1/sqrt(C), is

    RRC = eta * RMS(u) * sqrt(C) * g

A rule with a = 1 (muP: standard, independent, sqrt-decay, no-decay) keeps that RRC at every width. sqrt, with a = 1/2,
leaves g out and keeps the relative update itself. Both are `eta ~ 1 / (RMS(u) sqrt(C) g^(2a - 1))`: m^-a for AdamW.
Under Muon g does not change in a layer that grows with the width in both directions, so there all these rules have one
LR: m^-1/2 where RMS(u) = 1 (spectral), m^0 where RMS(u) = 1/sqrt(C). With a = 1 it is the spectral condition
`eta s sqrt(C / K)` = const, which is published (arXiv 2310.17813; for Muon 2602.20937, and 2502.07529 for
unit_rms_norm). What follows for weight decay, and for a = 1/2 in layers of another shape, is derived here.

Weight decay: with rho_inf = RMS(u) sqrt(eta / (2 lambda)) (eq. 33) the relative update settles at sqrt(2 eta lambda)
under any optimizer with decoupled decay (eq. 36). standard leaves lambda alone. independent and sqrt keep eta lambda.
sqrt-decay keeps the top singular value of the weights (arXiv 2510.15262); if their spectrum is flat, as sums of
semi-orthogonal updates are (assumed), that is `rho_inf sqrt(max(K, C)) ~ sqrt(K / C)`, and eta lambda is kept as well.
"""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_patch.theory.width import Multipliers, Role, Rule

UpdateScale = Literal["entrywise", "spectral", "unit_rms_norm", "shape_scaling"]
"""How the RMS of an update depends on the shape of its matrix: not at all (Adam, Lion, SOAP), or by Muon's scale."""


@dataclass(frozen=True)
class Shapes:
    """Global shape of a matrix [fan_out, fan_in] here and in the base model, whose sizes need not be whole."""

    fan_out: int
    fan_in: int
    base_fan_out: float
    base_fan_in: float

    @property
    def here(self) -> tuple[float, float]:
        """K, C of this model."""
        return self.fan_out, self.fan_in

    @property
    def base(self) -> tuple[float, float]:
        """K, C of the base model."""
        return self.base_fan_out, self.base_fan_in


def muon_scale(scale: UpdateScale, fan_out: float, fan_in: float) -> float:
    """Return what Muon multiplies its semi-orthogonal update by.

    `s = sqrt(max(K, C))` (spectral), `sqrt(K / C)` (unit_rms_norm), `sqrt(max(1, K / C))` (shape_scaling)

    Args:
        scale: Megatron's --muon-scale-mode.
        fan_out, fan_in: K, C of the matrix that is orthogonalised.

    Raises:
        ValueError: no scale of Muon's.

    Source: Emerging-Optimizers 0.3, `get_muon_scale_factor`; arXiv 2502.16982 (spectral), 2502.07529 (unit_rms_norm).

    >>> muon_scale("spectral", 256, 64), muon_scale("unit_rms_norm", 256, 64), muon_scale("shape_scaling", 64, 256)
    (16.0, 2.0, 1.0)
    """
    if scale == "spectral":
        return math.sqrt(max(fan_out, fan_in))
    if scale == "unit_rms_norm":
        return math.sqrt(fan_out / fan_in)
    if scale == "shape_scaling":
        return math.sqrt(max(1.0, fan_out / fan_in))
    raise ValueError(f"scale {scale}: expected spectral, unit_rms_norm or shape_scaling")


def update_rms(scale: UpdateScale, fan_out: float, fan_in: float) -> float:
    """Return b, the RMS of the entries of an update of full rank at a learning rate of 1.

    `b = s / sqrt(max(K, C))`: 1 for spectral, `1/sqrt(C)` for shape_scaling and, where K >= C, for unit_rms_norm; 1 for
    an entrywise update, up to a factor that does not depend on the shape (`momentum_update_rms`).

    Args:
        scale: how the optimizer scales its updates.
        fan_out, fan_in: K, C.

    Source: derived; measured on the optimizer itself in the tests.

    >>> update_rms("spectral", 256, 64), update_rms("unit_rms_norm", 256, 64), update_rms("unit_rms_norm", 64, 256)
    (1.0, 0.125, 0.03125)
    """
    if scale == "entrywise":
        return 1.0
    return muon_scale(scale, fan_out, fan_in) / math.sqrt(max(fan_out, fan_in))


def initial_alignment_ratio(scale: UpdateScale, fan_out: float, fan_in: float) -> float:
    """Return g, the largest alignment ratio that an update can have while the weights are random.

    `g = sqrt(C)` for an entrywise update, which may have rank 1; `sqrt(C / min(K, C))` for equal singular values.

    Source: arXiv 2510.19093, eqs. 2 and 3; the second derived.

    >>> initial_alignment_ratio("entrywise", 256, 64), initial_alignment_ratio("spectral", 4, 64)
    (8.0, 4.0)
    """
    return math.sqrt(fan_in) if scale == "entrywise" else math.sqrt(fan_in / min(fan_out, fan_in))


def lr_multiplier(rule: Rule, scale: UpdateScale, shapes: Shapes) -> float:
    """Return the factor on the base LR that keeps what the rule keeps, in a matrix of any shape.

    `RMS(u) sqrt(C) g^(2a - 1)` of the base model over that of this one; m^-a for an entrywise update and for the rules
    none and custom, whose exponents are meant as they stand.

    Args:
        rule: with its exponent a.
        scale: how the optimizer scales its updates.
        shapes: here and in the base model.

    Source: derived, see the module; arXiv 2602.20937 for a = 1 under Muon.

    >>> from megatron_patch.theory.width import RULES
    >>> wider = Shapes(fan_out=1024, fan_in=256, base_fan_out=256, base_fan_in=64)
    >>> [lr_multiplier(RULES["independent"], scale, wider) for scale in ("entrywise", "spectral", "unit_rms_norm")]
    [0.25, 0.5, 1.0]
    """
    if scale == "entrywise" or not rule.follows_updates:
        return math.pow(shapes.fan_in / shapes.base_fan_in, -rule.lr_exponent)
    power = 2 * rule.lr_exponent - 1

    def change(fan_out: float, fan_in: float) -> float:
        growth = math.pow(initial_alignment_ratio(scale, fan_out, fan_in), power)
        return update_rms(scale, fan_out, fan_in) * math.sqrt(fan_in) * growth

    return change(*shapes.base) / change(*shapes.here)


def rule_under(rule: Rule, scale: UpdateScale) -> Rule:
    """Return a rule with the exponents that it has under an optimizer, for layers that grow with the width both ways.

    >>> from megatron_patch.theory.width import RULES
    >>> muons = rule_under(RULES["independent"], "spectral")
    >>> muons.lr_exponent, muons.wd_exponent
    (0.5, 0.5)
    """
    if scale == "entrywise" or not rule.follows_updates:
        return rule
    a = 0.5 if scale == "spectral" else 0.0
    source = f"{rule.source}; under muon ({scale}) derived"
    return Rule(rule.name, a, a if rule.wd_exponent else 0.0, source, rule.decays, rule.embedding_decays)


def scaled_multipliers(rule: Rule, role: Role, scale: UpdateScale, shapes: Shapes, adams: Multipliers) -> Multipliers:
    """Return the factors of a parameter whose optimizer scales updates by their matrix.

        lr = `lr_multiplier`,  weight_decay = 1 / lr where the rule scales it, else 1 or 0      matrices
        lr = that of Adam's rule * RMS(u) of the base model / RMS(u) here                       embeddings

    An embedding's rows are its outputs: their change per step is `eta RMS(u)`, and it is kept.

    Args:
        rule: the rule.
        role: the class of the parameter.
        scale: how its optimizer scales updates; not entrywise.
        shapes: of the parameter.
        adams: what the rule gives it under Adam.

    Source: derived, see the module.

    >>> from megatron_patch.theory.width import RULES
    >>> wider = Shapes(fan_out=1024, fan_in=256, base_fan_out=256, base_fan_in=64)
    >>> scaled_multipliers(RULES["sqrt"], "matrix", "spectral", wider, Multipliers(0.5, 2.0))
    Multipliers(lr=0.5, weight_decay=2.0, eps=1.0)
    """
    if role == "embedding":
        kept = update_rms(scale, *shapes.base) / update_rms(scale, *shapes.here)
        return Multipliers(adams.lr * kept if rule.follows_updates else adams.lr, adams.weight_decay)
    if role == "vector" or not rule.follows_updates:
        return Multipliers(adams.lr, adams.weight_decay)
    lr = lr_multiplier(rule, scale, shapes)
    if not rule.decays:
        return Multipliers(lr, 0.0)
    return Multipliers(lr, 1 / lr if rule.wd_exponent else 1.0)


def accumulated_update_rms(momentum: float) -> float:
    """Return how many times faster weights grow by updates along an EMA of the gradients than by independent ones.

    `sqrt((1 + mu) / (1 - mu))`, with mu the momentum: neighbouring updates are correlated by mu, and the variance of a
    sum of n of them is that many times n squared updates where the gradient is pure noise. Times `update_rms` it is the
    b of the norm recurrence (arXiv 2510.19093, eq. 30). Adam's own momentum gives 1 over `momentum_update_rms`, and the
    two cancel. Orthogonalising is linear in long matrices; in a square one it forgets a little more than the momentum
    does, and weights grow by up to a sixth less (simulated).

    Args:
        momentum: mu, in [0, 1).

    Source: derived, as arXiv 2305.17212 does for Adam; reproduced by simulation in the tests.

    >>> round(accumulated_update_rms(0.9), 6)
    4.358899
    """
    return math.sqrt((1 + momentum) / (1 - momentum))
