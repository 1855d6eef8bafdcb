"""The best learning rate of a sweep, with an interval; or a reason why the sweep does not tell it.

Losses are fitted over log2(LR), and over log2(weight decay) where a sweep has both, near their minimum (`surface`). A
sweep that leaves the optimum open is refused: `NoOptimum` says which check failed and what to run next.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from megatron_patch.fit.blowups import settle
from megatron_patch.fit.found import NoOptimum, Optimum, Ridge, listed, octaves
from megatron_patch.fit.seeds import aligned, informative
from megatron_patch.fit.surface import Surface, fit, outliers
from megatron_patch.runs.trial import Trial

WIDEST = 2.0
"""Octaves; an interval wider than that is no optimum."""
CONFIDENCE = 0.9
"""Of every interval."""
UNBOUNDED = 0.05
"""Part of the bootstrap sample that may have no minimum."""
BELOW = 0.05
"""Nats; an optimum that is further below all losses is not believed, unless they rise by `SHARE` times that next to it.
"""
SHARE = 6.0
"""A parabola's minimum is at most an eighth of its rise at the second LR away below the lowest loss of an even grid."""
NEAR = 6
"""LRs on each side of the best that a refusal lists."""
FEW = 4
"""LRs that say too little about noise for a narrow interval."""
NARROW = 0.1
"""Of the distance to the next LR; an interval of so few LRs that is narrower is no measurement."""


def fit_lr(trials: Sequence[Trial], *, seed: int = 0) -> Optimum:
    """Return the optimal LR of one curve: trials that differ in LR and seed only.

    A quadratic in log2(LR) near the minimum (with a shrunk asymmetry), without the measurements that do not fit the
    others; the interval is a bootstrap over seeds and points. What a seed adds to all losses is taken out (`seeds`).

    Args:
        trials: in any order, diverged ones included.
        seed: of the bootstrap.

    Raises:
        NoOptimum: fewer than 3 LRs with a finite loss, the best LR at the edge of the grid, a curve that bends
            downwards, an interval wider than `WIDEST`, one too narrow to be true, a loss clearly below anything
            measured, or trials of more than one curve.
    """
    _one_curve(trials, ("hidden_size", "weight_decay", "rule", "vector_lr", "steps"))
    settled = settle(trials)
    try:
        return replace(_fit_curve(settled.trials, seed), blown=settled.blown)
    except NoOptimum as error:
        raise error.naming(settled.blown) from None


def _fit_curve(trials: Sequence[Trial], seed: int) -> Optimum:
    raw = informative([t for t in trials if not t.diverged])
    finite = aligned(raw)
    lrs = sorted({t.lr for t in finite})
    if len(lrs) < 3:
        shown = listed(lrs) if lrs else "none"
        lost = sum(t.diverged for t in trials)
        raise NoOptimum(
            f"{len(lrs)} of the learning rates have a finite loss ({shown}; {lost} runs diverged) and a fit needs 3",
            "train more learning rates" + (f" around {listed(lrs)}" if lrs else ", lower ones"),
            _best_point(finite),
        )
    x, y = np.log2([[t.lr] for t in finite]), np.array([t.loss for t in finite])
    bad = set(outliers(x, y))
    kept = [i for i in range(len(finite)) if i not in bad]
    used, dropped = tuple(finite[i] for i in kept), tuple(raw[i] for i in sorted(bad))
    partial = _best_point(used, dropped)
    assert partial is not None
    _check_edge(partial, used, trials)
    surface = fit(x[kept], y[kept], seed=seed)
    if surface is None:
        raise NoOptimum(
            f"the losses around the best LR {partial.lr:g} have no minimum that stands out of noise: {_curve(used)}",
            "train more seeds, or learning rates further apart",
            partial,
        )
    low, high = _interval(surface, 0)
    at, curvature = float(surface.minimum[0]), float(surface.hessian[0, 0])
    bent = _quantiles(surface.curvatures[:, 0])
    optimum = Optimum(at, low, high, surface.value, curvature, len(used), used, dropped, curvature_interval=bent)
    _check_inside(optimum, used)
    _check_loss(optimum.lr, optimum.loss, _below_curve(used), surface, used, optimum)
    _check_narrow(optimum, used)
    if len(used) == len(lrs) == 3:
        # No noise can be told from three losses. A curve with one minimum has it between the neighbours of the best.
        levels = sorted(math.log2(t.lr) for t in used)
        optimum = replace(optimum, low=levels[0], high=levels[2], curvature_interval=(math.nan, math.nan))
    if not optimum.width <= WIDEST + 1e-9:
        raise NoOptimum(
            f"the interval of the best LR, {octaves(optimum.low, optimum.high)}, is wider than {WIDEST:g} octaves",
            "train more seeds, or more learning rates around the best",
            optimum,
        )
    return optimum


