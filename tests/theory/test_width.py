"""The rule table of arXiv 2510.19093 and 2510.15262: numbers worked out by hand, then what holds for every number."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch.theory.width import ROLES, RULES, Multipliers, ParamSpec, Rule, multipliers, rule

# rule: (LR factor, weight-decay factor) of a matrix with m = 16; a and b of the papers put in by hand.
AT_16 = {
    "none": (1.0, 1.0),
    "standard": (1 / 16, 1.0),
    "independent": (1 / 16, 16.0),
    "sqrt": (1 / 4, 4.0),
    "sqrt-decay": (1 / 16, 4.0),
    "no-decay": (1 / 16, 0.0),
}
# rule: the power of m with which LR times weight decay goes.
PRODUCT_EXPONENT = {"none": 0.0, "standard": -1.0, "independent": 0.0, "sqrt": 0.0, "sqrt-decay": -0.5}

PROPERTY = settings(max_examples=50, deadline=None)  # no deadline: the machine may be busy
widths = st.floats(min_value=1 / 64, max_value=4096)
exponents = st.floats(min_value=-4, max_value=4)
rules = st.sampled_from(sorted(RULES))


def test_every_preset_has_a_row_here():
    """A preset added without its numbers would go untested."""
    assert set(RULES) == set(AT_16)
    assert ROLES == ("matrix", "output", "embedding", "vector")


@pytest.mark.parametrize("role", ["matrix", "output"])
@pytest.mark.parametrize("rule", AT_16)
def test_golden_numbers_of_what_scales(rule: str, role: str):
    """A swapped exponent or sign shows at m = 16, where every preset has a pair of its own; eps stays as it is."""
    assert multipliers(RULES[rule], role, 16.0) == Multipliers(*AT_16[rule], eps=1.0)


@pytest.mark.parametrize(
    ("rule", "lr", "weight_decay"),
    [("standard", 1 / 1.5, 1.0), ("independent", 1 / 1.5, 1.5), ("sqrt", 0.816496580927726, 1.224744871391589)],
)
def test_golden_numbers_of_a_ratio_that_is_no_power_of_two(rule: str, lr: float, weight_decay: float):
    """m = 1.5, as an MLP that grew less than the hidden size has: sqrt(2/3) and sqrt(3/2)."""
    got = multipliers(RULES[rule], "matrix", 1.5)
    assert (got.lr, got.weight_decay) == pytest.approx((lr, weight_decay), rel=1e-15)


def test_golden_numbers_of_custom_exponents():
    """a = 1/4 and b = 3/4 at m = 16: 1/2 and 8."""
    assert multipliers(Rule("custom", 0.25, 0.75, ""), "matrix", 16.0) == Multipliers(0.5, 8.0)


@pytest.mark.parametrize(
    ("rule", "decay"),
    [("none", 1), ("standard", 1), ("independent", 1), ("sqrt", 1), ("sqrt-decay", 0), ("no-decay", 0)],
)
def test_embeddings_keep_their_lr_and_decay_as_the_table_says(rule: str, decay: float):
    """[F] freezes the embedding without decay, [K] decays it at the base rate; neither scales it with m."""
    assert multipliers(RULES[rule], "embedding", 16.0) == Multipliers(1.0, decay)


@PROPERTY
@given(rule=rules, m=widths, eps=st.booleans(), output=st.booleans(), decay=st.none() | st.floats(0, 10))
def test_vectors_are_frozen_and_never_decay(rule, m, eps, output, decay):
    """Gains and biases: no width, no decay, no eps, whatever the switches for other classes say."""
    got = multipliers(
        RULES[rule], "vector", m, vector_lr=0.5, scale_eps=eps, scale_output=output, embedding_weight_decay=decay
    )
    assert got == Multipliers(0.5, 0.0, 1.0)


@PROPERTY
@given(rule=rules, role=st.sampled_from(ROLES), eps=st.booleans())
def test_width_of_the_base_changes_nothing_but_switched_off_decay(rule, role, eps):
    """m = 1 is the identity: a proxy trained under a rule is the proxy trained without."""
    got = multipliers(RULES[rule], role, 1.0, scale_eps=eps)
    decays = {"vector": 0.0, "embedding": 0.0 if rule in ("sqrt-decay", "no-decay") else 1.0}
    assert got == Multipliers(1.0, decays.get(role, 0.0 if rule == "no-decay" else 1.0), 1.0)


@PROPERTY
@given(rule=st.sampled_from(sorted(PRODUCT_EXPONENT)), m=widths)
def test_shrink_per_step_goes_with_its_power_of_m(rule, m):
    """eta*lambda ~ m^(b-a): the whole point of the independent rules is that this power is 0."""
    got = multipliers(RULES[rule], "matrix", m)
    assert math.isclose(got.lr * got.weight_decay, m ** PRODUCT_EXPONENT[rule], rel_tol=1e-12)


@PROPERTY
@given(a=exponents, b=exponents, m=widths)
def test_product_of_custom_exponents(a, b, m):
    """The same for any two exponents."""
    got = multipliers(Rule("custom", a, b, ""), "output", m)
    assert math.isclose(got.lr * got.weight_decay, m ** (b - a), rel_tol=1e-11)


@PROPERTY
@given(a=exponents, b=exponents, first=widths, second=widths)
def test_widening_twice_is_widening_once(a, b, first, second):
    """m1 then m2 equals m1*m2: transfer through an intermediate model gives the same run."""
    rule = Rule("custom", a, b, "")
    one, two = multipliers(rule, "matrix", first, scale_eps=True), multipliers(rule, "matrix", second, scale_eps=True)
    both = multipliers(rule, "matrix", first * second, scale_eps=True)
    assert math.isclose(one.lr * two.lr, both.lr, rel_tol=1e-11)
    assert math.isclose(one.weight_decay * two.weight_decay, both.weight_decay, rel_tol=1e-11)
    assert math.isclose(one.eps * two.eps, both.eps, rel_tol=1e-11)


@PROPERTY
@given(rule=st.sampled_from(["standard", "independent", "sqrt", "sqrt-decay", "no-decay"]), m=st.floats(1.01, 4096))
def test_wider_means_smaller_lr_and_no_smaller_decay(rule, m):
    """A sign error in an exponent would pass every test that only compares products."""
    got = multipliers(RULES[rule], "matrix", m)
    assert got.lr < 1
    assert got.weight_decay == 0 if rule == "no-decay" else got.weight_decay >= 1
    narrower = multipliers(RULES[rule], "matrix", 1 / m)
    assert narrower.lr > 1


def test_switches():
    """eps follows the LR; the LM head can stay behind, with its decay only where the rule decays at all."""
    assert multipliers(RULES["sqrt"], "matrix", 16.0, scale_eps=True) == Multipliers(0.25, 4.0, 0.25)
    assert multipliers(RULES["independent"], "output", 16.0, scale_output=False, scale_eps=True) == Multipliers(1, 1, 1)
    assert multipliers(RULES["no-decay"], "output", 16.0, scale_output=False) == Multipliers(1.0, 0.0, 1.0)
    assert multipliers(RULES["independent"], "matrix", 16.0, scale_output=False) == Multipliers(1 / 16, 16.0)
    assert multipliers(RULES["sqrt"], "embedding", 16.0, scale_eps=True) == Multipliers(1.0, 1.0, 1.0)


def test_vector_lr_and_embedding_decay_touch_their_own_classes_only():
    """The two-phase sweep freezes the LR of embeddings and vectors at its own optimum; matrices must not follow."""
    options = {"vector_lr": 3.0, "embedding_weight_decay": 0.25}
    assert multipliers(RULES["sqrt-decay"], "embedding", 16.0, **options) == Multipliers(3.0, 0.25)
    assert multipliers(RULES["sqrt-decay"], "vector", 16.0, **options) == Multipliers(3.0, 0.0)
    assert multipliers(RULES["sqrt-decay"], "matrix", 16.0, **options) == Multipliers(1 / 16, 4.0)
    assert multipliers(RULES["sqrt-decay"], "output", 16.0, scale_output=False, **options) == Multipliers(1.0, 1.0)


@pytest.mark.parametrize(("role", "m"), [("matrix", 2.75), ("output", 2.75), ("embedding", 1.0), ("vector", 1.0)])
def test_multiplier_of_a_parameter_is_that_of_its_own_fan_in(role, m):
    """176 of 64: a base fan-in need not divide the fan-in; embeddings and vectors have no multiplier."""
    assert ParamSpec("w", (24, 176), role, fan_in=176, base_fan_in=64.0).m == m


def test_a_rule_by_its_name():
    assert all(rule(name) is RULES[name] for name in RULES)
    custom = rule("custom", 0.25, 0.75)
    assert (custom.name, custom.lr_exponent, custom.wd_exponent) == ("custom", 0.25, 0.75)
    with pytest.raises(KeyError):
        rule("cubic")
    with pytest.raises(ValueError, match="two numbers"):
        rule("custom", 1.0)
