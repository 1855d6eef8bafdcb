"""Seed offsets: known ones are found and taken out, and nothing else is."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.fit.optimum import fit_lr
from megatron_patch.fit.seeds import aligned, informative
from megatron_patch.runs.trial import Trial


def curve(seed: int, exponents: range, offset: float = 0.0) -> list[Trial]:
    return [Trial(64, 2.0**e, 3.0 + 0.05 * (e + 6.3) ** 2 + offset, seed=seed) for e in exponents]


def test_seeds_at_the_optimum_alone_do_not_bend_the_curve() -> None:
    whole = curve(1, range(-9, -3))
    with_seeds = whole + curve(2, range(-7, -6), 0.05) + curve(3, range(-7, -6), 0.05)
    assert fit_lr(with_seeds).log2_lr == pytest.approx(-6.3, abs=1e-6)
    # A plain mean over seeds would move the optimum: the same losses under one seed do.
    assert abs(fit_lr([replace(t, seed=1) for t in with_seeds]).log2_lr + 6.3) > 0.05


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=4),
    st.lists(st.floats(1, 10), min_size=3, max_size=6),
)
def test_a_complete_table_keeps_its_means_but_for_a_constant(offsets: list[float], levels: list[float]) -> None:
    trials = [
        Trial(64, 2.0**-e, loss + offset, seed=seed)
        for e, loss in enumerate(levels)
        for seed, offset in enumerate(offsets)
    ]
    result = aligned(trials)
    assert sum(t.loss for t in result) == pytest.approx(sum(t.loss for t in trials))
    shifts = {round(t.loss - levels[round(-math.log2(t.lr))], 9) for t in result}
    assert max(shifts) - min(shifts) < 1e-6
    assert [t.loss for t in aligned(result)] == pytest.approx([t.loss for t in result])


def test_a_seed_that_shares_nothing_and_diverged_trials_stay_as_they_are() -> None:
    alone = curve(2, range(-12, -10), 5.0)
    lost = Trial(64, 1.0, math.nan, seed=1)
    result = aligned([*curve(1, range(-9, -5)), *alone, lost])
    assert [t.loss for t in result[-3:-1]] == [t.loss for t in alone]
    assert result[-1] is lost
    assert aligned(curve(1, range(-9, -5))) == tuple(curve(1, range(-9, -5)))


def test_one_outlier_does_not_move_the_rest_of_its_seed() -> None:
    first, second = curve(1, range(-9, -3)), curve(2, range(-9, -3), 0.1)
    second[2] = replace(second[2], loss=second[2].loss + 3.0)
    result = aligned(first + second)
    assert [b.loss - a.loss for a, b in zip(result[:6], result[6:], strict=True)] == pytest.approx(
        [0, 0, 3.0, 0, 0, 0], abs=1e-9
    )


def test_a_seed_that_only_tells_its_own_offset_is_no_measure_of_noise() -> None:
    whole, once, twice = curve(1, range(-9, -3)), curve(2, range(-6, -5), 0.1), curve(3, range(-7, -5), 0.1)
    assert informative(whole + once + twice) == whole + twice
    elsewhere = curve(2, range(-12, -11), 0.1)  # an LR of its own
    assert informative(whole + elsewhere) == whole + elsewhere
    noisy = [replace(t, loss=t.loss + (-1) ** i * 0.004) for i, t in enumerate(whole)]
    assert fit_lr(noisy + once).width == fit_lr(noisy).width
    each_its_own = [replace(t, seed=i) for i, t in enumerate(whole + curve(1, range(-9, -3), 0.01))]
    assert informative(each_its_own) == each_its_own == list(aligned(each_its_own))
