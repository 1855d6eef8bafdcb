"""Extra warmups for wide models: factors f_t that multiply an existing learning-rate schedule.

t counts optimizer steps from 0. m is the width multiplier of the model, its hidden size / that of the base model. Every
factor starts at 1/m, tends to 1 and is 1 for m = 1. For m > 1 it never exceeds 1; m < 1 (a model narrower than its
base) mirrors it, starting above 1.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import tee

from megatron_patch.theory.equilibrium import decay_per_step, rho_after, trajectory


def exp_increasing(t: float, warmup_steps: float, m: float) -> float:
    """Return the exponentially increasing warmup factor of step t.

    `f_t = m^min(0, t/T_W - 1)`, with T_W = `warmup_steps`.

    Args:
        t: optimizer steps made so far, >= 0.
        warmup_steps: length of the warmup, in the unit of `t`; 0 means that the factor is 1 from the start.
        m: width multiplier, > 0.

    Raises:
        ValueError: an argument is outside its range.

    Source: arXiv 2510.19093, eq. 14.
    >>> [exp_increasing(t, warmup_steps=10_000, m=16) for t in (0, 5_000, 10_000, 20_000)]
    [0.0625, 0.25, 1.0, 1.0]
    """
    _require_multiplier(m)
    if not (t >= 0 and warmup_steps >= 0):
        raise ValueError(f"t {t}, warmup_steps {warmup_steps}: expected both >= 0")
    return m ** (t / warmup_steps - 1) if t < warmup_steps else 1.0


def warmup_length(fraction: float, total_steps: int) -> int:
    """Return T_W, in steps, of a warmup that takes a fraction of the run: rounded up.

    Args:
        fraction: of the run, in [0, 1].
        total_steps: length of the run.

    Raises:
        ValueError: an argument is outside its range.

    >>> warmup_length(0.07, 100), warmup_length(0.1, 3)
    (7, 1)
    """
    if not (0 <= fraction <= 1 and total_steps >= 0):
        raise ValueError(
            f"fraction {fraction}, total_steps {total_steps}: expected 0 <= fraction <= 1, total_steps >= 0"
        )
    return math.ceil(round(fraction * total_steps, 6))  # rounded first, since 0.07 * 100 is a little more than 7


def decay_away(product: float, m: float) -> float:
    """Return the decay-away warmup factor from the share of the squared initial weights that is left.

    `f_t = (1 + (m^2 - 1) P_t)^(-1/2)`, with `P_t = prod_{tau<t} (1 - eta_tau lambda)^2` from `decay_away_step`.

    Args:
        product: P_t, in [0, 1]; P_0 = 1. Once it has underflowed to 0 the factor is 1.
        m: width multiplier, > 0.

    Raises:
        ValueError: an argument is outside its range.

    Source: arXiv 2510.19093, eq. 15.
    >>> decay_away(1.0, m=16), decay_away(0.0, m=16)
    (0.0625, 1.0)
    """
    _require_multiplier(m)
    if not 0 <= product <= 1:
        raise ValueError(f"product {product}: expected a number in [0, 1]")
    return 1 / math.sqrt((1 - product) + m * (m * product))  # eq. 15 without its cancellation at m < 1


def decay_away_step(product: float, lr: float, weight_decay: float) -> float:
    """Return the running product of the decay-away warmup after one more optimizer step.

    `P_{t+1} = P_t (1 - eta_t lambda)^2`. This one number is the whole state of the warmup. It never grows. n steps with
    eta lambda < 0.01 leave it with a relative rounding error below `n * 5e-16`.

    Args:
        product: P_t; start with 1.
        lr: eta_t, the learning rate of the step that was made, WITHOUT the factor. A skipped step is no step.
        weight_decay: the base weight decay lambda, not scaled with the width.

    Raises:
        ValueError: a negative argument, or `lr * weight_decay` is 1 or more.

    Source: arXiv 2510.19093, eq. 15.
    >>> decay_away_step(1.0, lr=0.5, weight_decay=0.25)
    0.765625
    """
    return product * (1 - decay_per_step(lr, weight_decay)) ** 2


def decay_away_factors(lrs: Iterable[float], weight_decay: float, m: float) -> Iterator[float]:
    """Yield the decay-away warmup factor of every step of a schedule.

    `f_t` of `decay_away` for t = 0, 1, ..., one for each learning rate; f_t depends on the rates before t only.

    Args:
        lrs: learning rates eta_0, eta_1, ... of the steps, without the factor; read lazily.
        weight_decay: the base weight decay lambda, not scaled with the width.
        m: width multiplier, > 0.

    Raises:
        ValueError: as in `decay_away` and `decay_away_step`.

    Source: arXiv 2510.19093, eq. 15.
    >>> [round(factor, 4) for factor in decay_away_factors([0.0, 0.5, 0.5, 0.5], weight_decay=1.0, m=2.0)]
    [0.5, 0.5, 0.7559, 0.9177]
    """
    product = 1.0
    for lr in lrs:
        yield decay_away(product, m)
        product = decay_away_step(product, lr, weight_decay)


def equilibrium_factor(
    t: float, m: float, lr: float, weight_decay: float, rho_0: float, update_rms: float = 1.0
) -> float:
    """Return the warmup that independent weight decay scaling gives by itself at constant learning rate.

    It is the relative update of (eta/m, m lambda) over that of (eta, lambda) after t steps from the same weights:
    `s_t = sqrt((1 + (r - 1) a^{2t}) / (1 + (m^2 r - 1) a^{2t}))`, with `r = rho_0^2 / rho_inf^2`, `a = 1 - eta lambda`,
    rho_inf = `equilibrium_rho(lr, weight_decay, update_rms)`. At r = 1 it is the decay-away factor.

    Args:
        t: optimizer steps made so far, >= 0.
        m: width multiplier, > 0.
        lr: constant learning rate eta.
        weight_decay: constant weight decay lambda of the base model.
        rho_0: RMS of the entries of W at t = 0, > 0.
        update_rms: RMS of the entries of the update before it is multiplied by the learning rate.

    Raises:
        ValueError: an argument is outside its range, or `lr * weight_decay` is 1 or more.

    Source: arXiv 2510.19093, eq. 39.
    >>> [round(equilibrium_factor(t, m=16, lr=0.004, weight_decay=0.1, rho_0=0.05), 4) for t in (0, 1_000, 10_000)]
    [0.0625, 0.2017, 0.9947]
    """
    _require_multiplier(m)
    if not (t >= 0 and 0 < rho_0 < math.inf):
        raise ValueError(f"t {t}, rho_0 {rho_0}: expected t >= 0 and a positive finite rho_0")
    rho_base = rho_after(t, rho_0, lr, weight_decay, update_rms)
    return rho_base / rho_after(t, rho_0, lr / m, weight_decay * m, update_rms) / m


def equilibrium_factors(
    schedule: Iterable[tuple[float, float]], m: float, rho_0: float, update_rms: float = 1.0
) -> Iterator[float]:
    """Yield the warmup that independent weight decay scaling gives by itself, for every step of a schedule.

    `s_t = (eta_t / (m rho'_t)) / (eta_t / rho_t) = rho_t / (m rho'_t)`, where rho follows (eta_t, lambda_t) and rho'
    follows (eta_t / m, m lambda_t) from the same rho_0. The ratio exists also where eta_t is 0.

    Args:
        schedule: (learning rate eta_t, weight decay lambda_t) of the base model for t = 0, 1, ...; read lazily.
        m: width multiplier, > 0.
        rho_0: RMS of the entries of W at t = 0, > 0.
        update_rms: RMS of the entries of the update before it is multiplied by the learning rate.

    Raises:
        ValueError: an argument is outside its range, or a product `eta_t * lambda_t` is 1 or more.

    Source: arXiv 2510.19093, eq. 38.
    >>> [round(factor, 4) for factor in equilibrium_factors([(0.01, 0.1)] * 3, m=2.0, rho_0=0.02)]
    [0.5, 0.5424, 0.5775]
    """
    _require_multiplier(m)
    base, copy = tee(schedule)
    scaled = ((lr / m, weight_decay * m) for lr, weight_decay in copy)
    for step, scaled_step in zip(
        trajectory(base, rho_0, update_rms), trajectory(scaled, rho_0, update_rms), strict=True
    ):
        yield step.rho / scaled_step.rho / m


def linear_warmup_linear_decay(t: float, peak: float, warmup: float, total: float, floor: float = 0.0) -> float:
    """Return the learning rate of step t of a linear warmup from 0 followed by a linear decay.

    `eta_t = peak * t / warmup` up to `warmup`, then the straight line from `peak` down to `floor` at `total`, then
    `floor`. This is the indexing of Megatron's `OptimizerParamScheduler`, whose first step has the rate 0.

    Args:
        t: steps made so far, >= 0, in any unit (steps or samples).
        peak: highest learning rate.
        warmup: length of the warmup in the unit of `t`; 0 starts at the peak.
        total: end of the decay in the unit of `t`, counted from 0, > `warmup`.
        floor: learning rate at and after `total`.

    Raises:
        ValueError: an argument is outside its range.

    Source: Megatron-LM, `megatron/core/optimizer_param_scheduler.py`, `get_lr`; setting of arXiv 2510.19093, fig. 7.
    >>> [linear_warmup_linear_decay(t, peak=1.0, warmup=4, total=12) for t in (0, 1, 4, 8, 12, 13)]
    [0.0, 0.25, 1.0, 0.5, 0.0, 0.0]
    """
    if not (t >= 0 and 0 <= warmup < total and 0 <= floor <= peak):
        raise ValueError(
            f"t {t}, peak {peak}, warmup {warmup}, total {total}, floor {floor}: "
            "expected t >= 0, 0 <= warmup < total and 0 <= floor <= peak"
        )
    if t < warmup:
        return peak * (t / warmup)
    return floor + (peak - floor) * max(0.0, (total - t) / (total - warmup))


def _require_multiplier(m: float) -> None:
    if not 0 < m < math.inf:
        raise ValueError(f"m {m}: expected a positive finite width multiplier")
