"""The forecast of a shift, against what its two models say in closed form."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.theory.alignment import noise_model_update_alignment
from megatron_patch.theory.equilibrium import equilibrium_relative_update, trajectory
from megatron_patch.theory.forecast import Course, forecast_shift, mean_log2_rrc, snr_of
from megatron_patch.theory.width import RULES

SIGNAL = 1e3
"""A gradient that is all signal: every alignment is 1, at any width."""
LR, DECAY = 0.01, 0.5


@pytest.mark.parametrize(
    ("rule", "octaves"), [("none", 0.0), ("standard", 2.0), ("independent", 0.0), ("sqrt", 0.0), ("sqrt-decay", 1.0)]
)
def test_in_equilibrium_the_product_of_lr_and_weight_decay_decides(rule: str, octaves: float) -> None:
    """RRC is sqrt(2 eta lambda) there, so an LR is to make up for what a rule does to the product: m^(a - b)."""
    course = Course([1.0] * 3000, DECAY, tokens=2048, snr=SIGNAL)
    rho = math.sqrt(LR / (2 * DECAY))  # both begin in the proxy's equilibrium
    shift = forecast_shift(course, RULES[rule], 4.0, 512, LR, rho, rho)
    assert shift == pytest.approx(octaves, abs=0.2)


@pytest.mark.parametrize(("rule", "octaves"), [("none", 0.0), ("standard", 2.0), ("no-decay", 2.0)])
def test_in_a_few_steps_the_lr_decides(rule: str, octaves: float) -> None:
    """Weights hardly move: the relative update is the LR over their initial RMS. Alignments apart."""
    course = Course([1.0] * 3, DECAY, tokens=2048, snr=SIGNAL)
    shift = forecast_shift(course, RULES[rule], 4.0, 512, 1e-6, 0.05, 0.05)
    # alpha_W is 1 / sqrt(C): half as large at four times the width, so that the features change twice as fast.
    assert shift == pytest.approx(octaves - 1, abs=0.01)


def test_the_relative_update_is_that_of_the_weight_norm_model() -> None:
    """With all alignments 1, and no initial weights left, nothing else is in it."""
    course = Course([1.0] * 4000, DECAY, tokens=2048, snr=SIGNAL)
    rho = 1e-9  # gone after a step
    expected = [math.log2(step.relative_update) for step in trajectory([(LR, DECAY)] * 4000, rho)][1:3980]
    found = mean_log2_rrc(course, 64, LR, DECAY, rho)
    first = math.log2(LR / rho) + math.log2(noise_model_update_alignment(64, 2048, SIGNAL) * 8)
    assert found * 3980 - first == pytest.approx(sum(expected), rel=1e-3)
    assert expected[-1] == pytest.approx(math.log2(equilibrium_relative_update(LR, DECAY)), abs=1e-3)


@given(
    fan_in=st.integers(8, 4096),
    lr=st.floats(1e-4, 1e-1),
    decay=st.floats(0.0, 1.0),
    snr=st.floats(1e-5, 1.0),
    rule=st.sampled_from(sorted(RULES)),
)
def test_at_the_proxys_width_nothing_shifts(fan_in: int, lr: float, decay: float, snr: float, rule: str) -> None:
    course = Course([min(1.0, t / 4, (20 - t) / 16) for t in range(20)], decay, 2048, snr)
    assert forecast_shift(course, RULES[rule], 1.0, fan_in, lr, 0.1, 0.1) == pytest.approx(0, abs=1e-6)


@given(fan_in=st.integers(8, 4096), tokens=st.integers(8, 1 << 22), snr=st.floats(1e-6, 10.0))
def test_the_signal_is_read_off_an_alignment(fan_in: int, tokens: int, snr: float) -> None:
    alignment = noise_model_update_alignment(fan_in, tokens, snr)
    assert noise_model_update_alignment(fan_in, tokens, snr_of(alignment, fan_in, tokens)) == pytest.approx(alignment)


def test_an_alignment_of_noise_alone_has_no_signal() -> None:
    assert snr_of(0.01, 128, 1024) == 0.0


@pytest.mark.parametrize(
    ("course", "lr", "message"),
    [
        (Course([1.0], 10.0, 64, 0.1), 0.1, "below 1"),
        (Course([0.0, 0.0], 0.1, 64, 0.1), 0.1, "LR above 0"),
        (Course([], 0.1, 64, 0.1), 0.1, "LR above 0"),
    ],
)
def test_what_cannot_be_forecast_is_told(course: Course, lr: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_log2_rrc(course, 64, lr, course.weight_decay, 0.1)
