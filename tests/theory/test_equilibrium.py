"""Weight-norm model against exact arithmetic, the plain recurrence, and simulated AdamW on random gradients."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_patch.theory.equilibrium import (
    NormStep,
    decay_per_step,
    ema_time_scale,
    equilibrium_norm,
    equilibrium_relative_update,
    equilibrium_rho,
    momentum_update_rms,
    next_rho,
    relative_update_without_decay,
    rho_after,
    steps_to_equilibrium,
    top_singular_value_scale,
    trajectory,
)

PROPERTY = settings(max_examples=50, deadline=None)  # no deadline: the machine may be busy
LRS = st.floats(1e-4, 1.0)
DECAYS = st.floats(0.0, 0.9)
POSITIVE_DECAYS = st.floats(0.01, 0.9)
RHOS = st.floats(1e-3, 10.0)
UPDATE_RMS = st.floats(0.1, 2.0)


def brute_force_rho_squared(steps: int, rho_0: float, lr: float, weight_decay: float, update_rms: float) -> Fraction:
    """Eq. 30 in exact arithmetic, on squares; independent of the float code."""
    a, growth, squared = 1 - Fraction(lr) * Fraction(weight_decay), Fraction(update_rms * lr) ** 2, Fraction(rho_0) ** 2
    for _ in range(steps):
        squared = a**2 * squared + growth
    return squared


class TestRecurrence:
    @PROPERTY
    @given(rho_0=RHOS, lr=LRS, weight_decay=DECAYS, update_rms=UPDATE_RMS, steps=st.integers(0, 8))
    def test_recurrence_and_closed_form_agree_with_exact_arithmetic(
        self, rho_0: float, lr: float, weight_decay: float, update_rms: float, steps: int
    ) -> None:
        exact = math.sqrt(brute_force_rho_squared(steps, rho_0, lr, weight_decay, update_rms))
        rho = rho_0
        for _ in range(steps):
            rho = next_rho(rho, lr, weight_decay, update_rms)
        assert rho == pytest.approx(exact, rel=1e-13)
        assert rho_after(steps, rho_0, lr, weight_decay, update_rms) == pytest.approx(exact, rel=1e-13)

    @PROPERTY
    @given(schedule=st.lists(st.tuples(st.floats(0, 1), DECAYS), max_size=10), rho_0=RHOS, update_rms=UPDATE_RMS)
    def test_trajectory_yields_the_state_before_each_step(
        self, schedule: list[tuple[float, float]], rho_0: float, update_rms: float
    ) -> None:
        squared, expected = rho_0**2, []
        for lr, weight_decay in schedule:
            expected.append((math.sqrt(squared), update_rms * lr / math.sqrt(squared)))
            squared = (1 - lr * weight_decay) ** 2 * squared + (update_rms * lr) ** 2
        steps = list(trajectory(schedule, rho_0, update_rms))
        assert [step.rho for step in steps] == pytest.approx([rho for rho, _ in expected], rel=1e-12)
        assert [step.relative_update for step in steps] == pytest.approx([rwu for _, rwu in expected], rel=1e-12)

    def test_trajectory_reads_an_endless_schedule_lazily(self) -> None:
        assert next(trajectory(iter(lambda: (0.1, 0.1), None), rho_0=0.5)) == NormStep(0.5, 0.2)

    @PROPERTY
    @given(rho_0=RHOS, lr=st.floats(1e-6, 1.0), steps=st.integers(0, 10**6))
    def test_closed_form_is_continuous_at_zero_decay(self, rho_0: float, lr: float, steps: int) -> None:
        without = math.sqrt(rho_0**2 + steps * lr**2)
        assert rho_after(steps, rho_0, lr, 0.0) == pytest.approx(without, rel=1e-12)
        assert rho_after(steps, rho_0, lr, 1e-18) == pytest.approx(without, rel=1e-9)

    @PROPERTY
    @given(lr=LRS, weight_decay=POSITIVE_DECAYS, ratio=st.floats(0.01, 100.0))
    def test_equilibrium_is_the_fixed_point_and_is_reached_from_both_sides(
        self, lr: float, weight_decay: float, ratio: float
    ) -> None:
        fixed = equilibrium_rho(lr, weight_decay)
        assert next_rho(fixed, lr, weight_decay) == pytest.approx(fixed, rel=1e-12)
        assert rho_after(1e9, ratio * fixed, lr, weight_decay) == pytest.approx(fixed, rel=1e-12)
        one_step_closer = abs(math.log(next_rho(ratio * fixed, lr, weight_decay) / fixed))
        assert one_step_closer <= abs(math.log(ratio)) + 1e-12

    @PROPERTY
    @given(lr=LRS, weight_decay=DECAYS, rho=RHOS, update_rms=UPDATE_RMS)
    def test_update_rms_is_a_unit_of_weight(
        self, lr: float, weight_decay: float, rho: float, update_rms: float
    ) -> None:
        assert next_rho(rho * update_rms, lr, weight_decay, update_rms) == pytest.approx(
            update_rms * next_rho(rho, lr, weight_decay), rel=1e-12
        )


class TestEquilibrium:
    @PROPERTY
    @given(lr=st.floats(1e-5, 1e-2), weight_decay=st.floats(0.01, 0.5))
    def test_small_rate_approximations(self, lr: float, weight_decay: float) -> None:
        """rho_inf^2 ~ eta / (2 lambda) and RWU^2 ~ 2 eta lambda, both off by a factor 1 -+ eta lambda / 2."""
        assert equilibrium_rho(lr, weight_decay) ** 2 == pytest.approx(lr / (2 * weight_decay), rel=lr * weight_decay)
        rwu = equilibrium_relative_update(lr, weight_decay)
        assert rwu**2 == pytest.approx(2 * lr * weight_decay, rel=lr * weight_decay)
        norm = equilibrium_norm(fan_out=48, fan_in=12, lr=lr, weight_decay=weight_decay)
        assert norm == pytest.approx(math.sqrt(48 * 12 * lr / (2 * weight_decay)), rel=lr * weight_decay)

    @PROPERTY
    @given(lr=LRS, weight_decay=POSITIVE_DECAYS, rho_0=RHOS, update_rms=UPDATE_RMS)
    def test_relative_update_settles_at_the_same_value_for_any_start_and_update(
        self, lr: float, weight_decay: float, rho_0: float, update_rms: float
    ) -> None:
        settled = update_rms * lr / rho_after(1e9, rho_0, lr, weight_decay, update_rms)
        assert settled == pytest.approx(equilibrium_relative_update(lr, weight_decay), rel=1e-9)

    @PROPERTY
    @given(lr=st.floats(1e-4, 1e-1), weight_decay=POSITIVE_DECAYS, m=st.floats(1.0, 100.0))
    def test_independent_scaling_keeps_the_relative_update_and_divides_the_size(
        self, lr: float, weight_decay: float, m: float
    ) -> None:
        kept = equilibrium_relative_update(lr / m, weight_decay * m)
        assert kept == pytest.approx(equilibrium_relative_update(lr, weight_decay), rel=1e-9)
        assert equilibrium_rho(lr / m, weight_decay * m) == pytest.approx(
            equilibrium_rho(lr, weight_decay) / m, rel=1e-9
        )

    @PROPERTY
    @given(rho_0=RHOS, lr=LRS, update_rms=UPDATE_RMS, steps=st.integers(0, 10**6))
    def test_relative_update_without_decay_is_equation_37(
        self, rho_0: float, lr: float, update_rms: float, steps: int
    ) -> None:
        printed = 1 / math.sqrt((rho_0 / (update_rms * lr)) ** 2 + steps)
        assert relative_update_without_decay(steps, rho_0, lr, update_rms) == pytest.approx(printed, rel=1e-12)


class TestStepsToEquilibrium:
    @PROPERTY
    @given(lr=st.floats(0.05, 1.0), weight_decay=st.floats(0.05, 0.9), ratio=st.floats(0.0, 50.0), b=UPDATE_RMS)
    def test_is_the_first_step_of_the_recurrence_within_a_factor_sqrt_2(
        self, lr: float, weight_decay: float, ratio: float, b: float
    ) -> None:
        a = 1 - lr * weight_decay
        fixed_squared = (b * lr) ** 2 / (1 - a**2)
        rho_0 = ratio * math.sqrt(fixed_squared)
        squared, first = rho_0**2, 0
        # 1e-9: a start that lies on the boundary may round to either side
        while not 0.5 * (1 - 1e-9) <= squared / fixed_squared <= 2 * (1 + 1e-9):
            squared, first = a**2 * squared + (b * lr) ** 2, first + 1
        predicted = steps_to_equilibrium(rho_0, lr, weight_decay, b)
        assert first == pytest.approx(math.ceil(predicted), abs=0) or abs(predicted - round(predicted)) < 1e-5

    @pytest.mark.parametrize(("ratio", "reached"), [(7.0, math.sqrt(2)), (0.1, math.sqrt(0.5)), (0.0, math.sqrt(0.5))])
    def test_the_criterion_is_on_the_rms_and_not_on_its_square(self, ratio: float, reached: float) -> None:
        """The printed eq. 34 mixes the two: a factor sqrt(2) on rho is a factor 2 on rho^2."""
        lr, weight_decay = 0.004, 0.1
        fixed = equilibrium_rho(lr, weight_decay)
        steps = steps_to_equilibrium(ratio * fixed, lr, weight_decay)
        assert rho_after(steps, ratio * fixed, lr, weight_decay) / fixed == pytest.approx(reached, rel=1e-12)

    @pytest.mark.parametrize("ratio", [0.71, 1.0, 1.41])
    def test_is_zero_inside_the_band(self, ratio: float) -> None:
        assert steps_to_equilibrium(ratio * equilibrium_rho(0.01, 0.1), 0.01, 0.1) == 0


def simulate_adamw(
    steps: int, lr: float, weight_decay: float, beta1: float, beta2: float, measure_from: int
) -> tuple[NDArray[np.float64], float]:
    """Return the weights after AdamW on white noise, and the mean ‖dW‖/‖W‖ of the steps from measure_from on."""
    rng = np.random.default_rng(7)
    w = 0.02 * rng.standard_normal(8_000)
    first, second, relative_updates = np.zeros_like(w), np.zeros_like(w), []
    for t in range(1, steps + 1):
        gradient = rng.standard_normal(w.size)
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        dw = -lr * (first / (1 - beta1**t)) / (np.sqrt(second / (1 - beta2**t)) + 1e-8)
        if t >= measure_from:
            relative_updates.append(np.linalg.norm(dw) / np.linalg.norm(w))
        w = (1 - lr * weight_decay) * w + dw
    return w, float(np.mean(relative_updates))


class TestAgainstSimulatedTraining:
    """8,000 random walks: sampling leaves about 1% on an RMS. Adam's averages leave up to 3%, since they are finite."""

    LR, WEIGHT_DECAY = 0.02, 0.1

    @pytest.mark.parametrize("steps", [50, 300, 1_500])
    def test_random_signs_follow_the_recurrence(self, steps: int) -> None:
        rng = np.random.default_rng(3)
        w = 0.02 * rng.standard_normal(8_000)
        for _ in range(steps):
            w = (1 - self.LR * self.WEIGHT_DECAY) * w - self.LR * rng.choice([-1.0, 1.0], w.size)
        rms = float(np.sqrt(np.mean(w**2)))
        assert rms == pytest.approx(rho_after(steps, 0.02, self.LR, self.WEIGHT_DECAY), rel=0.03)

    def test_adamw_with_momentum_keeps_the_norm_but_not_the_single_step(self) -> None:
        w, measured = simulate_adamw(1_500, self.LR, self.WEIGHT_DECAY, beta1=0.9, beta2=0.99, measure_from=1_300)
        norm = equilibrium_norm(fan_out=80, fan_in=100, lr=self.LR, weight_decay=self.WEIGHT_DECAY)
        assert np.linalg.norm(w) == pytest.approx(norm, rel=0.04)
        predicted = equilibrium_relative_update(self.LR, self.WEIGHT_DECAY) * momentum_update_rms(0.9)
        assert measured == pytest.approx(predicted, rel=0.04)

    def test_without_momentum_a_single_step_has_the_full_size(self) -> None:
        assert momentum_update_rms(0.0) == 1


