"""Least squares near a minimum: where a noisy loss over log2 hyperparameters is lowest, and how well that is known.

The model is a quadratic with a shrunk cubic part. A loss over log2(LR) is a parabola only near its minimum, and steeper
on the side of high LRs, so two allowances are made. Both are choices (`assumed`), checked by simulation in the tests:

- cubic coefficients have the prior N(0, (`CUBIC` * a)^2) with a the largest quadratic one;
- a measurement has the standard deviation sqrt(sigma^2 + (`MISFIT` * rise)^2) with rise its height over the minimum, so
  that points far up the slope have little say.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from threadpoolctl import ThreadpoolController

Array = NDArray[np.float64]

BENDS = {3: 0.25, 4: 0.06}
"""Coefficients of the third and fourth degree over the quadratic one; exp(x) - x has 1/3 and 1/12."""
REPLICATES = 4.0
POWER = 1.0
REACH = 1.5
"""Points as high as a parabola is this many octaves from its minimum have half their weight."""
MISFIT = (0.1, 0.3)
"""How far off the prediction of one point from others on both sides, and on one side, may be: parts of its height above
the minimum."""
NOISE = 0.0005
"""Prior of sigma over the loss: what repeating a run with another seed typically does. It counts as one point."""
CONTRAST = 3.5
"""The losses must vary by this many times their noise, and more where few points tell the noise."""
GRID = {1: 5, 2: 25}
"""Places of a plain grid over one and two hyperparameters, to whose variation `CONTRAST` refers."""
CHANCE = 3.0
"""Standard deviations of what noise alone adds to the variation of more places."""
DRAWS = 2000
OUTLIER_LEVEL = 0.01
"""Chance that a sweep without outliers loses a point."""
ONE_BY_ONE = 30
"""Measurements up to which each is predicted from the others; of more, one has too little say in the fit to matter."""
CLOSE = 1e-12
"""Octaves of a last step of Newton's method that need no further one."""
ROUNDS = 5
"""In which outliers among many measurements are looked for."""
AT_ONCE = 2_000_000
"""Random numbers of the bootstrap that are in memory together."""


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def _in_one_thread[**Given, Result](function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Keep linear algebra to one thread: its matrices are small, and threads that wait for each other took 100 times
    as long as the sums, on a busy machine."""

    @functools.wraps(function)
    def alone(*args: Given.args, **named: Given.kwargs) -> Result:
        with _libraries().limit(limits=1, user_api="blas"):
            return function(*args, **named)

    return alone


@dataclass(frozen=True)
class Surface:
    """A fitted loss near its minimum."""

    minimum: Array
    """Where it is lowest, in log2 of each hyperparameter."""
    value: float
    hessian: Array
    """Second derivatives at the minimum, nats per octave squared."""
    sigma: float
    """Standard deviation of one measurement."""
    freedom: float
    """Degrees of freedom that `sigma` is estimated with."""
    draws: Array
    """Bootstrap sample of the minimum, [draws, hyperparameters]; nan where a draw has none."""
    curvatures: Array
    """The same of the second derivatives at the minimum along each hyperparameter, [draws, hyperparameters]."""


@dataclass(frozen=True)
class _Fit:
    center: Array
    solve: Array
    """[coefficients, rows]: from measurements, then cubic priors, in units of their standard deviations."""
    scale: Array
    """Standard deviation of each row."""
    coefficients: Array
    residuals: Array
    """Over their standard deviations."""
    sigma: float
    """Standard deviation of the mean of a place."""
    freedom: float
    lowest: float
    """The lowest mean."""


def _monomials(dimensions: int, highest: int | None = None) -> list[tuple[int, ...]]:
    """Index tuples up to the fourth degree, in two dimensions the third: () is 1, (0, 1) is x0 * x1."""
    return [
        t
        for degree in range((highest or 5 - dimensions) + 1)
        for t in itertools.combinations_with_replacement(range(dimensions), degree)
    ]


def _design(offsets: Array, highest: int | None = None) -> Array:
    """[points, monomials]."""
    columns = [np.prod(offsets[:, list(t)], axis=1) for t in _monomials(offsets.shape[1], highest)]
    return np.stack(columns, axis=1)


def _derivatives(coefficients: Array, point: Array) -> tuple[Array, Array]:
    """Gradient [draws, k] and Hessian [draws, k, k] of `coefficients` [draws, monomials] at `point` [draws, k]."""
    k = point.shape[1]
    gradient, hessian = np.zeros_like(point), np.zeros((*point.shape, k))
    for column, indices in enumerate(_monomials(k)):
        for place, i in enumerate(indices):
            rest = indices[:place] + indices[place + 1 :]
            gradient[:, i] += coefficients[:, column] * np.prod(point[:, list(rest)], axis=1)
            for second, j in enumerate(rest):
                last = rest[:second] + rest[second + 1 :]
                hessian[:, i, j] += coefficients[:, column] * np.prod(point[:, list(last)], axis=1)
    return gradient, hessian


def _minimise(coefficients: Array, k: int, reach: float) -> Array:
    """Minima [draws, k] by Newton's method from 0; nan where there is none within `reach`."""
    point = np.zeros((len(coefficients), k))
    ok = np.ones(len(coefficients), dtype=bool)
    for _ in range(30):
        gradient, hessian = _derivatives(coefficients, point)
        ok &= np.linalg.eigvalsh(hessian)[:, 0] > 0
        hessian[~ok] = np.eye(k)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        length = np.linalg.norm(step, axis=1, keepdims=True)
        point = point - step * np.minimum(1, 1 / np.maximum(length, 1e-12))  # at most an octave at a time
        ok &= np.linalg.norm(point, axis=1) <= reach
        point[~ok] = 0
        if length[ok].max(initial=0) < CLOSE:
            break
    gradient, hessian = _derivatives(coefficients, point)
    curved = np.linalg.eigvalsh(hessian)[:, 0]
    ok &= (curved > 0) & (np.linalg.norm(gradient, axis=1) <= 1e-4 * np.maximum(curved, 1e-300) + 1e-12)
    point[~ok] = np.nan
    return point


def _fit(x: Array, y: Array, highest: int | None = None) -> _Fit:
    """Fit the mean of every place, alternating between coefficients, weights and sigma until they agree."""
    k = x.shape[1]
    places, inverse = np.unique(x, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    counts = np.bincount(inverse).astype(float)
    means = np.bincount(inverse, y) / counts
    within = float(np.sum((y - means[inverse]) ** 2))
    replicates = min(float(len(y) - len(places)), REPLICATES)
    within = within / max(len(y) - len(places), 1) / float(counts.mean()) * replicates
    counts /= counts.mean()
    center = places[int(np.argmin(means))]
    rise = means - means.min()
    distance = np.sum((places - center) ** 2, axis=1)
    near = np.argsort(distance)[1 : 2 * k + 3]
    bend = float(np.median(rise[near] / distance[near]))
    n, design = len(places), _design(places - center, highest)
    degrees = np.array([len(t) for t in _monomials(k, highest)])
    shrunk = np.flatnonzero(degrees > 2)
    prior = np.zeros((len(shrunk), len(degrees)))
    prior[range(len(shrunk)), shrunk] = 1
    values = np.concatenate([means, np.zeros(len(shrunk))])
    floor = NOISE * max(abs(float(np.median(y))), 1e-12)
    sigma = floor
    for _ in range(12):
        bend = max(bend, 1e-9 * floor)
        weakness = (1 + (rise / (bend * REACH**2)) ** POWER) / np.sqrt(counts)
        scale = np.concatenate([sigma * weakness, bend * np.array([BENDS[d] for d in degrees[shrunk]])])
        rows = np.concatenate([design, prior]) / scale[:, None]
        orthogonal, triangular = np.linalg.qr(rows)
        solve = np.linalg.pinv(triangular) @ orthogonal.T  # places on a line leave a surface open across it
        coefficients = solve @ (values / scale)
        residuals = (means - design @ coefficients) / weakness
        freedom = max(n - float(np.sum(rows[:n] * solve[:, :n].T)), 0.0)
        own = float(residuals @ residuals) / (freedom + 1)
        squares = float(residuals @ residuals) + within + floor**2
        old, sigma = sigma, math.sqrt(max(squares / (freedom + replicates + 1), own))
        bend = float(np.abs(coefficients[degrees == 2]).max())
        if abs(sigma / old - 1) < 1e-2:
            break
    return _Fit(center, solve, scale, coefficients, residuals / sigma, sigma, freedom + replicates + 1, means.min())


def _stands_out(x: Array, y: Array, found: _Fit) -> bool:
    """Return whether the mean losses of the places vary by more than noise.

    Compared are sums of squares, so that more places near the minimum, which vary little, cannot hide what there is.
    """
    places, inverse = np.unique(x, axis=0, return_inverse=True)
    means = np.bincount(inverse.reshape(-1), y) / np.bincount(inverse.reshape(-1))
    n, k = len(places) - 1, x.shape[1]
    noise = found.sigma**2
    if k == 1 and n > 2 * GRID[k]:
        # Sigma is too low where what lifts most places is noise: places high up have little say in it.
        noise = max(noise, _between_neighbours(places[:, 0], means))
    plain = min(n, GRID[k] - 1)
    needed = n + (CONTRAST**2 - 1) * plain + CHANCE * (math.sqrt(2 * n) - math.sqrt(2 * plain))
    return float(np.sum((means - means.mean()) ** 2)) >= (1 + 8 / found.freedom) * needed * noise


def _between_neighbours(x: Array, y: Array) -> float:
    """Return the noise variance of a smooth curve at many places, from how far each is off the line of its neighbours.

    Source: Gasser, Sroka and Jennen-Steinmetz, Biometrika 73 (1986). `x` is sorted.
    """
    share = (x[2:] - x[1:-1]) / (x[2:] - x[:-2])
    off = share * y[:-2] + (1 - share) * y[2:] - y[1:-1]
    return float(np.mean(off**2 / (share**2 + (1 - share) ** 2 + 1)))


@_in_one_thread
def fit(x: Array, y: Array, *, seed: int = 0) -> Surface | None:
    """Fit the loss near its minimum; None without a minimum within reach that stands out of the noise.

    The bootstrap resamples the standardised residuals of all measurements (points and seeds alike), scales them by
    sqrt(f / chi^2_f), as sigma itself is uncertain, and draws the cubic coefficients from their prior.

    Args:
        x: [points, 1 or 2], log2 of the hyperparameters.
        y: [points], finite losses.
        seed: of the bootstrap.
    """
    k = x.shape[1]
    reach = float(np.ptp(x, axis=0).max())
    found = _fit(x, y)
    at = _minimise(found.coefficients[None], k, reach)
    if np.isnan(at).any() or not _stands_out(x, y, found):
        return None
    generator = np.random.default_rng(seed)
    n = len(found.residuals)
    freedom = found.freedom
    pool = found.residuals - found.residuals.mean()
    pool = pool / max(math.sqrt(float(np.mean(pool**2))), 1e-12)
    step = max(AT_ONCE // n, 1)
    parts = []
    for count in (min(step, DRAWS - first) for first in range(0, DRAWS, step)):
        noise = generator.choice(pool, (count, n)) * np.sqrt(freedom / generator.chisquare(freedom, (count, 1)))
        priors = generator.normal(size=(count, found.solve.shape[1] - n))
        parts.append(found.coefficients + np.concatenate([noise, priors], axis=1) @ found.solve.T)
    coefficients = np.concatenate(parts)
    draws = _minimise(coefficients, k, 4 * reach)
    curvatures = np.diagonal(_derivatives(coefficients, draws)[1], axis1=1, axis2=2)
    value = float((_design(at) @ found.coefficients)[0])
    _, hessian = _derivatives(found.coefficients[None], at)
    return Surface(
        at[0] + found.center, value, hessian[0], found.sigma, found.freedom, draws + found.center, curvatures
    )


@_in_one_thread
def outliers(x: Array, y: Array) -> list[int]:
    """Return the measurements that do not fit the others, by Rosner's generalised ESD test (Technometrics 1983).

    Each is predicted from the others; up to a quarter of the points can be found, fewer where too few would be left to
    tell an outlier from a curve of another shape. More than `ONE_BY_ONE` are all predicted from the fit to all, in a
    few rounds, each without what was found before.
    """
    n, k = x.shape
    if n > ONE_BY_ONE:
        return _outliers_of_many(x, y)
    kept, removed, found = list(range(n)), [], 0
    for _ in range(min(n // 4, n - 4 - (k - 1) * 3)):
        surprises = [(*_surprise(x, y, kept, i), i) for i in kept]
        surprise, freedom, worst = max(surprises)
        kept.remove(worst)
        removed.append(worst)
        if surprise > stdtrit(freedom, 1 - OUTLIER_LEVEL / (2 * (len(kept) + 1))):
            found = len(removed)
    return removed[:found]


def _outliers_of_many(x: Array, y: Array) -> list[int]:
    kept, removed = np.arange(len(y)), list[int]()
    for _ in range(ROUNDS):
        places = np.unique(x[kept], axis=0)
        if len(places) < len(_monomials(x.shape[1], 2)) + 1:
            break
        fitted = _fit(x[kept], y[kept], 3)
        rows = _design(x[kept] - fitted.center, 3)
        predicted = rows @ fitted.coefficients
        inside = np.all((x[kept] > places.min(axis=0)) & (x[kept] < places.max(axis=0)), axis=1)
        rise = np.where(inside, predicted, np.maximum(predicted, y[kept])) - fitted.lowest
        misfit = np.where(inside, *MISFIT) * np.maximum(rise, 0)
        seeds = len(kept) / len(places)
        variance = seeds * fitted.sigma**2 + misfit**2 + np.sum((rows @ fitted.solve) ** 2, axis=1)
        surprise = np.abs(y[kept] - predicted) / np.sqrt(variance)
        limit = stdtrit(fitted.freedom, 1 - OUTLIER_LEVEL / (2 * len(kept)))
        room = len(y) // 4 - len(removed)
        found = [int(i) for i in np.argsort(-surprise)[:room] if surprise[i] > limit]
        if not found:
            break
        removed += [int(kept[i]) for i in found]
        kept = np.delete(kept, found)
    return removed


def _surprise(x: Array, y: Array, kept: list[int], i: int) -> tuple[float, float]:
    """Residual of measurement i predicted from the others, over its standard deviation; and degrees of freedom."""
    rest = [j for j in kept if j != i]
    if len(np.unique(x[rest], axis=0)) < len(_monomials(x.shape[1], 2)):
        return 0.0, 1.0  # a quadratic takes any loss at this place
    fitted = _fit(x[rest], y[rest], 3)
    row = _design(x[[i]] - fitted.center, 3)[0]
    predicted = float(row @ fitted.coefficients)
    inside = np.all((x[i] > x[rest].min(axis=0)) & (x[i] < x[rest].max(axis=0)))
    rise = (predicted if inside else max(predicted, y[i])) - fitted.lowest
    seeds = len(rest) / len(np.unique(x[rest], axis=0))
    misfit = MISFIT[0 if inside else 1] * max(rise, 0)
    variance = seeds * fitted.sigma**2 + misfit**2 + float(np.sum((row @ fitted.solve) ** 2))
    return abs(y[i] - predicted) / math.sqrt(variance), fitted.freedom
