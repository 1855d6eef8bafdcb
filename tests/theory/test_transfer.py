"""Rules for batch, horizon and depth: identities of what they claim to keep."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.theory.equilibrium import ema_time_scale
from megatron_patch.theory.transfer import (
    batch_lr_factor,
    depth_lr_factor,
    depth_residual_factor,
    weight_decay_factor,
)

positive = st.floats(1e-3, 1e3)


@given(positive, positive, positive, positive, positive, positive, positive)
def test_factor_keeps_the_timescale(
    batch: float, lr: float, decay: float, data: float, batches: float, more: float, lrs: float
) -> None:
    factor = weight_decay_factor(batches, more, lrs)
    step = 1e-13  # the product of LR and decay is below 1 in any training
    before = ema_time_scale(lr * step, decay, batch, data)
    after = ema_time_scale(lr * lrs * step, decay * factor, batch * batches, data * more)
    assert after == pytest.approx(before, rel=1e-9)


def test_timescale_is_a_part_of_the_training() -> None:
    """1 / (lr * decay) steps: 1 / (0.01 * 0.1) = 1,000 of 4,000."""
    assert ema_time_scale(lr=0.01, weight_decay=0.1, batch_size=8, data_size=8 * 4000) == pytest.approx(0.25)


@given(positive, positive)
def test_factors_multiply(a: float, b: float) -> None:
    for factor in (
        lambda r: batch_lr_factor("sqrt", r),
        lambda r: batch_lr_factor("linear", r),
        depth_lr_factor,
        depth_residual_factor,
    ):
        assert factor(a) * factor(b) == pytest.approx(factor(a * b))
        assert factor(1.0) == 1


def test_values() -> None:
    assert (batch_lr_factor("sqrt", 16), batch_lr_factor("linear", 16)) == (4, 16)
    assert (depth_lr_factor(4), depth_residual_factor(4)) == (0.5, 0.5)
    assert (depth_lr_factor(4, alpha=1), depth_residual_factor(4, alpha=1)) == (1, 0.25)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_what_is_not_positive_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not a positive number"):
        batch_lr_factor("sqrt", bad)
    with pytest.raises(ValueError, match="not a positive number"):
        weight_decay_factor(1, bad)
    with pytest.raises(ValueError, match="expected both"):
        ema_time_scale(bad, 1)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no batch rule"):
        batch_lr_factor("cube", 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha"):
        depth_lr_factor(2, alpha=0.2)