class TestScales:
    @PROPERTY
    @given(lr=LRS, weight_decay=POSITIVE_DECAYS)
    def test_ema_time_scale_is_the_age_at_which_an_update_has_shrunk_by_e(self, lr: float, weight_decay: float) -> None:
        """(1 - eta lambda)^n = 1/e at n slightly below 1 / (eta lambda), by at most one step."""
        age = -1 / math.log1p(-lr * weight_decay)
        assert age <= ema_time_scale(lr, weight_decay) <= age + 1

    def test_ema_time_scale_in_epochs_counts_any_unit_of_data(self) -> None:
        tokens = ema_time_scale(0.01, 0.1, batch_size=64 * 2048, data_size=10**6 * 2048)
        assert (
            tokens == pytest.approx(ema_time_scale(0.01, 0.1, batch_size=64, data_size=10**6)) == pytest.approx(0.064)
        )

    @PROPERTY
    @given(lr=LRS, weight_decay=POSITIVE_DECAYS, m=st.sampled_from([2, 4, 16]))
    def test_the_sqrt_decay_rule_keeps_the_top_singular_value(self, lr: float, weight_decay: float, m: int) -> None:
        """eta ~ 1/m with lambda ~ sqrt(m), arXiv 2510.15262, is what leaves sqrt(eta/lambda) d^0.75 alone."""
        wide = top_singular_value_scale(lr / m, weight_decay * math.sqrt(m), width=64 * m)
        assert wide == pytest.approx(top_singular_value_scale(lr, weight_decay, width=64), rel=1e-12)


