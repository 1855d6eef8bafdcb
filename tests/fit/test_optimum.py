"""Planted optima are found, within the interval about as often as it says, and what cannot be told is refused."""

import contextlib
import math
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_patch.fit.found import NoOptimum, Optimum
from megatron_patch.fit.optimum import fit_lr, fit_lr_weight_decay
from megatron_patch.runs.trial import Trial
from tests.support.planted import OPTIMUM, SHAPES, curve, surface


def with_loss(trial: Trial, loss: float) -> Trial:
    return Trial(trial.hidden_size, trial.lr, loss, trial.weight_decay, seed=trial.seed)


def refused(trials: Sequence[Trial]) -> NoOptimum:
    with pytest.raises(NoOptimum) as caught:
        fit_lr(trials)
    return caught.value


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seeds", [1, 3])
def test_planted_optimum(shape: str, seeds: int) -> None:
    found = fit_lr(curve(shape, seeds=seeds))
    assert found.log2_lr == pytest.approx(OPTIMUM, abs=0.1)
    assert found.loss == pytest.approx(3, abs=0.01)
    assert found.points == 7 * seeds


def test_a_parabola_is_found_exactly() -> None:
    found = fit_lr(curve())
    assert found.log2_lr == pytest.approx(OPTIMUM, abs=1e-6)
    assert found.curvature == pytest.approx(0.1, rel=1e-3)
    assert found.low <= OPTIMUM <= found.high and found.width < 0.2
    mean_excess = np.mean([0.05 * octaves**2 for octaves in np.linspace(-1, 1, 2001)])
    assert found.sensitivity.nats == pytest.approx(mean_excess, rel=2e-3)
    assert found.sensitivity.low <= mean_excess <= found.sensitivity.high


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "seeds"), [(0.003, 1), (0.006, 3)])
@pytest.mark.parametrize("shape", ["parabola", "exponential"])
def test_noise(shape: str, noise: float, seeds: int) -> None:
    """Of 25 noisy sweeps, the typical error is below 0.1 octave and the 90% interval holds the truth as it should."""
    generator = np.random.default_rng(1)
    errors, hits, bent = [], 0, 0
    truth = np.mean([SHAPES[shape](octaves) for octaves in np.linspace(-1, 1, 2001)])
    for _ in range(25):
        at = OPTIMUM + generator.uniform(-0.5, 0.5)
        found = fit_lr(curve(shape, seeds=seeds, noise=noise, at=at, generator=generator))
        errors.append(abs(found.log2_lr - at))
        hits += found.low <= at <= found.high
        bent += found.sensitivity.low <= truth <= found.sensitivity.high
    assert np.median(errors) < 0.05 and np.quantile(errors, 0.9) < 0.1
    assert hits >= 19 and bent >= 19


@pytest.mark.parametrize("place", range(1, 6))
def test_an_outlier_is_left_out(place: int) -> None:
    trials = curve(lrs=range(-10, -1), noise=0.002)
    trials[place + 1] = with_loss(trials[place + 1], trials[place + 1].loss + 0.5)
    found = fit_lr(trials)
    assert found.dropped == (trials[place + 1],)
    assert found.log2_lr == pytest.approx(OPTIMUM, abs=0.1)


def test_outliers_among_seeds() -> None:
    trials = curve(seeds=3, noise=0.003)
    for i, offset in ((4, 0.4), (13, -0.3)):
        trials[i] = with_loss(trials[i], trials[i].loss + offset)
    found = fit_lr(trials)
    assert set(found.dropped) == {trials[4], trials[13]}
    assert found.log2_lr == pytest.approx(OPTIMUM, abs=0.1)


def test_nothing_is_left_out_of_a_sweep_without_outliers() -> None:
    generator = np.random.default_rng(3)
    lost = [len(fit_lr(curve(seeds=2, noise=0.005, generator=generator)).dropped) for _ in range(20)]
    assert sum(lost) <= 1


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_diverged_runs_above_the_optimum_do_not_matter(loss: float) -> None:
    trials = [*curve(lrs=range(-9, -4)), Trial(32, 2.0**-4, loss), Trial(32, 2.0**-3, loss)]
    assert fit_lr(trials).log2_lr == pytest.approx(OPTIMUM, abs=0.01)


def test_the_order_of_the_trials_does_not_matter() -> None:
    trials = curve(seeds=2, noise=0.004)
    assert fit_lr(trials[::-1]).log2_lr == pytest.approx(fit_lr(trials).log2_lr, abs=1e-9)


def test_a_parabola_shifted_and_lifted_moves_the_optimum_with_it() -> None:
    base = curve(noise=0.003)
    moved = [with_loss(Trial(32, 4 * t.lr, 0.0), t.loss + 1) for t in base]
    assert fit_lr(moved).log2_lr == pytest.approx(fit_lr(base).log2_lr + 2, abs=0.01)


