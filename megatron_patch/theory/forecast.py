"""How far the optimal base LR of a wider model moves under a rule: a forecast from numbers of the proxy alone.

What is tuned on a proxy is how fast features change: the relative representation change (RRC) of its layers, step by
step. A wider model is expected to do best where the mean of its log over the run is the proxy's. Two models give it:

- the weight-norm model (arXiv 2510.19093, eqs. 30 and 36) the relative update, `b eta_t / rho_t`;
- the noise model (eq. 27) the update alignment alpha_dW. The weight alignment is that of what W is made of (derived).
  A part f_t of its squared norm is still the initial weights, aligned with their inputs by chance, alpha^2 = 1/C; the
  rest is past updates, which are as aligned as the present one: `alpha_W^2 = f_t / C + (1 - f_t) alpha_dW^2`.

So `RRC_t = alpha_dW / alpha_W * b eta_t / rho_t`. docs/evidence.md holds the forecast against runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_patch.theory.alignment import noise_model_update_alignment
from megatron_patch.theory.width import Rule

OCTAVES = 12.0
"""Within which the forecast is looked for."""
DROPPED = 0.005
"""Share of the steps at the end of a run that is left out, as there the LR falls to 0."""


@dataclass(frozen=True)
class Course:
    """What proxy and target have in common."""

    factors: Sequence[float]
    """Of every step: its LR over the peak."""
    weight_decay: float
    """Of the proxy."""
    tokens: int
    """Of one batch."""
    snr: float
    """phi, signal-to-noise ratio of one token's gradient; `snr_of` reads it off a measured alignment."""
    update_rms: float = 1.0
    """b, RMS of the entries of an update over the LR; `equilibrium.momentum_update_rms`."""


def snr_of(update_alignment: float, fan_in: int, tokens: int) -> float:
    """Return the phi at which the noise model has a measured update alignment; 0 where it is that of noise alone.

    Args:
        update_alignment: alpha_dW of a layer.
        fan_in: of the layer.
        tokens: of a batch.

    Source: arXiv 2510.19093, eq. 27, solved by bisection.

    >>> round(snr_of(noise_model_update_alignment(128, 1024, 0.001), 128, 1024), 9)
    0.001
    """
    low, high = 0.0, 1e3
    if noise_model_update_alignment(fan_in, tokens, low) >= update_alignment:
        return 0.0
    for _ in range(200):
        middle = (low + high) / 2
        above = noise_model_update_alignment(fan_in, tokens, middle) > update_alignment
        low, high = (low, middle) if above else (middle, high)
    return (low + high) / 2


def mean_log2_rrc(course: Course, fan_in: int, lr: float, weight_decay: float, rho_0: float) -> float:
    """Return the mean over the run of log2 of the expected relative representation change of a layer.

    Args:
        course: the run.
        fan_in: C, number of the layer's inputs.
        lr: the layer's peak LR.
        weight_decay: the layer's.
        rho_0: RMS of its initial weights, > 0.

    Raises:
        ValueError: a product of LR and weight decay of 1 or more, or no step with an LR above 0.
    """
    if lr * weight_decay >= 1:
        raise ValueError(f"lr {lr} times weight_decay {weight_decay}: expected a product below 1")
    update_alignment_sq = noise_model_update_alignment(fan_in, course.tokens, course.snr) ** 2
    initial = square = rho_0**2  # of what is left of the initial weights, and of all of them
    total, count = 0.0, 0
    for factor in course.factors[: math.ceil(len(course.factors) * (1 - DROPPED))]:
        eta = lr * factor
        if eta > 0:
            left = initial / square
            weight_alignment_sq = left / fan_in + (1 - left) * update_alignment_sq
            total += 0.5 * math.log2(update_alignment_sq / weight_alignment_sq)
            total += math.log2(course.update_rms * eta) - 0.5 * math.log2(square)
            count += 1
        shrunk = (1 - eta * weight_decay) ** 2
        initial *= shrunk
        square = square * shrunk + (course.update_rms * eta) ** 2
    if not count:
        raise ValueError("factors: expected a step with an LR above 0")
    return total / count


def forecast_shift(
    course: Course, rule: Rule, m: float, fan_in: int, lr: float, rho_0: float, target_rho_0: float
) -> float:
    """Return by how many octaves the optimal base LR of a model m times as wide is expected to be above the proxy's.

    It is the base LR at which the target's mean log2 RRC is what the proxy's is at its optimum.

    Args:
        course: the run.
        rule: of the target; at the proxy every rule is the same, but that one without weight decay has none there too.
        m: width over base width.
        fan_in: of the proxy's layer.
        lr: the proxy's optimal base LR.
        rho_0: RMS of the proxy's initial weights.
        target_rho_0: RMS of the target's.

    Raises:
        ValueError: as for `mean_log2_rrc`; or no such LR within `OCTAVES`.
    """
    base_decay = course.weight_decay if rule.decays else 0.0
    wanted = mean_log2_rrc(course, fan_in, lr, base_decay, rho_0)
    decay = base_decay * m**rule.wd_exponent

    def misses(octaves: float) -> float:
        target_lr = lr * 2**octaves * m**-rule.lr_exponent
        return mean_log2_rrc(course, round(fan_in * m), target_lr, decay, target_rho_0) - wanted

    low, high = -OCTAVES, OCTAVES
    shrink = decay * lr * m**-rule.lr_exponent
    if shrink > 0:  # at 1 and above the weight-norm model has no equilibrium
        high = min(high, math.log2(0.999) - math.log2(shrink))
    if not misses(low) < 0 < misses(high):
        raise ValueError(f"no shift within {OCTAVES:g} octaves")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if misses(middle) < 0 else (low, middle)
    return (low + high) / 2
