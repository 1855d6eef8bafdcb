"""Rules under Muon: numbers worked out by hand, what must hold for every shape, and simulations of the norm model."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch.theory.updates import (
    Shapes,
    UpdateScale,
    accumulated_update_rms,
    initial_alignment_ratio,
    lr_multiplier,
    muon_scale,
    rule_under,
    scaled_multipliers,
    update_rms,
)
from megatron_patch.theory.width import RULES, Multipliers, Rule, multipliers

PROPERTY = settings(max_examples=50, deadline=None)
MUONS: tuple[UpdateScale, ...] = ("spectral", "unit_rms_norm", "shape_scaling")
sizes = st.integers(min_value=1, max_value=4096)
shapes = st.builds(Shapes, sizes, sizes, sizes.map(float), sizes.map(float))
muons = st.sampled_from(MUONS)
SCALED = [name for name in RULES if name != "none"]

# rule: LR and weight-decay factor of a matrix 16 times the base model's both ways; worked out on paper.
AT_16 = {
    "spectral": {
        "standard": (1 / 4, 1.0),
        "independent": (1 / 4, 4.0),
        "sqrt": (1 / 4, 4.0),
        "sqrt-decay": (1 / 4, 4.0),
        "no-decay": (1 / 4, 0.0),
    },
    "unit_rms_norm": {name: (1.0, 0.0 if name == "no-decay" else 1.0) for name in SCALED},
    "shape_scaling": {name: (1.0, 0.0 if name == "no-decay" else 1.0) for name in SCALED},
}


@pytest.mark.parametrize("scale", MUONS)
@pytest.mark.parametrize("rule", SCALED)
def test_golden_numbers_of_a_matrix_that_grows_both_ways(rule: str, scale: UpdateScale) -> None:
    for fan_out, fan_in in ((4, 1), (1, 1), (1, 4), (3, 2)):
        wider = Shapes(16 * 64 * fan_out, 16 * 64 * fan_in, 64.0 * fan_out, 64.0 * fan_in)
        got = scaled_multipliers(RULES[rule], "matrix", scale, wider, multipliers(RULES[rule], "matrix", 16.0))
        assert (got.lr, got.weight_decay) == pytest.approx(AT_16[scale][rule], rel=1e-12)


@pytest.mark.parametrize(
    ("rule", "scale", "lr"),
    [
        # A router of 8 experts, 16 times as many inputs: muP as under Adam, since its rank cannot grow with the width.
        ("independent", "spectral", 1 / 16),
        ("sqrt", "spectral", 1 / 4),
        # s = sqrt(K / C), and sqrt(K / C) / s does not change.
        ("independent", "unit_rms_norm", 1.0),
        # b = s / sqrt(C) = sqrt(8) / C; sqrt keeps eta b sqrt(C).
        ("sqrt", "unit_rms_norm", 4.0),
        # s = 1: eta sqrt(C / K) for a = 1, eta b sqrt(C) = eta for sqrt.
        ("independent", "shape_scaling", 1 / 4),
        ("sqrt", "shape_scaling", 1.0),
    ],
)
def test_golden_numbers_of_a_router(rule: str, scale: UpdateScale, lr: float) -> None:
    router = Shapes(fan_out=8, fan_in=1024, base_fan_out=8.0, base_fan_in=64.0)
    got = scaled_multipliers(RULES[rule], "matrix", scale, router, Multipliers(9.0, 9.0))
    assert got.lr == pytest.approx(lr, rel=1e-12)
    assert got.lr * got.weight_decay == pytest.approx(1.0, rel=1e-12)


@PROPERTY
@given(st.sampled_from(["standard", "independent", "sqrt-decay", "no-decay"]), muons, shapes)
def test_rules_with_a_1_are_the_spectral_condition(rule: str, scale: UpdateScale, both: Shapes) -> None:
    """eta * ‖u‖_2 * sqrt(C / K) is the same at every width (arXiv 2310.17813); ‖u‖_2 = s for a semi-orthogonal u."""
    factor = lr_multiplier(RULES[rule], scale, both)
    here = factor * muon_scale(scale, *both.here) * math.sqrt(both.fan_in / both.fan_out)
    base = muon_scale(scale, *both.base) * math.sqrt(both.base_fan_in / both.base_fan_out)
    assert here == pytest.approx(base, rel=1e-9)


@PROPERTY
@given(muons, shapes)
def test_sqrt_keeps_the_initial_relative_update_and_the_decay_per_step(scale: UpdateScale, both: Shapes) -> None:
    """‖eta u‖ / ‖W‖, from Frobenius norms: ‖u‖ = s sqrt(min(K, C)), ‖W‖ = sqrt(K C) / sqrt(C)."""

    def relative(fan_out: float, fan_in: float) -> float:
        return muon_scale(scale, fan_out, fan_in) * math.sqrt(min(fan_out, fan_in)) / math.sqrt(fan_out)

    got = scaled_multipliers(RULES["sqrt"], "matrix", scale, both, Multipliers(1.0, 1.0))
    assert got.lr * relative(*both.here) == pytest.approx(relative(*both.base), rel=1e-9)
    assert got.lr * got.weight_decay == pytest.approx(1.0, rel=1e-9)


@PROPERTY
@given(st.sampled_from(sorted(RULES)), shapes)
def test_an_entrywise_update_is_adams_rule(rule: str, both: Shapes) -> None:
    m = both.fan_in / both.base_fan_in
    assert lr_multiplier(RULES[rule], "entrywise", both) == pytest.approx(multipliers(RULES[rule], "matrix", m).lr)
    assert rule_under(RULES[rule], "entrywise") == RULES[rule]


@PROPERTY
@given(st.sampled_from(sorted(RULES)), st.sampled_from(("matrix", "embedding", "vector")), muons, sizes, sizes)
def test_at_the_base_width_nothing_changes(rule: str, role, scale: UpdateScale, fan_out: int, fan_in: int) -> None:
    same = Shapes(fan_out, fan_in, float(fan_out), float(fan_in))
    adams = multipliers(RULES[rule], role, 1.0)
    assert scaled_multipliers(RULES[rule], role, scale, same, adams) == adams


@PROPERTY
@given(st.floats(-4, 4), st.floats(-4, 4), muons, shapes)
def test_custom_exponents_are_meant_as_they_stand(a: float, b: float, scale: UpdateScale, both: Shapes) -> None:
    custom = Rule("custom", a, b, "")
    adams = multipliers(custom, "matrix", both.fan_in / both.base_fan_in)
    assert scaled_multipliers(custom, "matrix", scale, both, adams) == Multipliers(adams.lr, adams.weight_decay)
    assert rule_under(custom, scale) == custom


@pytest.mark.parametrize("scale", MUONS)
@pytest.mark.parametrize("rule", SCALED)
def test_the_exponents_told_are_those_used(rule: str, scale: UpdateScale) -> None:
    told = rule_under(RULES[rule], scale)
    wider = Shapes(1024, 256, 64.0, 16.0)
    got = scaled_multipliers(RULES[rule], "matrix", scale, wider, multipliers(RULES[rule], "matrix", 16.0))
    assert got.lr == pytest.approx(16**-told.lr_exponent)
    assert got.weight_decay == pytest.approx(16**told.wd_exponent if told.decays else 0.0)
    assert "derived" in told.source


def test_an_embedding_keeps_the_change_of_its_rows() -> None:
    """Positions [512, d] under Muon: eta * RMS(u) as in the base model; under Adam nothing changes either."""
    wider = Shapes(512, 256, 512.0, 64.0)
    adams = Multipliers(3.0, 0.5)
    assert scaled_multipliers(RULES["sqrt"], "embedding", "spectral", wider, adams) == adams
    # s = sqrt(512 / d), b = s / sqrt(512): 1/16 at d = 256, 1/8 at 64.
    assert scaled_multipliers(RULES["sqrt"], "embedding", "unit_rms_norm", wider, adams) == Multipliers(6.0, 0.5)


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="expected spectral"):
        muon_scale("entrywise", 4, 4)


@pytest.mark.parametrize("scale", MUONS)
@pytest.mark.parametrize(("fan_out", "fan_in"), [(48, 12), (12, 48), (32, 32), (4, 40)])
def test_size_and_alignment_of_a_semi_orthogonal_update(scale: UpdateScale, fan_out: int, fan_in: int) -> None:
    """From a matrix that is one: its RMS, and ‖u x‖ / (‖u‖ ‖x‖) of an input within its row space over 1/sqrt(C)."""
    import torch

    generator = torch.Generator().manual_seed(fan_out)
    left, _, right = torch.linalg.svd(
        torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float64), full_matrices=False
    )
    u = muon_scale(scale, fan_out, fan_in) * left @ right
    assert float(u.square().mean().sqrt()) == pytest.approx(update_rms(scale, fan_out, fan_in), rel=1e-12)
    x = right[0]
    alignment = float((u @ x).norm() / (u.norm() * x.norm()))
    assert alignment * math.sqrt(fan_in) == pytest.approx(initial_alignment_ratio(scale, fan_out, fan_in), rel=1e-12)


@pytest.mark.parametrize(("rows", "columns", "at_least"), [(96, 8, 0.92), (16, 16, 0.8)])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_weights_grow_by_correlated_updates_as_the_factor_says(
    momentum: float, rows: int, columns: int, at_least: float
) -> None:
    """Semi-orthogonal updates along an EMA of pure noise, 1000 steps from 0, against a sum of independent ones."""
    import torch

    generator = torch.Generator().manual_seed(0)
    steps = 1000
    ema = torch.zeros(rows, columns)
    w = torch.zeros(rows, columns)
    for step in range(-100, steps):  # the first 100 fill the EMA
        ema = momentum * ema + (1 - momentum) * torch.randn(rows, columns, generator=generator)
        left, _, right = torch.linalg.svd(ema, full_matrices=False)
        if step >= 0:
            w += left @ right
    one = math.sqrt(min(rows, columns) / (rows * columns))
    grown = float(w.square().mean().sqrt()) / (one * math.sqrt(steps))
    assert at_least < grown / accumulated_update_rms(momentum) < 1.02
