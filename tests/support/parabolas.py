"""Sweeps whose optima are known: parabolas in log2 of the LR, without noise."""

from collections.abc import Callable, Iterable

from megatron_patch.runs.trial import Trial

BEND = 0.1
"""Second derivative of every curve, nats per octave squared."""
PROXY = -6.5
"""log2 of the proxy's optimal LR."""
GRID = range(-10, -3)


def curve(
    rule: str,
    width: int,
    optimum: float,
    lowest: float = 3.0,
    grid: Iterable[float] = GRID,
    noise: Callable[[float], float] = lambda x: 0.0,
    **settings: object,
) -> list[Trial]:
    """The trials of one rule and width with the loss `lowest + BEND / 2 (log2 LR - optimum)^2`."""
    return [
        Trial(width, 2.0**x, lowest + BEND / 2 * (x - optimum) ** 2 + noise(x), rule=rule, **settings)  # type: ignore[arg-type]
        for x in grid
    ]


PROXIES = curve("none", 32, PROXY, 3.5)
