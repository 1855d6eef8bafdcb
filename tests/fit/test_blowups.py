"""Runs that blew up to a finite loss count as diverged; losses that rise smoothly, however high, do not."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_patch.fit.blowups import settle
from megatron_patch.fit.curves import Curve
from megatron_patch.fit.found import NoOptimum
from megatron_patch.fit.optimum import fit_lr, fit_lr_weight_decay
from megatron_patch.runs.trial import Trial
from tests.support.planted import OPTIMUM, SHAPES, curve, surface

MARIN = ((0.004, 3.272), (0.008, 3.264), (0.016, 7.760), (0.032, 7.784))
"""marin-community/marin 122c5018, AdamW at width 768: the two highest LRs blew up."""


def trials(losses: Sequence[tuple[float, float]], **settings: object) -> list[Trial]:
    return [Trial(768, lr, loss, **settings) for lr, loss in losses]  # type: ignore[arg-type]


def blown(losses: Sequence[tuple[float, float]], **settings: object) -> list[float]:
    """The LRs of the runs that blew up."""
    return [t.lr for t in settle(trials(losses, **settings)).blown]


def test_a_real_sweep_that_blew_up_is_refused_with_its_losses_named() -> None:
    """The fit through all four was at 0.005548, at a loss of 2.272, a nat below anything measured."""
    with pytest.raises(NoOptimum) as caught:
        fit_lr(trials(MARIN))
    assert "2 of the learning rates have a finite loss (0.004, 0.008; 2 runs diverged)" in caught.value.reason
    assert "counted as diverged, as they blew up: loss 7.76 at LR 0.016, 7.784 at LR 0.032" in caught.value.reason
    assert caught.value.partial is not None and caught.value.partial.lr == 0.008
    assert [t.loss for t in caught.value.partial.blown] == [7.760, 7.784]


@pytest.mark.parametrize("stuck", [10.98, 7.7, 4.6])
def test_runs_stuck_at_a_plateau_are_as_if_they_had_ended_in_nan(stuck: float) -> None:
    sweep = curve(lrs=range(-12, -5), at=-9.3)
    ended = [replace(t, loss=stuck) if t.lr > 2**-7.5 else t for t in sweep]
    lost = [replace(t, loss=math.nan) if t.lr > 2**-7.5 else t for t in sweep]
    found, expected = fit_lr(ended), fit_lr(lost)
    assert (found.log2_lr, found.low, found.high) == (expected.log2_lr, expected.low, expected.high)
    assert found.log2_lr == pytest.approx(-9.3, abs=0.1)
    assert [t.loss for t in found.blown] == [stuck, stuck] and expected.blown == ()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("at", [-10.5, -9.5, OPTIMUM])
@pytest.mark.parametrize("step", [0.5, 1])
def test_a_smooth_rise_is_no_blow_up_however_high(shape: str, at: float, step: float) -> None:
    grid = [-10 + step * i for i in range(int(8 / step) + 1)]
    assert settle(curve(shape, lrs=grid, at=at)).blown == ()  # type: ignore[arg-type]


@pytest.mark.parametrize("base", ["lowest", "highest"])
def test_low_learning_rates_learn_little_and_have_not_diverged(base: str) -> None:
    """Gemstones at width 256: the lowest LR is 1.5 nats above the best."""
    losses = [(1e-4, 5.144), (5e-4, 4.093), (1e-3, 3.873), (5e-3, 3.621), (1e-2, 3.773), (5e-2, 7.727)]
    assert blown(losses) == [0.05]
    assert blown(losses[:4]) == []


def test_a_run_that_ends_where_it_began_has_diverged_where_the_vocabulary_is_known() -> None:
    losses = [(2.0**-9, 5.02), (2.0**-8, 4.9), (2.0**-7, 5.1), (2.0**-6, 5.56), (2.0**-5, 5.57)]
    assert blown(losses) == []  # two in a row may be the slope
    assert blown(losses, arguments={"vocab_size": 256}) == [2.0**-6, 2.0**-5]
    assert blown(losses, arguments={"vocab_size": 250, "padded_vocab_size": 50_000}) == []
    below = [(2.0**-20, 5.56), (2.0**-19, 5.55), *losses[:3]]  # learning rates too low to learn anything
    assert blown(below, arguments={"vocab_size": 256}) == []


def test_one_seed_that_blew_up_is_left_out_and_the_others_count() -> None:
    sweep = curve(seeds=3, noise=0.002)
    place = next(i for i, t in enumerate(sweep) if t.lr == 2.0**-5)
    sweep[place] = replace(sweep[place], loss=7.0)
    found = fit_lr(sweep)
    assert found.blown == (sweep[place],)
    assert found.log2_lr == pytest.approx(OPTIMUM, abs=0.1)
    point = next(p for p in Curve("sqrt", 32, tuple(sweep)).points if p.lr == 2.0**-5)
    assert (point.seeds, point.diverged, point.blown) == (3, 1, (7.0,))
    assert point.loss < 3.2


def test_a_surface_with_a_corner_that_blew_up_is_as_if_it_had_ended_in_nan() -> None:
    sweep = surface(noise=0.002)
    ended = [replace(t, loss=9.0 + t.lr) if t.lr >= 2**-4 else t for t in sweep]
    found = fit_lr_weight_decay(ended)
    expected = fit_lr_weight_decay([replace(t, loss=math.nan) if t.lr >= 2**-4 else t for t in sweep])
    assert (found.log2_lr, found.log2_weight_decay) == (expected.log2_lr, expected.log2_weight_decay)
    assert len(found.blown) == sum(t.lr >= 2**-4 for t in sweep)


def test_a_curve_shows_what_blew_up_as_diverged() -> None:
    found = Curve("sqrt", 768, tuple(trials([(0.002, 3.31), *MARIN])))
    assert [p.diverged for p in found.points] == [0, 0, 0, 1, 1]
    assert found.points[-1].blown == (7.784,)
    assert found.loss_at(math.log2(0.016)) == math.inf


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        # a rise that is too small for a blow-up, and a minimum where nothing was measured
        ([3.272, 3.264, 3.74, 3.75], "below the lowest that was measured, 3.264"),
        ([3.02, 3.0, 3.2, 3.2], "cannot tell the best LR as closely"),
    ],
)
def test_an_optimum_too_good_to_be_true_is_refused(losses: list[float], reason: str) -> None:
    with pytest.raises(NoOptimum, match=reason) as caught:
        fit_lr([Trial(32, 2.0**x, loss) for x, loss in zip(range(-8, -4), losses, strict=True)])
    assert caught.value.fix.startswith("train LR 0.00")