def fit_lr_weight_decay(trials: Sequence[Trial], *, seed: int = 0) -> Ridge:
    """Return the optimal LR and weight decay of trials that differ in these and the seed only.

    The surface is quadratic in (log2 LR, log2 weight decay) near its minimum, cross term included: where only the
    product of the two matters it is a diagonal valley, the ridge of arXiv 2405.13698 and 2510.19093.

    Raises:
        NoOptimum: fewer than 3 values of one of the two, too few points, an optimum at the edge of the grid, a surface
            that bends downwards, or an LR interval wider than `WIDEST`: a ridge too flat to choose a point on it.
    """
    _one_curve(trials, ("hidden_size", "rule", "vector_lr", "steps"))
    settled = settle(trials)
    try:
        return replace(_fit_surface(settled.trials, seed), blown=settled.blown)
    except NoOptimum as error:
        raise error.naming(settled.blown) from None


def _fit_surface(trials: Sequence[Trial], seed: int) -> Ridge:
    raw = informative([t for t in trials if not t.diverged and t.weight_decay is not None and t.weight_decay > 0])
    finite = aligned(raw)
    lrs, decays = sorted({t.lr for t in finite}), sorted({t.weight_decay or 0.0 for t in finite})
    best = _best_pair(finite)
    if len(lrs) < 3 or len(decays) < 3:
        raise NoOptimum(
            f"{len(lrs)} learning rates and {len(decays)} positive weight decays have a finite loss, and a surface "
            "needs 3 of each",
            "train more of them, or give --weight-decay to take the optimal LR at one of the weight decays",
            best,
        )
    pairs = {(t.lr, t.weight_decay) for t in finite}
    if len(pairs) < 7:
        raise NoOptimum(
            f"{len(pairs)} pairs of LR and weight decay have a finite loss, and a surface with 6 coefficients needs 7",
            "train more of the grid",
            best,
        )
    x = np.log2([[t.lr, t.weight_decay or math.nan] for t in finite])
    y = np.array([t.loss for t in finite])
    bad = set(outliers(x, y))
    kept = [i for i in range(len(finite)) if i not in bad]
    used, dropped = tuple(finite[i] for i in kept), tuple(raw[i] for i in sorted(bad))
    surface = fit(x[kept], y[kept], seed=seed)
    lowest = min(used, key=lambda t: t.loss)
    if surface is None:
        at_edge = [
            name
            for name, value, grid in (("LR", lowest.lr, lrs), ("weight decay", lowest.weight_decay, decays))
            if value in (grid[0], grid[-1])
        ]
        edge = f", and the {' and '.join(at_edge)} of the best is at the edge of the grid" if at_edge else ""
        raise NoOptimum(
            f"the losses around the best pair (LR {lowest.lr:g}, weight decay {lowest.weight_decay:g}) have no minimum "
            f"over both{edge}",
            "extend the grid around the best pair, or give --weight-decay to take the optimal LR at one weight decay",
            best,
        )
    return _checked_ridge(surface, used, dropped, trials)


def _checked_ridge(
    surface: Surface, used: tuple[Trial, ...], dropped: tuple[Trial, ...], trials: Sequence[Trial]
) -> Ridge:
    curvatures, directions = np.linalg.eigh(surface.hessian)
    along = directions[:, 0] * (1 if directions[0, 0] >= 0 else -1)
    low, high = _interval(surface, 0)
    decay_low, decay_high = _interval(surface, 1)
    ridge = Ridge(
        float(surface.minimum[0]),
        float(surface.minimum[1]),
        low,
        high,
        decay_low,
        decay_high,
        surface.value,
        (float(along[0]), float(along[1])),
        float(curvatures[0]),
        float(curvatures[1]),
        len(used),
        used,
        dropped,
    )
    for name, at, of in (
        ("LR", ridge.log2_lr, lambda t: t.lr),
        ("weight decay", ridge.log2_weight_decay, lambda t: t.weight_decay),
    ):
        _check_hull(name, at, used, trials, of, ridge)
    rises = np.quantile([t.loss for t in used], 0.5) - min(t.loss for t in used)
    _check_loss(ridge.lr, ridge.loss, float(rises), surface, used, ridge)
    if not high - low <= WIDEST + 1e-9:
        product = octaves(*_quantiles(surface.draws.sum(axis=1)))
        flat = (
            f"; the product LR * weight decay is known better: {product}, and along the ridge the loss rises by "
            f"{ridge.along / 2:.2g} an octave from the optimum, by {ridge.across / 2:.2g} across"
            if ridge.is_ridge
            else ""
        )
        raise NoOptimum(
            f"the interval of the best LR, {octaves(low, high)}, is wider than {WIDEST:g} octaves{flat}",
            "give --weight-decay to take the optimal LR at one weight decay, or train more seeds",
            ridge,
        )
    return ridge


