"""The report card against sweeps whose optima are known: parabolas in log2 of the LR, without noise."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch.fit.curves import Curve, is_sweep, label, study
from megatron_patch.fit.report_card import Grade, Shift, report_card, verdict, verdicts
from megatron_patch.runs.trial import DIVERGED, Trial
from tests.support.parabolas import BEND, GRID, PROXIES, PROXY, curve

BETWEEN = 0.007
"""Nats; no further is a monotone curve through the points of these parabolas from the parabola itself."""


def card(*curves: list[Trial]) -> dict[str, Grade]:
    """The grades of a sweep with one target width, by rule."""
    grades = report_card(study([trial for trials in curves for trial in trials]))
    assert len({g.curve.hidden_size for g in grades}) == 1
    return {g.label: g for g in grades}


@settings(max_examples=8, deadline=None)
@given(shift=st.floats(-2.0, 2.0))
def test_a_known_shift_and_what_it_costs_are_found(shift: float) -> None:
    grade = card(PROXIES, curve("sqrt", 128, PROXY + shift))["sqrt"]
    assert grade.shift is not None
    assert grade.shift.octaves == pytest.approx(shift, abs=0.01)
    assert grade.shift.low <= shift + 0.01 and shift - 0.01 <= grade.shift.high
    assert grade.m == 4
    assert grade.lost == pytest.approx(BEND / 2 * shift**2, abs=BETWEEN)
    assert grade.transferred == pytest.approx(3.0 + BEND / 2 * shift**2, abs=BETWEEN)
    assert grade.double == pytest.approx(BEND / 2 * ((1 - shift) ** 2 - shift**2), abs=2 * BETWEEN)
    assert grade.half == pytest.approx(BEND / 2 * ((1 + shift) ** 2 - shift**2), abs=2 * BETWEEN)
    assert (grade.remarks, grade.lost_at_least) == ("", False)


def test_rules_that_train_the_base_model_alike_share_its_curve() -> None:
    rules = ("none", "standard", "independent", "sqrt", "custom", "sqrt-decay", "no-decay")
    found = study([*PROXIES, *(trial for rule in rules for trial in curve(rule, 128, PROXY))])
    shared = {rule for rule in rules if found.proxy(rule) is not None}
    assert shared == {"none", "standard", "independent", "sqrt", "custom"}
    assert len({id(found.proxy(rule)) for rule in shared}) == 1
    alone = {g.label: g.remarks for g in report_card(found) if g.label not in shared}
    assert alone == dict.fromkeys(("sqrt-decay", "no-decay"), "no trials at the base width 32 with this rule")
    own = study([*PROXIES, *curve("sqrt-decay", 32, -8.0), *curve("sqrt-decay", 128, -8.0)])
    assert {g.label: g.shift.octaves for g in report_card(own) if g.shift} == {"sqrt-decay": pytest.approx(0, abs=0.01)}


def test_a_base_model_trained_under_several_rules_counts_once() -> None:
    found = study([*PROXIES, *curve("sqrt", 32, PROXY, 3.5), *curve("sqrt", 128, PROXY)])
    proxy = found.proxy("sqrt")
    assert proxy is not None
    assert [point.seeds for point in proxy.points] == [1] * len(GRID)


def test_the_base_width_is_that_of_the_flag_else_the_smallest() -> None:
    wide = curve("sqrt", 128, PROXY)
    assert study([*PROXIES, *wide]).base_hidden_size == 32
    flagged = [replace(t, arguments={"base_hidden_size": 64}) for t in wide]
    assert study([*PROXIES, *flagged]).base_hidden_size == 64


def test_an_extra_warmup_makes_another_rule_at_the_target_and_none_at_the_base() -> None:
    warm = [replace(t, arguments={"extra_warmup": "exp"}) for t in curve("standard", 128, PROXY)]
    assert label(warm[0]) == "standard + exp warmup"
    grades = card(PROXIES, curve("standard", 128, PROXY + 1), warm)
    assert {name: g.control for name, g in grades.items()} == {"standard": True, "standard + exp warmup": False}
    assert grades["standard + exp warmup"].shift is not None


def test_an_optimum_at_the_edge_has_no_shift_but_a_bound_on_what_is_lost() -> None:
    grade = card(PROXIES, curve("none", 128, -12.0))["none"]
    assert grade.shift is None
    assert "the lowest of the grid" in grade.remarks
    assert grade.lost_at_least
    assert grade.lost == pytest.approx(BEND / 2 * ((PROXY + 12) ** 2 - (-10 + 12) ** 2), abs=BETWEEN)


def test_where_no_fit_stands_no_loss_is_below_both_of_its_neighbours() -> None:
    """A parabola through the three would be at 3.4275 half-way, below anything measured."""
    target = [Trial(128, 2.0**x, loss, rule="sqrt") for x, loss in ((-8, 3.60), (-7, 3.45), (-6, 3.44))]
    grade = card(PROXIES, target)["sqrt"]
    assert grade.transferred is not None and 3.44 <= grade.transferred <= 3.45
    assert grade.lost is not None and 0 <= grade.lost <= 0.01 and grade.lost_at_least


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 3), st.one_of(st.floats(2, 9), st.just(math.nan))), min_size=2, max_size=9))
def test_losses_between_learning_rates_are_between_those_of_their_neighbours(steps: list[tuple[float, float]]) -> None:
    """Whatever was measured on whatever grid, unless a fit says otherwise; diverged ones have no loss next to them."""
    x = list(itertools.accumulate(gap for gap, _ in steps))
    found = Curve("sqrt", 128, tuple(Trial(128, 2.0**at, loss) for at, (_, loss) in zip(x, steps, strict=True)))
    losses = [math.inf if p.diverged else p.loss for p in found.points]
    fit = found.optimum
    for (left, right), (low, high) in zip(itertools.pairwise(x), itertools.pairwise(losses), strict=True):
        for share in (0.1, 0.5, 0.9):
            at = left + share * (right - left)
            if fit and abs(at - fit.log2_lr) <= 1:
                continue
            loss = found.loss_at(at)
            assert loss is not None
            if math.isinf(low) or math.isinf(high):
                assert loss == math.inf
            else:
                assert min(low, high) - 1e-9 <= loss <= max(low, high) + 1e-9


def test_what_twice_the_rate_costs_is_not_below_what_was_measured() -> None:
    """Step Law, 20B tokens: between 2.274 and 2.315 the parabolas were at 2.06, and doubling the LR seemed to pay."""
    losses = {-11: 2.30, -10: 2.28, -9: 2.274, -8: 2.315, -7: 6.6, -6: 6.5}
    found = Curve("none", 2048, tuple(Trial(2048, 2.0**x, loss) for x, loss in losses.items()))
    assert all(2.27 <= (found.loss_at(-9 + share) or 0) <= 2.315 for share in (0.1, 0.3, 0.5, 0.7, 0.9))


def test_what_was_not_swept_or_diverged_is_not_made_up() -> None:
    far = card(PROXIES, curve("sqrt", 128, -8.5, grid=range(-11, -6)))["sqrt"]
    assert far.shift is not None
    assert (far.lost, far.transferred, far.double) == (None, None, None)
    assert "was not swept" in far.remarks
    trials = curve("none", 128, -8.0)
    diverging = [replace(t, loss=DIVERGED) if t.lr > 2**-6.9 else t for t in trials]
    grade = card(PROXIES, diverging)["none"]
    assert grade.lost == grade.transferred == math.inf
    assert grade.half is None  # a difference to a loss that does not exist


def test_seeds_are_averaged_with_their_spread() -> None:
    seeds = [
        t for seed in (1, 2, 3) for t in curve("sqrt", 128, PROXY, seed=seed, noise=lambda x, s=seed: 0.01 * (s - 2))
    ]
    grade = card(PROXIES, seeds)["sqrt"]
    assert grade.curve.seeds == (3, 3)
    assert grade.curve.spread == pytest.approx(0.02)
    assert [p.loss for p in grade.curve.points] == pytest.approx([t.loss for t in curve("sqrt", 128, PROXY)])
    assert grade.lost == pytest.approx(0, abs=1e-3)


def test_only_trials_of_one_setting_make_curves() -> None:
    others = curve("none", 32, PROXY - 1, weight_decay=0.3) + curve("none", 32, PROXY, weight_decay=0.1)
    wide = curve("sqrt", 128, PROXY, weight_decay=0.1)
    found = study(others + wide)
    assert found.setting.weight_decay == 0.1
    assert found.left_out == len(GRID)
    (grade,) = report_card(found)
    assert grade.shift is not None
    assert grade.shift.near_zero


@pytest.mark.parametrize("at", [-9.3, -8.0, -6.9, -4.25])
def test_losses_between_learning_rates_are_close_to_those_of_the_parabola(at: float) -> None:
    found = Curve("sqrt", 128, tuple(curve("sqrt", 128, PROXY)))
    assert found.loss_at(at) == pytest.approx(3.0 + BEND / 2 * (at - PROXY) ** 2, abs=BETWEEN)
    assert found.loss_at(-10.5) is None
    assert found.loss_at(-3.9) is None


def test_intervals_of_both_optima_make_that_of_the_shift() -> None:
    noisy = [
        replace(t, loss=t.loss + 0.004 * (-1) ** i)
        for i, t in enumerate(curve("none", 32, PROXY, 3.5, [x / 2 for x in range(-20, -7)]))
    ]
    target = curve("sqrt", 128, PROXY, noise=lambda x: 0.003 * (-1) ** round(x))
    grade = card(noisy, target)["sqrt"]
    start, end = grade.proxy.optimum if grade.proxy else None, grade.curve.optimum
    assert start and end and grade.shift
    assert grade.shift.high - grade.shift.octaves == pytest.approx(
        math.hypot(end.high - end.log2_lr, start.log2_lr - start.low)
    )
    assert grade.shift.octaves - grade.shift.low == pytest.approx(
        math.hypot(end.log2_lr - end.low, start.high - start.log2_lr)
    )
    assert end.width < grade.shift.high - grade.shift.low


def test_the_verdict_says_what_the_numbers_say() -> None:
    good, bad = curve("sqrt", 128, PROXY, 3.0), curve("standard", 128, PROXY + 1.5, 3.0)
    text = verdict(list(card(PROXIES, good, bad).values()))
    assert "under sqrt cannot be told apart from the proxy's (shift" in text
    assert "under the control standard it shifts more (+1.50 [" in text
    assert "the lowest loss at the proxy's LR is sqrt's, 3.000, 0.111 below standard's (one seed" in text
    assert text.count(".") == text.count(".", 0, -1) + 1  # one sentence


def test_the_verdict_does_not_claim_what_the_intervals_do_not_show() -> None:
    def graded(name: str, shift: Shift | None) -> Grade:
        template = card(PROXIES, curve("sqrt", 128, PROXY))["sqrt"]
        return replace(template, curve=replace(template.curve, label=name), shift=shift)

    wide = verdict([graded("sqrt", Shift(0.1, -0.6, 0.8)), graded("standard", Shift(1.0, 0.3, 1.7))])
    assert "under the control standard it cannot be told apart from that, as the intervals overlap" in wide
    worse = verdict([graded("sqrt", Shift(1.0, 0.8, 1.2)), graded("none", Shift(0.1, -0.1, 0.3))])
    assert "under sqrt is not the proxy's" in worse
    assert "under the control none it shifts less" in worse
    alone = verdict([graded("sqrt", Shift(0.1, -0.6, 0.8))])
    assert "without a control that has an optimum, this does not show that the rule is the reason" in alone
    assert "no rule has an optimum" in verdict([graded("sqrt", None)])
    assert "nothing but controls" in verdict([graded("none", Shift(0.1, -0.6, 0.8))])


def test_verdicts_begin_with_the_widest() -> None:
    trials = [*PROXIES, *curve("sqrt", 64, PROXY), *curve("sqrt", 256, PROXY)]
    widest, other = verdicts(report_card(study(trials)))
    assert widest.startswith("At width 256 (8 times")
    assert other.startswith("At width 64 (2 times")


def test_trials_without_a_difference_are_no_sweep() -> None:
    assert not is_sweep([Trial(32, 0.01, 3.0, seed=seed) for seed in (1, 2)])
    assert is_sweep([Trial(32, lr, 3.0) for lr in (0.01, 0.02)])