class TestRefusals:
    @pytest.mark.parametrize(("lr", "weight_decay"), [(-0.1, 0.1), (0.1, -0.1), (2.0, 0.5), (math.nan, 0.1)])
    def test_impossible_decay(self, lr: float, weight_decay: float) -> None:
        with pytest.raises(ValueError, match="below 1"):
            decay_per_step(lr, weight_decay)

    @pytest.mark.parametrize(("lr", "weight_decay"), [(0.0, 0.1), (0.1, 0.0)])
    def test_no_equilibrium(self, lr: float, weight_decay: float) -> None:
        for function in (equilibrium_rho, ema_time_scale):
            with pytest.raises(ValueError, match="no equilibrium"):
                function(lr, weight_decay)
        with pytest.raises(ValueError, match="no equilibrium"):
            steps_to_equilibrium(0.02, lr, weight_decay)
        with pytest.raises(ValueError, match="no equilibrium"):
            top_singular_value_scale(lr, weight_decay, 64)

    @pytest.mark.parametrize("rho_0", [0.0, -1.0, math.nan, math.inf])
    def test_relative_update_of_weights_without_size(self, rho_0: float) -> None:
        with pytest.raises(ValueError, match="rho_0"):
            next(trajectory([(0.1, 0.1)], rho_0))
        with pytest.raises(ValueError, match="rho_0"):
            relative_update_without_decay(0, rho_0, 0.1)
