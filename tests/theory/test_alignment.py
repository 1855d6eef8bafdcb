"""Alignment metrics against plain linear algebra, and the noise model against its own random experiment."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_patch.theory.alignment import (
    alignment,
    alignment_ratio,
    critical_batch_size,
    noise_model_update_alignment,
    noise_model_update_alignment_approximate,
    relative_representation_change,
    relative_update,
)

PROPERTY = settings(max_examples=50, deadline=None)  # no deadline: the machine may be busy
SUMSQS = st.floats(1e-30, 1e30)
SNRS = st.floats(0.0, 1e4)
UNUSABLE = (0.0, math.inf, math.nan)


def sumsq(matrix: NDArray[np.float64]) -> float:
    return float(np.sum(matrix**2))


@PROPERTY
@given(seed=st.integers(0, 2**32 - 1), fan_out=st.integers(1, 8), fan_in=st.integers(1, 8), tokens=st.integers(1, 8))
def test_metrics_of_random_matrices(seed: int, fan_out: int, fan_in: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    w, dw, x = (rng.standard_normal(shape) for shape in ((fan_out, fan_in), (fan_out, fan_in), (fan_in, tokens)))
    norm = np.linalg.norm
    alpha_w = alignment(sumsq(w @ x), sumsq(w), sumsq(x))
    alpha_dw = alignment(sumsq(dw @ x), sumsq(dw), sumsq(x))
    ratio = alignment_ratio(sumsq(dw @ x), sumsq(dw), sumsq(w @ x), sumsq(w))
    rwu = relative_update(sumsq(dw), sumsq(w))
    rrc = relative_representation_change(sumsq(dw @ x), sumsq(w @ x))
    assert alpha_w is not None and alpha_dw is not None and ratio is not None and rwu is not None and rrc is not None
    assert alpha_w == pytest.approx(norm(w @ x) / (norm(w) * norm(x)), rel=1e-12)
    assert 0 <= alpha_w <= 1 + 1e-12
    assert ratio == pytest.approx(alpha_dw / alpha_w, rel=1e-12)
    assert rwu == pytest.approx(norm(dw) / norm(w), rel=1e-12)
    assert rrc == pytest.approx(norm(dw @ x) / norm(w @ x), rel=1e-12)
    assert rrc == pytest.approx(ratio * rwu, rel=1e-12)  # eq. 4


def test_a_rank_one_matrix_is_fully_aligned_with_its_own_direction() -> None:
    u, v = np.array([[1.0], [2.0], [-3.0]]), np.array([[0.5, -1.0]])
    assert alignment(sumsq(u @ v @ v.T), sumsq(u @ v), sumsq(v.T)) == pytest.approx(1, rel=1e-15)


@PROPERTY
@given(output=SUMSQS, matrix=SUMSQS, inputs=SUMSQS, scale=st.floats(1e-10, 1e10))
def test_alignment_does_not_depend_on_the_scale_of_the_matrix(
    output: float, matrix: float, inputs: float, scale: float
) -> None:
    scaled = alignment(output * scale, matrix * scale, inputs)
    assert scaled == pytest.approx(alignment(output, matrix, inputs), rel=1e-12)


def test_huge_and_tiny_sums_neither_overflow_nor_vanish() -> None:
    assert alignment(1e300, 1e300, 1e300) == pytest.approx(1e-150)
    assert alignment(1e-300, 1e-300, 1e-300) == pytest.approx(1e150)


class TestMissingValues:
    def test_a_learning_rate_of_zero_has_no_update_alignment(self) -> None:
        assert alignment(output_sumsq=0.0, matrix_sumsq=0.0, input_sumsq=3.0) is None
        assert alignment_ratio(0.0, 0.0, weight_output_sumsq=2.0, weight_sumsq=1.0) is None
        assert relative_update(update_sumsq=0.0, weight_sumsq=1.0) == 0
        assert relative_representation_change(update_output_sumsq=0.0, weight_output_sumsq=2.0) == 0

    @pytest.mark.parametrize("metric", [relative_update, relative_representation_change])
    @pytest.mark.parametrize("bad", UNUSABLE)
    def test_of_two_sums(self, metric: Callable[[float, float], float | None], bad: float) -> None:
        assert metric(1.0, bad) is None
        assert bad == 0 or metric(bad, 1.0) is None

    @pytest.mark.parametrize("bad", UNUSABLE)
    def test_of_alignment(self, bad: float) -> None:
        assert alignment(1.0, bad, 1.0) is None
        assert alignment(1.0, 1.0, bad) is None
        assert bad == 0 or alignment(bad, 1.0, 1.0) is None

    @pytest.mark.parametrize("bad", UNUSABLE)
    def test_of_the_ratio(self, bad: float) -> None:
        assert alignment_ratio(1.0, bad, 1.0, 1.0) is None
        assert alignment_ratio(1.0, 1.0, bad, 1.0) is None
        assert bad == 0 or alignment_ratio(bad, 1.0, 1.0, 1.0) is None
        assert bad == 0 or alignment_ratio(1.0, 1.0, 1.0, bad) is None


class TestNoiseModel:
    def test_check_value(self) -> None:
        assert noise_model_update_alignment(fan_in=128, tokens=1024, snr=0.001) == pytest.approx(0.0990076, abs=5e-8)

    @pytest.mark.parametrize(
        ("fan_in", "tokens", "snr"), [(3, 5, 0.0), (3, 5, 0.5), (8, 2, 1.0), (16, 32, 0.03), (1, 4, 10.0)]
    )
    def test_exact_form_is_the_expectation_of_the_random_experiment(self, fan_in: int, tokens: int, snr: float) -> None:
        """Draw inputs = signal + noise, form dW and compare. 4 standard errors of the sampled ratio are allowed."""
        rng = np.random.default_rng(20251019)
        draws = 10_000
        x = math.sqrt(snr) * rng.standard_normal((draws, 1, fan_in)) + rng.standard_normal((draws, tokens, fan_in))
        dw = x.sum(axis=1)
        outputs = (np.einsum("dbc,dc->db", x, dw) ** 2).sum(axis=1)
        updates, inputs = (dw**2).sum(axis=1), (x**2).sum(axis=(1, 2))
        ratio = outputs.mean() / (updates.mean() * inputs.mean())
        deviations = outputs / outputs.mean() - updates / updates.mean() - inputs / inputs.mean()
        relative_error = deviations.std() / math.sqrt(draws)
        assert relative_error < 0.03
        predicted = noise_model_update_alignment(fan_in, tokens, snr) ** 2
        assert ratio == pytest.approx(predicted, rel=4 * relative_error)

    @PROPERTY
    @given(fan_in=st.integers(1, 10**5), tokens=st.integers(1, 10**7), snr=SNRS)
    def test_is_bounded(self, fan_in: int, tokens: int, snr: float) -> None:
        alpha = noise_model_update_alignment(fan_in, tokens, snr)
        assert 0 < alpha <= math.sqrt(1 + 2 / fan_in) * (1 + 1e-12)

    @PROPERTY
    @given(fan_in=st.integers(1, 10**5), snr=SNRS)
    def test_one_token_is_fully_aligned_with_its_own_update(self, fan_in: int, snr: float) -> None:
        assert noise_model_update_alignment(fan_in, 1, snr) == pytest.approx(math.sqrt(1 + 2 / fan_in), rel=1e-12)

    @PROPERTY
    @given(fan_in=st.integers(1_000, 10**5), tokens=st.integers(1_000, 10**7), snr=st.floats(0.0, 0.01))
    def test_approximation_is_close_for_wide_layers_and_large_batches(
        self, fan_in: int, tokens: int, snr: float
    ) -> None:
        exact = noise_model_update_alignment(fan_in, tokens, snr)
        assert noise_model_update_alignment_approximate(fan_in, tokens, snr) == pytest.approx(exact, rel=0.01)

    @PROPERTY
    @given(fan_in=st.integers(1, 10**5), snr=st.floats(1e-3, 10.0))
    def test_larger_batches_lower_the_alignment_to_a_floor(self, fan_in: int, snr: float) -> None:
        alphas = [noise_model_update_alignment_approximate(fan_in, 10**n, snr) for n in range(9)]
        assert alphas == sorted(alphas, reverse=True)
        assert alphas[-1] == pytest.approx(math.sqrt(1 / fan_in + snr / (1 + snr)), rel=1e-4)

    @PROPERTY
    @given(snr=st.floats(1e-6, 1e3))
    def test_at_the_critical_batch_size_noise_and_signal_terms_are_equal(self, snr: float) -> None:
        assert 1 / critical_batch_size(snr) == pytest.approx(snr / (1 + snr), rel=1e-12)

    def test_refuses(self) -> None:
        for fan_in, tokens, snr in ((0, 1, 0.1), (1, 0, 0.1), (1, 1, -0.1), (1, 1, math.nan)):
            with pytest.raises(ValueError, match="expected"):
                noise_model_update_alignment(fan_in, tokens, snr)
            with pytest.raises(ValueError, match="expected"):
                noise_model_update_alignment_approximate(fan_in, tokens, snr)
        for snr in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="positive"):
                critical_batch_size(snr)
