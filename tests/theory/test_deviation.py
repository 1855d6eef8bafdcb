"""Causes of a deviation: the exact factors, against the weight-norm model, and the words for each kind of mistake."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch.theory.deviation import UNKNOWN, Trained, _causes, likely_cause, times
from megatron_patch.theory.equilibrium import equilibrium_relative_update, equilibrium_rho, trajectory
from megatron_patch.theory.width import RULES, Rule

PROPERTY = settings(max_examples=50, deadline=None)
numbers = st.floats(min_value=1e-6, max_value=1e3)
LR, DECAY = 0.01, 0.1


def proxy(rms: float = 1.0, lr: float = LR, decay: float = DECAY) -> Trained:
    return Trained(lr, decay, 1.0, rms, RULES["none"])


def target(rule: str, m: float, rms: float = 1.0, lr: float = LR, decay: float = DECAY) -> Trained:
    r = RULES[rule]
    factor = 0.0 if rule == "no-decay" else m**r.wd_exponent
    return Trained(lr * m**-r.lr_exponent, decay * factor, m, rms, r)


@PROPERTY
@given(*[numbers] * 6)
def test_factors_multiply_to_the_ratio(
    lr: float, decay: float, rms: float, lr_p: float, decay_p: float, rms_p: float
) -> None:
    """b eta / rho over b eta_p / rho_p, whatever the numbers are; with weight decay and without."""
    for d, d_p in ((decay, decay_p), (0.0, decay_p), (decay, 0.0), (0.0, 0.0)):
        found = _causes(Trained(lr, d, 2.0, rms, RULES["sqrt"]), Trained(lr_p, d_p, 1.0, rms_p, RULES["none"]))
        expected = math.log((lr / rms) / (lr_p / rms_p))
        assert sum(log for log, _ in found) == pytest.approx(expected, abs=1e-9 * (1 + abs(expected)))


@pytest.mark.parametrize("m", [2.0, 8.0])
def test_in_equilibrium_the_product_is_the_only_cause(m: float) -> None:
    """Both at the norm of eq. 33: the ratio is that of eq. 36, and the weight norm is what is expected of it."""
    here = target("standard", m)
    here = Trained(here.lr, here.weight_decay, m, equilibrium_rho(here.lr, here.weight_decay), here.rule)
    there = proxy(equilibrium_rho(LR, DECAY))
    ratio = equilibrium_relative_update(here.lr, DECAY) / equilibrium_relative_update(LR, DECAY)
    assert ratio == pytest.approx(m**-0.5, rel=1e-3)
    assert likely_cause(ratio, here, there) == (
        f"its lr * weight decay is 1/{m:.0f} of the proxy's: the rule standard (a=1, b=0) lets it fall with m = "
        f"{m:.0f}; --width-scaling independent or sqrt keeps it"
    )


def test_implicit_warmup_is_called_by_its_name() -> None:
    """Independent scaling from the same initial weights: 1/m at first, which is the weight norm's doing alone."""
    here, there = target("independent", 4.0), proxy()
    mine, theirs = (next(trajectory([(t.lr, t.weight_decay)], rho_0=0.02)) for t in (here, there))
    text = likely_cause(mine.relative_update / theirs.relative_update, here, there)
    assert text == (
        "its weight norm is 4 times the one expected beside the proxy's from lr and weight decay: not in equilibrium "
        "yet (the implicit warmup of independent scaling)"
    )


CASES: list[tuple[str, float, Trained, Trained, float | None, tuple[str, ...]]] = [
    (
        "four times the LR",
        4.0,
        target("none", 1, lr=4 * LR),
        proxy(),
        None,
        (
            "its lr * weight decay is 4 times the proxy's: lr is 4 times the proxy's where the rule none asks for 1; "
            "check --lr, the schedule and --extra-warmup",
            "its weight norm is 1/2 of the one expected",
        ),
    ),
    (
        "weight decay",
        2.0,
        target("independent", 8, decay=4 * DECAY),
        proxy(rms=16),
        None,
        ("weight decay is 32 times the proxy's where the rule independent asks for 8; check --weight-decay",),
    ),
    (
        "a rule that lets it grow",
        1.5,
        Trained(LR, DECAY * 8, 8.0, 1.0, Rule("custom", 0.0, 1.0, "")),
        proxy(),
        None,
        ("the rule custom (a=0, b=1) lets it grow with m = 8",),
    ),
    ("noise", 2.0, target("independent", 1), proxy(), None, (UNKNOWN,)),
    ("the wrong direction", 2.0, target("standard", 8), proxy(1 / 8), None, (UNKNOWN,)),
    (
        "alignment",
        3.0,
        target("sqrt", 1),
        proxy(),
        2.9,
        (f"its alignment ratio is 2.9 times the proxy's, for which there is {UNKNOWN}",),
    ),
    (
        "no decay",
        1 / 8,
        target("no-decay", 8),
        proxy(),
        None,
        ("its lr is 1/8 of the proxy's: as the rule no-decay has it at m = 8",),
    ),
    (
        "no decay, small weights",
        4.0,
        target("no-decay", 8),
        proxy(rms=32.0),
        None,
        ("its weight RMS is 1/32 of the proxy's: weight decay 0 here, 0.1 in the proxy",),
    ),
    (
        "no decay in either",
        4.0,
        target("none", 1, decay=0.0),
        proxy(rms=4.0, decay=0.0),
        None,
        ("its weight RMS is 1/4 of the proxy's and there is no weight decay to settle it",),
    ),
]


@pytest.mark.parametrize(
    ("ratio", "here", "there", "aligned", "texts"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_words(ratio: float, here: Trained, there: Trained, aligned: float | None, texts: tuple[str, ...]) -> None:
    found = likely_cause(ratio, here, there, aligned)
    for text in texts:
        assert text in found
    assert (found == UNKNOWN) == (texts == (UNKNOWN,))


def test_an_unknown_weight_norm_is_no_cause() -> None:
    here, there = target("standard", 8), proxy()
    blind = Trained(here.lr, here.weight_decay, here.m, None, here.rule)
    assert "lets it fall" in likely_cause(0.3, blind, there)


@PROPERTY
@given(st.floats(min_value=1e-8, max_value=1e8))
def test_ratios_in_words_are_close(ratio: float) -> None:
    text = times(ratio)
    value = 1 / float(text[2:-3]) if text.endswith(" of") else float(text.removesuffix(" times"))
    assert value == pytest.approx(ratio, rel=0.011)