def _check_hull(
    name: str,
    at: float,
    used: Sequence[Trial],
    trials: Sequence[Trial],
    of: Callable[[Trial], float | None],
    partial: Ridge,
) -> None:
    grid = sorted({of(t) or math.nan for t in used})
    slack = 1e-6
    if math.log2(grid[0]) + slack < at < math.log2(grid[-1]) - slack:
        return
    high = at > math.log2(grid[0]) + slack
    edge, step = (grid[-1], grid[-1] / grid[-2]) if high else (grid[0], grid[0] / grid[1])
    beyond = sorted({of(t) or 0.0 for t in trials if t.diverged and (of(t) or 0.0) > edge}) if high else []
    lost = f" (and {listed(beyond)} diverged)" if beyond else ""
    fix = f"add {edge * math.sqrt(step):.4g}" if beyond else f"add {edge * step:.4g} and {edge * step * step:.4g}"
    raise NoOptimum(
        f"the fitted {name}, {2**at:.4g}, is not inside the grid, whose {'highest' if high else 'lowest'} {name} with "
        f"a finite loss is {edge:.4g}{lost}",
        fix,
        partial,
    )


def _one_curve(trials: Sequence[Trial], same: Sequence[str]) -> None:
    for name in same:
        values = {getattr(t, name) for t in trials}
        if len(values) > 1:
            shown = ", ".join(sorted(map(str, values)))
            raise NoOptimum(f"the trials differ in {name} ({shown})", "fit them one by one")


def _means[Key](trials: Sequence[Trial], key: Callable[[Trial], Key]) -> dict[Key, float]:
    """Key -> mean loss, in the order in which the keys come."""
    losses: dict[Key, list[float]] = {}
    for t in trials:
        losses.setdefault(key(t), []).append(t.loss)
    return {own: fmean(values) for own, values in losses.items()}


def _levels(trials: Sequence[Trial]) -> dict[float, float]:
    """LR -> mean loss, in the order of the LRs."""
    return dict(sorted(_means(trials, lambda t: t.lr).items()))


def _curve(trials: Sequence[Trial]) -> str:
    """The losses in words, of many those around the lowest."""
    levels = list(_levels(trials).items())
    place = min(range(len(levels)), key=lambda i: levels[i][1])
    near = levels[max(place - NEAR, 0) : place + NEAR + 1]
    return ", ".join(f"{loss:.4g} at {lr:g}" for lr, loss in near)


def _best_point(used: Sequence[Trial], dropped: tuple[Trial, ...] = ()) -> Optimum | None:
    """The best LR of the grid, for those who insist on an optimum.

    Its interval is between its neighbours. At an edge of the grid it is open: the optimum may lie outside.
    """
    if not used:
        return None
    levels = _levels(used)
    lrs = list(levels)
    place = min(range(len(lrs)), key=lambda i: levels[lrs[i]])
    low = math.log2(lrs[place - 1]) if place else -math.inf
    high = math.log2(lrs[place + 1]) if place + 1 < len(lrs) else math.inf
    at = math.log2(lrs[place])
    return Optimum(at, low, high, levels[lrs[place]], math.nan, len(used), tuple(used), dropped)


def _best_pair(trials: Sequence[Trial]) -> Optimum | None:
    """The best LR of the grid among the trials with the best weight decay."""
    means = _means(trials, lambda t: (t.lr, t.weight_decay))
    decay = min(means, key=lambda pair: means[pair])[1] if means else None
    return _best_point([t for t in trials if t.weight_decay == decay])


