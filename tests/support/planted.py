"""Trials around a planted optimum, of one LR or of an LR and a weight decay."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from megatron_patch.runs.trial import Trial

SHAPES: dict[str, Callable[[float], float]] = {
    "parabola": lambda d: 0.05 * d**2,
    "exponential": lambda d: 0.2 * (math.exp(0.5 * d) - 1 - 0.5 * d),  # three times as steep two octaves above
    "saturating": lambda d: 0.1 * math.log(math.cosh(1.2 * d)),
    "kinked": lambda d: 0.03 * d**2 * (1 + 0.8 * max(d, 0)),
}
OPTIMUM = -6.3


def curve(
    shape: str = "parabola",
    lrs: Sequence[float] = range(-9, -2),
    seeds: int = 1,
    noise: float = 0.0,
    at: float = OPTIMUM,
    generator: np.random.Generator | None = None,
) -> list[Trial]:
    """Trials at 2^lrs around an optimum at 2^at."""
    generator = generator or np.random.default_rng(0)
    return [
        Trial(32, 2.0**x, 3 + SHAPES[shape](x - at) + noise * generator.normal(), seed=s)
        for x in lrs
        for s in range(seeds)
    ]


def surface(
    along: float = 0.01, noise: float = 0.0, lrs: Sequence[int] = range(-9, -2), decays: Sequence[int] = range(-4, 3)
) -> list[Trial]:
    """A ridge along LR * weight decay = 2^-7.3 with its lowest point at LR 2^-6.15, weight decay 2^-1.15."""
    generator = np.random.default_rng(2)
    return [
        Trial(
            32,
            2.0**x,
            3 + 0.05 * (x + z + 7.3) ** 2 + along * (x - z + 5) ** 2 + noise * generator.normal(),
            weight_decay=2.0**z,
        )
        for x in lrs
        for z in decays
    ]
