"""Extra warmups against the paper's check values, exact arithmetic and brute-force weight norms."""

import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_patch.theory.equilibrium import equilibrium_rho
from megatron_patch.theory.schedules import (
    decay_away,
    decay_away_factors,
    decay_away_step,
    equilibrium_factor,
    equilibrium_factors,
    exp_increasing,
    linear_warmup_linear_decay,
    warmup_length,
)

PROPERTY = settings(max_examples=50, deadline=None)  # no deadline: the machine may be busy
MULTIPLIERS = st.floats(1.0, 1e4)
ANY_MULTIPLIERS = st.floats(1e-4, 1e4)
LRS = st.floats(0.0, 1.0)
DECAYS = st.floats(0.0, 0.9)
PRODUCTS = st.floats(0.0, 1.0)


def fig_7_lr(t: int) -> float:
    """The setting of arXiv 2510.19093, fig. 7: 20,000 steps, 10% linear warmup from 0, then linear decay to 0."""
    return linear_warmup_linear_decay(t, peak=0.004, warmup=2_000, total=20_000)


class TestExpIncreasing:
    @pytest.mark.parametrize(("t", "factor"), [(0, 0.0625), (5_000, 0.25), (10_000, 1.0), (10_001, 1.0), (20_000, 1.0)])
    def test_check_values_of_fig_7(self, t: int, factor: float) -> None:
        assert exp_increasing(t, warmup_steps=10_000, m=16) == pytest.approx(factor, rel=1e-14)

    @PROPERTY
    @given(t=st.integers(0, 10**7), warmup_steps=st.integers(0, 10**6))
    def test_width_times_one_is_the_identity(self, t: int, warmup_steps: int) -> None:
        assert exp_increasing(t, warmup_steps, m=1) == 1

    @PROPERTY
    @given(t=st.integers(0, 10**7), m=ANY_MULTIPLIERS)
    def test_zero_length_warmup_is_one_from_the_start(self, t: int, m: float) -> None:
        assert exp_increasing(t, 0, m) == 1

    @PROPERTY
    @given(warmup_steps=st.integers(1, 10**6), m=MULTIPLIERS, data=st.data())
    def test_rises_from_one_over_m_to_one(self, warmup_steps: int, m: float, data: st.DataObject) -> None:
        t = data.draw(st.integers(0, warmup_steps - 1))
        now, after = exp_increasing(t, warmup_steps, m), exp_increasing(t + 1, warmup_steps, m)
        assert exp_increasing(0, warmup_steps, m) == pytest.approx(1 / m, rel=1e-14)
        assert now <= after <= 1
        assert after / now == pytest.approx(m ** (1 / warmup_steps), rel=1e-10)  # also across the join at T_W

    @PROPERTY
    @given(t=st.integers(0, 10**5), warmup_steps=st.integers(1, 10**5), m=MULTIPLIERS, n=st.floats(0.01, 100))
    def test_scaling_the_width_twice_multiplies(self, t: int, warmup_steps: int, m: float, n: float) -> None:
        twice = exp_increasing(t, warmup_steps, m) * exp_increasing(t, warmup_steps, n)
        assert exp_increasing(t, warmup_steps, m * n) == pytest.approx(twice, rel=1e-12)

    @pytest.mark.parametrize(("t", "warmup_steps", "m"), [(-1, 10, 2), (0, -1, 2), (0, 10, 0), (0, 10, math.nan)])
    def test_refuses(self, t: int, warmup_steps: int, m: float) -> None:
        with pytest.raises(ValueError, match="expected"):
            exp_increasing(t, warmup_steps, m)


class TestWarmupLength:
    @pytest.mark.parametrize(
        ("fraction", "total", "steps"), [(0.07, 100, 7), (0.29, 100, 29), (0.1, 3, 1), (0.0, 100, 0), (1.0, 100, 100)]
    )
    def test_is_rounded_up_but_not_for_the_last_bit(self, fraction: float, total: int, steps: int) -> None:
        assert warmup_length(fraction, total) == steps

    @pytest.mark.parametrize(("fraction", "total"), [(-0.1, 10), (1.1, 10), (math.nan, 10), (0.5, -1)])
    def test_refuses(self, fraction: float, total: int) -> None:
        with pytest.raises(ValueError, match="expected"):
            warmup_length(fraction, total)