def _check_edge(best: Optimum, used: Sequence[Trial], trials: Sequence[Trial]) -> None:
    """Raise NoOptimum if the best LR is the lowest or highest one with a finite loss."""
    levels = _levels(used)
    lrs = list(levels)
    if len(lrs) < 3:
        raise NoOptimum(
            f"{len(lrs)} learning rates are left without the losses that do not fit the others, and a fit needs 3",
            "train more learning rates or seeds",
            best,
        )
    lr = best.lr
    highest = abs(math.log2(lrs[-1] / lr)) < 1e-9
    if not highest and abs(math.log2(lrs[0] / lr)) > 1e-9:
        return
    step = lrs[-1] / lrs[-2] if highest else lrs[0] / lrs[1]
    edge = "highest" if highest else "lowest"
    beyond = sorted({t.lr for t in trials if t.diverged and t.lr > lr}) if highest else []
    if beyond:
        between = math.sqrt(lr * beyond[0])
        reason = f"the best LR {lr:.4g} is the highest that did not diverge ({listed(beyond)} did)"
        fix = f"add {between:.4g}" if beyond[0] / lr < 4 else f"add {2 * lr:.4g} and {between:.4g}"
    else:
        reason = f"the best LR {lr:.4g} is the {edge} of the grid, so the optimum may lie outside"
        fix = f"add {lr * step:.4g} and {lr * step**2:.4g}"
    x, y = np.log2(lrs), np.array(list(levels.values()))
    if np.polyfit(x - x.mean(), y, 2)[0] < 0 and min(y[0], y[-1]) < y[1:-1].max():
        reason += f" (and the losses bend downwards, the wrong sign of curvature: {_curve(used)})"
    raise NoOptimum(reason, fix, best)


def _check_inside(optimum: Optimum, used: Sequence[Trial]) -> None:
    """Raise NoOptimum if the fitted optimum is outside of the LRs it was fitted to."""
    lrs = list(_levels(used))
    if lrs[0] < optimum.lr < lrs[-1]:
        return
    high = optimum.lr >= lrs[-1]
    edge, step = (lrs[-1], lrs[-1] / lrs[-2]) if high else (lrs[0], lrs[0] / lrs[1])
    raise NoOptimum(
        f"the fitted LR {optimum.lr:.4g} is outside of the grid, whose {'highest' if high else 'lowest'} LR with a "
        f"finite loss is {edge:.4g}",
        f"add {edge * step:.4g} and {edge * step**2:.4g}",
        optimum,
    )


def _below_curve(used: Sequence[Trial]) -> float:
    """Return how far the losses rise within two LRs of the best, on the side where they rise less."""
    means = list(_levels(used).values())
    place = means.index(min(means))
    sides = means[max(place - 2, 0) : place], means[place + 1 : place + 3]
    return min(max(side) for side in sides if side) - means[place]


def _check_loss(
    lr: float, loss: float, rise: float, surface: Surface, used: Sequence[Trial], partial: Optimum | Ridge
) -> None:
    """Raise NoOptimum if the fitted loss is clearly below anything measured.

    Args:
        lr, loss: of the fit.
        rise: how far the losses around the best one rise.
        surface: the fit.
        used: what it was fitted to.
        partial: the fit, for those who insist.
    """
    lowest = min(_means(used, lambda t: (t.lr, t.weight_decay)).values())
    if lowest - loss <= max(BELOW, rise / SHARE, 3 * surface.sigma):
        return
    raise NoOptimum(
        f"the fitted loss, {loss:.4g} at LR {lr:.4g}, is {lowest - loss:.3f} below the lowest that was measured, "
        f"{lowest:.4g}: the losses are no valley around one LR",
        f"train LR {lr:.4g}",
        partial,
    )


def _check_narrow(optimum: Optimum, used: Sequence[Trial]) -> None:
    """Raise NoOptimum if a few LRs give an interval that is far narrower than the grid is fine."""
    lrs = list(_levels(used))
    if not FEW >= len(lrs) > 3:
        return
    right = next(place for place, lr in enumerate(lrs) if lr > optimum.lr)
    step = math.log2(lrs[right] / lrs[right - 1])
    if optimum.width < NARROW * step:
        raise NoOptimum(
            f"{len(lrs)} learning rates that are {step:.2g} octaves apart cannot tell the best LR as closely as the "
            f"fit says, {optimum.width:.2g} octaves: {_curve(used)}",
            f"train LR {optimum.lr:.4g}, or more learning rates around it",
            optimum,
        )


def _interval(surface: Surface, column: int) -> tuple[float, float]:
    """The central interval of one coordinate of the bootstrap sample; infinite if too many draws have no minimum."""
    return _quantiles(surface.draws[:, column])


def _quantiles(draws: NDArray[np.float64]) -> tuple[float, float]:
    if float(np.mean(np.isnan(draws))) > UNBOUNDED:
        return -math.inf, math.inf
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return float(low), float(high)