def test_three_points_give_the_bracket() -> None:
    found = fit_lr(curve(lrs=(-7, -6, -5)))
    assert found.log2_lr == pytest.approx(OPTIMUM, abs=1e-6)
    assert (found.low, found.high) == (-7, -5)
    assert found.sensitivity.text == "0.0167"  # a third of 0.05, without an interval


@pytest.mark.parametrize(
    ("trials", "reason", "fix"),
    [
        (curve(lrs=range(-10, -6)), "0.007812 is the highest of the grid", "add 0.01562 and 0.03125"),
        (curve(lrs=range(-6, -1)), "0.01562 is the lowest of the grid", "add 0.007812 and 0.003906"),
        (curve(lrs=(-7, -6)), "2 of the learning rates have a finite loss", "train more learning rates"),
        ([Trial(32, 0.1, math.nan)], "0 of the learning rates", "lower ones"),
        (
            [*curve(lrs=(-8, -7, -6)), Trial(32, 2.0**-5, math.nan)],
            "0.01562 is the highest that did not diverge (0.03125 did)",
            "add 0.0221",
        ),
        ([with_loss(t, 6 - t.loss) for t in curve()], "the wrong sign of curvature", "add"),
        ([*curve(), Trial(32, 0.5, 3.0, weight_decay=0.1)], "differ in weight_decay", "one by one"),
        (curve(lrs=(-10, -6, -2)), "is wider than 2 octaves", "more learning rates around the best"),
    ],
)
def test_refusals(trials: list[Trial], reason: str, fix: str) -> None:
    error = refused(trials)
    assert reason in error.reason
    assert fix in error.fix


def test_noise_without_a_minimum_is_refused() -> None:
    """Mostly: seven noisy losses can look like a curve."""
    generator = np.random.default_rng(5)
    accepted = 0
    for _ in range(20):
        with contextlib.suppress(NoOptimum):
            fit_lr([Trial(32, 2.0**x, 3 + 0.02 * generator.normal()) for x in range(-9, -2)])
            accepted += 1
    assert accepted <= 4


@pytest.mark.parametrize("lrs", [range(-9, -2), [x / 2 for x in range(-22, -2)], [x / 8 for x in range(-80, 0)]])
def test_noise_at_more_places_is_refused_as_well(lrs: Sequence[float]) -> None:
    generator = np.random.default_rng(6)
    accepted = 0
    for _ in range(20):
        with contextlib.suppress(NoOptimum):
            fit_lr([Trial(32, 2.0**x, 3 + 0.02 * generator.normal()) for x in lrs])
            accepted += 1
    assert accepted <= 4


def test_more_learning_rates_near_the_minimum_do_not_hide_it() -> None:
    """They vary little among themselves, and so does the whole; each sweep has its own noise."""
    found = {False: 0, True: 0}
    for seed in range(20):
        for halves in found:
            lrs = sorted({*range(-10, -4), *([-8.5, -7.5, -6.5] if halves else [])})
            generator = np.random.default_rng(seed)
            with contextlib.suppress(NoOptimum):
                fit_lr(curve(lrs=lrs, noise=0.03, generator=generator, at=-7.5))
                found[halves] += 1
    assert found[True] >= found[False] >= 15


def test_a_refusal_has_the_best_point() -> None:
    partial = refused(curve(lrs=range(-10, -6))).partial
    assert isinstance(partial, Optimum)
    assert partial.lr == 2**-7 and math.isnan(partial.curvature)


@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_ridge(noise: float) -> None:
    found = fit_lr_weight_decay(surface(noise=noise))
    assert found.log2_lr == pytest.approx(-6.15, abs=0.1)
    assert found.log2_weight_decay == pytest.approx(-1.15, abs=0.1)
    assert found.direction == pytest.approx((0.7071, -0.7071), abs=0.05)
    assert found.is_ridge and found.across / found.along == pytest.approx(5, rel=0.2)
    assert found.low <= -6.15 <= found.high
    assert found.loss == pytest.approx(3, abs=0.01)


def test_a_ridge_without_a_lowest_point_is_refused() -> None:
    with pytest.raises(NoOptimum, match="--weight-decay"):
        fit_lr_weight_decay(surface(along=0.0))


@pytest.mark.parametrize(
    ("trials", "reason"),
    [
        (surface(decays=(0, 1)), "2 positive weight decays"),
        (surface(decays=range(0, 4)), "weight decay"),
        ([*surface(lrs=(-7, -6), decays=(0, 1)), *surface(lrs=(-5,), decays=(2,))], "5 pairs"),
        (surface(lrs=range(-12, -8)), "add 0.0039"),
    ],
)
def test_surfaces_that_are_refused(trials: list[Trial], reason: str) -> None:
    with pytest.raises(NoOptimum, match=reason):
        fit_lr_weight_decay(trials)