class TestDecayAway:
    def test_check_values_of_fig_7(self) -> None:
        factors = list(decay_away_factors(map(fig_7_lr, range(20_000)), weight_decay=0.1, m=16))
        assert len(factors) == 20_000
        assert factors[0] == 0.0625
        assert factors[5_000] == pytest.approx(0.270236, abs=5e-7)
        assert factors[10_000] == pytest.approx(0.747678, abs=5e-7)

    @PROPERTY
    @given(lrs=st.lists(LRS, max_size=8), weight_decay=DECAYS, m=st.floats(0.1, 1e4))
    def test_agrees_with_equation_15_in_exact_arithmetic(self, lrs: list[float], weight_decay: float, m: float) -> None:
        left = [(1 - Fraction(lr) * Fraction(weight_decay)) ** 2 for lr in lrs]
        inverse_squares = [1 + (Fraction(m) ** 2 - 1) * math.prod(left[:t]) for t in range(len(lrs))]
        expected = [1 / math.sqrt(inverse_square) for inverse_square in inverse_squares]
        assert list(decay_away_factors(lrs, weight_decay, m)) == pytest.approx(expected, rel=1e-12)

    def test_many_small_steps_lose_no_more_digits_than_promised(self) -> None:
        steps, weight_decay, product = 20_000, 0.1, 1.0
        with localcontext(prec=40):
            exact = Decimal(1)
            for t in range(steps):
                lr = 1e-3 * (1 + t % 7)
                product = decay_away_step(product, lr, weight_decay)
                exact *= (1 - Decimal(lr) * Decimal(weight_decay)) ** 2
            assert abs(Decimal(product) / exact - 1) < steps * Decimal("5e-16")

    @PROPERTY
    @given(product=PRODUCTS)
    def test_width_times_one_is_the_identity(self, product: float) -> None:
        assert decay_away(product, m=1) == 1

    @PROPERTY
    @given(m=ANY_MULTIPLIERS)
    def test_starts_at_one_over_m_and_ends_at_one(self, m: float) -> None:
        assert decay_away(1.0, m) == pytest.approx(1 / m, rel=1e-14)
        assert decay_away(0.0, m) == 1

    @PROPERTY
    @given(product=PRODUCTS, m=st.floats(1.0, allow_infinity=False, allow_nan=False))
    def test_never_above_one_and_never_nan(self, product: float, m: float) -> None:
        assert 0 <= decay_away(product, m) <= 1

    @PROPERTY
    @given(product=PRODUCTS, lr=LRS, weight_decay=DECAYS, m=MULTIPLIERS)
    def test_a_step_never_lowers_the_factor(self, product: float, lr: float, weight_decay: float, m: float) -> None:
        after = decay_away_step(product, lr, weight_decay)
        assert 0 <= after <= product
        assert decay_away(after, m) >= decay_away(product, m)

    @PROPERTY
    @given(lr=LRS, weight_decay=DECAYS)
    def test_a_step_without_decay_changes_nothing(self, lr: float, weight_decay: float) -> None:
        assert decay_away_step(0.7, lr, 0.0) == decay_away_step(0.7, 0.0, weight_decay) == 0.7

    @pytest.mark.parametrize("m", [1e-4, 1, 16, 1e4])
    def test_underflow_of_the_product_ends_the_warmup(self, m: float) -> None:
        product = 1.0
        for _ in range(2_000):
            product = decay_away_step(product, lr=1.0, weight_decay=0.5)
        assert product == 0
        assert decay_away(product, m) == 1

    @pytest.mark.parametrize("product", [-1e-9, 1.0000001, math.nan, math.inf])
    def test_refuses_a_product_that_no_run_can_have(self, product: float) -> None:
        with pytest.raises(ValueError, match="product"):
            decay_away(product, m=16)

    @pytest.mark.parametrize(("lr", "weight_decay"), [(-0.1, 0.1), (0.1, -0.1), (10.0, 0.1), (math.nan, 0.1)])
    def test_refuses_a_step_that_flips_the_weights(self, lr: float, weight_decay: float) -> None:
        with pytest.raises(ValueError, match="below 1"):
            decay_away_step(1.0, lr, weight_decay)


