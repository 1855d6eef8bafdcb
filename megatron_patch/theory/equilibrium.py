"""Weight-norm model: how learning rate and weight decay set the size of a matrix and of its relative updates.

All of it follows from one recurrence (`next_rho`) for rho, the RMS of the entries of a weight matrix W, under AdamW in
the PyTorch convention `W <- (1 - lr * weight_decay) W - lr * u`. The model takes the updates u as uncorrelated with W
and from step to step. The closed forms are that recurrence solved for constant `lr` and `weight_decay`.

`update_rms` (b in the equations) is the RMS of the entries of u. Adam's momentum correlates neighbouring steps: the
weight norm still follows b = 1, but ONE measured step is smaller, see `momentum_update_rms`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class NormStep(NamedTuple):
    """One optimizer step of the model: RMS of the entries of W before the step, and ‖dW‖/‖W‖ of the step."""

    rho: float
    relative_update: float


def decay_per_step(lr: float, weight_decay: float) -> float:
    """Return `eta * lambda`, the share of a weight that one optimizer step decays away.

    Args:
        lr, weight_decay: learning rate eta and decoupled weight decay lambda of the step, dimensionless.

    Raises:
        ValueError: a negative value, or a product of 1 or more, which would wipe out or flip the weights in one step.

    Source: arXiv 2510.19093, eq. 33, where `a = 1 - eta lambda`.
    >>> decay_per_step(lr=0.5, weight_decay=0.25)
    0.125
    """
    decay = lr * weight_decay
    if not (lr >= 0 and weight_decay >= 0 and decay < 1):
        raise ValueError(f"lr {lr}, weight_decay {weight_decay}: expected both >= 0 and their product below 1")
    return decay


def next_rho(rho: float, lr: float, weight_decay: float, update_rms: float = 1.0) -> float:
    """Return the RMS of the weights after one more optimizer step.

    `rho_{t+1}^2 = (1 - eta_t lambda)^2 rho_t^2 + b^2 eta_t^2`

    Args:
        rho: RMS of the entries of W before the step.
        lr, weight_decay: eta_t and lambda of this step; ValueError as in `decay_per_step`.
        update_rms: b, RMS of the entries of u.

    Source: arXiv 2510.19093, eq. 30.
    >>> next_rho(rho=8.0, lr=3.0, weight_decay=1 / 6)
    5.0
    """
    return math.hypot((1 - decay_per_step(lr, weight_decay)) * rho, update_rms * lr)


def trajectory(schedule: Iterable[tuple[float, float]], rho_0: float, update_rms: float = 1.0) -> Iterator[NormStep]:
    """Run the recurrence along a schedule and yield weight RMS and relative update of every step.

    `relative update of step t = b eta_t / rho_t`, with rho_t from `next_rho` and b = `update_rms`.

    Args:
        schedule: (learning rate, weight decay) of the steps t = 0, 1, ...; read lazily, so it may be endless.
        rho_0: RMS of the entries of W at initialisation, > 0.
        update_rms: RMS of the entries of u.

    Raises:
        ValueError: `rho_0` is not a positive number; for a pair of the schedule as in `decay_per_step`.

    Source: arXiv 2510.19093, eqs. 30 and 36.
    >>> [round(step.relative_update, 4) for step in trajectory([(0.0, 0.1), (0.01, 0.1), (0.01, 0.1)], rho_0=0.02)]
    [0.0, 0.5, 0.4476]
    """
    _require_positive("rho_0", rho_0)
    rho = rho_0
    for lr, weight_decay in schedule:
        yield NormStep(rho, update_rms * lr / rho)
        rho = next_rho(rho, lr, weight_decay, update_rms)


def trajectory_of_stretches(
    times: Sequence[int], schedule: Sequence[tuple[float, float]], rho_0: float, update_rms: float = 1.0
) -> Iterator[NormStep]:
    """Yield what `trajectory` does for some steps of a long schedule, from its values at these steps alone.

    From one of the steps to the next, learning rate and weight decay are taken to be constant at the mean of the
    straight line between them, and eq. 33 is that stretch in closed form. Where all steps are given it is `trajectory`.

    Args:
        times: the steps, rising, from 0.
        schedule: (learning rate, weight decay) of each.
        rho_0, update_rms: as in `trajectory`, with its ValueError.

    Source: arXiv 2510.19093, eqs. 30, 33 and 36.
    >>> [round(step.rho, 4) for step in trajectory_of_stretches([0, 2, 3], [(3.0, 1 / 6)] * 3, rho_0=8.0)]
    [8.0, 3.9051, 3.5795]
    """
    _require_positive("rho_0", rho_0)
    rho = rho_0
    for i, (lr, weight_decay) in enumerate(schedule):
        yield NormStep(rho, update_rms * lr / rho)
        if i + 1 < len(times):
            steps = times[i + 1] - times[i]
            ahead = (steps - 1) / (2 * steps)  # of the way to the next values: where the mean of the stretch is
            next_lr, next_decay = schedule[i + 1]
            mean = lr + ahead * (next_lr - lr), weight_decay + ahead * (next_decay - weight_decay)
            rho = next_rho(rho, *mean, update_rms) if steps == 1 else rho_after(steps, rho, *mean, update_rms)


def rho_after(steps: float, rho_0: float, lr: float, weight_decay: float, update_rms: float = 1.0) -> float:
    """Return the RMS of the weights after a number of steps at constant learning rate and weight decay.

    `rho_t^2 = rho_inf^2 + (rho_0^2 - rho_inf^2) a^{2t}`, with `a = 1 - eta lambda` and rho_inf = `equilibrium_rho`.
    Evaluated in the equal form `a^{2t} rho_0^2 + b^2 eta^2 (1 - a^{2t}) / (1 - a^2)`, which keeps its digits when
    eta lambda is tiny and has the limit `rho_0^2 + t b^2 eta^2` at lambda = 0.

    Args:
        steps, rho_0: number t of optimizer steps, >= 0; RMS of the entries of W at t = 0.
        lr, weight_decay: constant eta and lambda; ValueError as in `decay_per_step`.
        update_rms: b, RMS of the entries of u.

    Source: arXiv 2510.19093, eq. 33.
    >>> round(rho_after(2, rho_0=8.0, lr=3.0, weight_decay=1 / 6), 4)  # 8 -> 5 -> sqrt(2.5^2 + 3^2)
    3.9051
    """
    log_a2 = 2 * math.log1p(-decay_per_step(lr, weight_decay))
    geometric_sum = math.expm1(steps * log_a2) / math.expm1(log_a2) if log_a2 else steps
    return math.hypot(math.exp(steps * log_a2 / 2) * rho_0, update_rms * lr * math.sqrt(geometric_sum))


def equilibrium_rho(lr: float, weight_decay: float, update_rms: float = 1.0) -> float:
    """Return the RMS of the weights at which decay and updates balance.

    `rho_inf = b eta / sqrt(1 - a^2) ~ b sqrt(eta / (2 lambda))`, with `a = 1 - eta lambda`

    Args:
        lr, weight_decay: constant eta and lambda; ValueError if one is 0 (nothing balances) or as in `decay_per_step`.
        update_rms: b, RMS of the entries of u.

    Source: arXiv 2510.19093, eq. 33.
    >>> round(equilibrium_rho(lr=0.004, weight_decay=0.1), 6)
    0.141436
    """
    decay = _positive_decay(lr, weight_decay)
    return update_rms * lr / math.sqrt(decay * (2 - decay))


def equilibrium_norm(fan_out: int, fan_in: int, lr: float, weight_decay: float, update_rms: float = 1.0) -> float:
    """Return the Frobenius norm of a whole weight matrix in equilibrium.

    `‖W‖ = sqrt(K C) rho_inf ~ b sqrt(K C eta / (2 lambda))`, with K = `fan_out`, C = `fan_in`.

    Args:
        fan_out, fan_in: global (unsharded) shape of W; the others as in `equilibrium_rho`, with its ValueError.

    Source: arXiv 2510.19093, appendix F.
    >>> round(equilibrium_norm(fan_out=256, fan_in=64, lr=0.004, weight_decay=0.1), 3)
    18.104
    """
    return math.sqrt(fan_out * fan_in) * equilibrium_rho(lr, weight_decay, update_rms)


def steps_to_equilibrium(rho_0: float, lr: float, weight_decay: float, update_rms: float = 1.0) -> float:
    """Return after how many steps (a real number) the RMS of the weights is within a factor sqrt(2) of equilibrium.

    Eq. 33 solved for t, with `r = rho_0^2 / rho_inf^2` and `a = 1 - eta lambda`: `t = ln(r - 1) / (-2 ln a)` from
    above (r > 2, ends at rho = sqrt(2) rho_inf), `t = ln(2 (1 - r)) / (-2 ln a)` from below (r < 1/2, ends at
    rho = rho_inf / sqrt(2)), else 0. The criterion is on rho throughout; the printed eq. 34 mixes it with one on rho^2.

    Args:
        rho_0: RMS of the entries of W at t = 0; the others as in `equilibrium_rho`, with its ValueError.

    Source: derived from arXiv 2510.19093, eq. 33, in place of eq. 34.
    >>> round(steps_to_equilibrium(rho_0=1.0, lr=0.004, weight_decay=0.1), 1)
    4863.5
    """
    r = (rho_0 / equilibrium_rho(lr, weight_decay, update_rms)) ** 2
    steps_per_e_fold = -1 / (2 * math.log1p(-decay_per_step(lr, weight_decay)))
    return steps_per_e_fold * math.log(max(1.0, r - 1, 2 * (1 - r)))


def equilibrium_relative_update(lr: float, weight_decay: float) -> float:
    """Return the relative update ‖dW‖/‖W‖ that a matrix settles at, whatever its size and update RMS.

    `b eta / rho_inf = sqrt(2 eta lambda - eta^2 lambda^2) ~ sqrt(2 eta lambda)`, with eta = `lr`,
    lambda = `weight_decay`. Compare one measured AdamW step with this times `momentum_update_rms`.

    Args:
        lr, weight_decay: constant; ValueError as in `decay_per_step`.

    Source: arXiv 2510.19093, eq. 36.
    >>> round(equilibrium_relative_update(lr=0.004, weight_decay=0.1), 6)
    0.028281
    """
    decay = decay_per_step(lr, weight_decay)
    return math.sqrt(decay * (2 - decay))


def relative_update_without_decay(steps: float, rho_0: float, lr: float, update_rms: float = 1.0) -> float:
    """Return the relative update ‖dW‖/‖W‖ after a number of steps at constant learning rate without weight decay.

    `b eta / rho_t = 1 / sqrt(rho_0^2 / (b eta)^2 + t)`, with eta = `lr`, t = `steps`, b = `update_rms`.

    Args:
        steps, rho_0, lr, update_rms: as in `rho_after`; ValueError unless `rho_0` > 0.

    Source: arXiv 2510.19093, eq. 37.
    >>> round(relative_update_without_decay(steps=5, rho_0=0.02, lr=0.01), 6)
    0.333333
    """
    _require_positive("rho_0", rho_0)
    return update_rms * lr / rho_after(steps, rho_0, lr, 0.0, update_rms)


def momentum_update_rms(beta1: float) -> float:
    """Return the RMS of the entries of one AdamW update when the gradient is pure noise.

    `sqrt((1 - beta1) / (1 + beta1))`, while the sum of many such updates still grows as if the RMS were 1. Multiply a
    relative update of this module by it to get the one a single noise-dominated step shows; signal raises it to 1.

    Args:
        beta1: Adam's decay rate of the first moment, in [0, 1).

    Source: arXiv 2305.17212, AdamW row of the rotational equilibrium; reproduced by simulation in the tests.
    >>> round(momentum_update_rms(0.9), 6)
    0.229416
    """
    return math.sqrt((1 - beta1) / (1 + beta1))


def ema_time_scale(lr: float, weight_decay: float, batch_size: float = 1, data_size: float = 1) -> float:
    """Return over how many past steps, or over which fraction of the data, AdamW averages its updates.

    `1 / (eta lambda)` steps; `tau = B / (eta lambda D)` of the data, with B = `batch_size` and D = `data_size`.

    Args:
        lr, weight_decay: eta and lambda, constant, > 0, else ValueError.
        batch_size, data_size: leave out for steps; give both in one unit (tokens or samples) for the fraction.

    Source: arXiv 2405.13698.
    >>> round(ema_time_scale(lr=0.004, weight_decay=0.1), 6)
    2500.0
    >>> round(ema_time_scale(lr=0.004, weight_decay=0.1, batch_size=256, data_size=256 * 20_000), 6)
    0.125
    """
    return batch_size / (_positive_decay(lr, weight_decay) * data_size)


def top_singular_value_scale(lr: float, weight_decay: float, width: int) -> float:
    """Return what the top singular value of a matrix-like weight is proportional to in steady state.

    `sqrt(eta / lambda) * d^0.75`, with eta = `lr`, lambda = `weight_decay`, d = `width`. Divided by it, top singular
    values measured at several widths should agree; the factor in front is not predicted.

    Args:
        lr, weight_decay, width: constant, > 0, else ValueError; the hidden size of the model.

    Source: arXiv 2510.15262.
    >>> round(top_singular_value_scale(lr=0.004, weight_decay=0.1, width=256), 6)
    12.8
    """
    _positive_decay(lr, weight_decay)
    return math.sqrt(lr / weight_decay) * math.pow(width, 0.75)


def _positive_decay(lr: float, weight_decay: float) -> float:
    decay = decay_per_step(lr, weight_decay)
    if decay == 0:
        raise ValueError(f"lr {lr}, weight_decay {weight_decay}: expected both > 0, else there is no equilibrium")
    return decay


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} {value}: expected a positive finite number")
