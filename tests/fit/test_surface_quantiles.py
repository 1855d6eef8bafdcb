"""The quantiles of Student's t by which outliers are told, against the tables of textbooks."""

import pytest

from megatron_patch.fit.surface import _student


@pytest.mark.parametrize(
    ("probability", "freedom", "quantile"),
    [
        # probability 0.95, 0.975 and 0.995: Abramowitz and Stegun, Handbook of Mathematical Functions, table 26.10.
        (0.95, 1, 6.314),
        (0.975, 1, 12.706),
        (0.95, 2, 2.920),
        (0.975, 3, 3.182),
        (0.995, 3, 5.841),
        (0.975, 5, 2.571),
        (0.95, 10, 1.812),
        (0.995, 10, 3.169),
        (0.975, 30, 2.042),
        (0.995, 120, 2.617),
    ],
)
def test_quantiles_are_those_of_the_tables(probability: float, freedom: float, quantile: float) -> None:
    assert _student(probability, freedom) == pytest.approx(quantile, rel=1e-3, abs=6e-4)


def test_the_median_is_zero() -> None:
    assert _student(0.5, 7) == pytest.approx(0, abs=1e-3)