def brute_force_relative_updates(schedule: list[tuple[float, float]], rho_0: float, update_rms: float) -> list[float]:
    """b eta_t / rho_t of eq. 30, written out: the squared weight RMS is summed up term by term, not recursively."""
    updates = []
    for t, (lr, _) in enumerate(schedule):
        shrink = [math.prod((1 - e * w) ** 2 for e, w in schedule[start:t]) for start in range(t + 1)]
        grown = sum((update_rms * e) ** 2 * shrink[tau + 1] for tau, (e, _) in enumerate(schedule[:t]))
        updates.append(update_rms * lr / math.sqrt(shrink[0] * rho_0**2 + grown))
    return updates


class TestEquilibriumFactor:
    @PROPERTY
    @given(
        t=st.integers(0, 10**5), m=MULTIPLIERS, lr=st.floats(1e-4, 0.1), weight_decay=st.floats(0.01, 0.5),
        ratio=st.floats(0.01, 100.0), update_rms=st.floats(0.1, 2.0),
    )  # fmt: skip
    def test_agrees_with_the_printed_equation_39(
        self, t: int, m: float, lr: float, weight_decay: float, ratio: float, update_rms: float
    ) -> None:
        a = 1 - lr * weight_decay
        rho_0 = ratio * update_rms * lr / math.sqrt(1 - a**2)
        left = a ** (2 * t)
        printed = math.sqrt((1 + (ratio**2 - 1) * left) / (1 + (m**2 * ratio**2 - 1) * left))
        assert equilibrium_factor(t, m, lr, weight_decay, rho_0, update_rms) == pytest.approx(printed, rel=1e-6)

    @PROPERTY
    @given(
        schedule=st.lists(st.tuples(st.floats(1e-5, 1.0), st.floats(0.0, 0.9)), min_size=1, max_size=12),
        m=ANY_MULTIPLIERS, rho_0=st.floats(1e-3, 10.0), update_rms=st.floats(0.1, 2.0),
    )  # fmt: skip
    def test_varying_schedule_is_the_ratio_of_two_relative_updates(
        self, schedule: list[tuple[float, float]], m: float, rho_0: float, update_rms: float
    ) -> None:
        scaled = [(lr / m, weight_decay * m) for lr, weight_decay in schedule]
        slow = brute_force_relative_updates(scaled, rho_0, update_rms)
        fast = brute_force_relative_updates(schedule, rho_0, update_rms)
        factors = list(equilibrium_factors(schedule, m, rho_0, update_rms))
        assert factors == pytest.approx([s / f for s, f in zip(slow, fast, strict=True)], rel=1e-9)

    @PROPERTY
    @given(m=ANY_MULTIPLIERS, lr=LRS, weight_decay=DECAYS, rho_0=st.floats(1e-3, 10.0))
    def test_constant_schedule_agrees_with_the_closed_form(
        self, m: float, lr: float, weight_decay: float, rho_0: float
    ) -> None:
        factors = equilibrium_factors(itertools.repeat((lr, weight_decay)), m, rho_0)  # endless: must be read lazily
        for t, factor in enumerate(itertools.islice(factors, 20)):
            assert factor == pytest.approx(equilibrium_factor(t, m, lr, weight_decay, rho_0), rel=1e-9)

    @PROPERTY
    @given(t=st.integers(0, 10**5), m=MULTIPLIERS, lr=st.floats(1e-4, 0.1), weight_decay=st.floats(0.01, 0.5))
    def test_from_equilibrium_it_is_the_decay_away_factor(
        self, t: int, m: float, lr: float, weight_decay: float
    ) -> None:
        left = (1 - lr * weight_decay) ** (2 * t)
        rho_0 = equilibrium_rho(lr, weight_decay)
        assert equilibrium_factor(t, m, lr, weight_decay, rho_0) == pytest.approx(decay_away(left, m), rel=1e-7)

    @PROPERTY
    @given(t=st.integers(0, 10**6), lr=LRS, weight_decay=DECAYS, rho_0=st.floats(1e-3, 10.0))
    def test_width_times_one_is_the_identity(self, t: int, lr: float, weight_decay: float, rho_0: float) -> None:
        assert equilibrium_factor(t, 1, lr, weight_decay, rho_0) == 1
        assert list(equilibrium_factors([(lr, weight_decay)] * 3, 1, rho_0)) == [1, 1, 1]

    @PROPERTY
    @given(m=MULTIPLIERS, lr=st.floats(0.001, 1), weight_decay=st.floats(0.01, 0.9), rho_0=st.floats(1e-3, 10.0))
    def test_rises_from_one_over_m_to_one(self, m: float, lr: float, weight_decay: float, rho_0: float) -> None:
        factors = [equilibrium_factor(t, m, lr, weight_decay, rho_0) for t in (0, 1, 10, 100, 10**4, 10**7)]
        assert factors[0] == pytest.approx(1 / m, rel=1e-12)
        assert all(later >= earlier * (1 - 1e-9) for earlier, later in itertools.pairwise(factors))
        assert factors[-1] == pytest.approx(1, rel=1e-9)

    def test_a_step_of_rate_zero_has_a_factor_too(self) -> None:
        assert list(equilibrium_factors([(0.0, 0.1), (0.0, 0.1)], m=4, rho_0=0.02)) == [0.25, 0.25]

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match="rho_0"):
            equilibrium_factor(0, m=2, lr=0.1, weight_decay=0.1, rho_0=0)
        with pytest.raises(ValueError, match="multiplier"):
            equilibrium_factor(0, m=-2, lr=0.1, weight_decay=0.1, rho_0=1)
        with pytest.raises(ValueError, match="multiplier"):
            next(equilibrium_factors([(0.1, 0.1)], m=0, rho_0=1))


class TestLinearWarmupLinearDecay:
    @PROPERTY
    @given(
        warmup=st.integers(0, 1_000), decay=st.integers(1, 10_000), t=st.integers(0, 12_000),
        peak=st.floats(0, 1), share=st.floats(0, 1),
    )  # fmt: skip
    def test_stays_between_its_ends(self, warmup: int, decay: int, t: int, peak: float, share: float) -> None:
        floor, total = peak * share, warmup + decay
        lr = linear_warmup_linear_decay(t, peak, warmup, total, floor)
        assert 0 <= lr <= peak * (1 + 1e-12)
        assert lr >= floor * (1 - 1e-12) or t < warmup

    @PROPERTY
    @given(warmup=st.integers(1, 1_000), decay=st.integers(1, 1_000))
    def test_is_continuous_at_both_joins(self, warmup: int, decay: int) -> None:
        def lr(t: float) -> float:
            return linear_warmup_linear_decay(t, 1.0, warmup, warmup + decay, 0.25)

        assert lr(warmup) == 1
        assert lr(warmup * (1 - 1e-9)) == pytest.approx(1, abs=1e-8)
        assert lr((warmup + decay) * (1 - 1e-9)) == pytest.approx(0.25, abs=1e-5)
        assert lr(warmup + decay) == lr(warmup + decay + 5) == 0.25

    def test_zero_length_warmup_starts_at_the_peak(self) -> None:
        assert linear_warmup_linear_decay(0, peak=0.3, warmup=0, total=10) == 0.3

    @pytest.mark.parametrize(
        ("t", "peak", "warmup", "total", "floor"),
        [(-1, 1, 2, 4, 0), (0, 1, -1, 4, 0), (0, 1, 4, 4, 0), (0, 1, 2, 4, 2), (0, 1, 2, 4, -1), (0, -1, 2, 4, 0)],
    )
    def test_refuses(self, t: int, peak: float, warmup: int, total: int, floor: float) -> None:
        with pytest.raises(ValueError, match="expected"):
            linear_warmup_linear_decay(t, peak, warmup, total, floor)


@PROPERTY
@given(m=MULTIPLIERS, product=PRODUCTS)
def test_narrowing_mirrors_widening(m: float, product: float) -> None:
    """Below m = 1 the factors start above 1 and come down to it: nothing is clamped."""
    assume(m > 1)
    assert decay_away(product, 1 / m) >= 1
    assert exp_increasing(3, 10, 1 / m) * exp_increasing(3, 10, m) == pytest.approx(1, rel=1e-12)
