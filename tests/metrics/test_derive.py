"""Lines from sums: null where there is nothing to say, means over experts, the forecast beside the measurement."""

import math

import pytest

from megatron_patch.files.lines import EquilibriumLine, SublayerLine, keys
from megatron_patch.metrics.derive import KEYS, alignment_line, equilibrium_line, expert_means, sublayer_line
from megatron_patch.metrics.forecast import NormForecast
from megatron_patch.metrics.views import Row
from megatron_patch.theory.equilibrium import trajectory

ROW = Row("layer", "column", fan_in=4, fan_out=9, m=2.0)
# ‖W‖^2, ‖dW‖^2, ‖X‖^2, ‖W X‖^2, ‖dW X‖^2, tokens, lr, weight decay, top singular value and the bound of its error
SUMS = (36.0, 4.0, 25.0, 81.0, 16.0, 7.0, 0.1, 0.5, 3.0, 1e-3)
UPDATE_KEYS = (
    "update_norm",
    "relative_update",
    "update_alignment",
    "alignment_ratio",
    "relative_representation_change",
)


def test_metrics_are_ratios_of_the_reduced_sums() -> None:
    line = alignment_line(10, ROW, SUMS, measured=True, singular=True, updated=True)
    assert tuple(line) == KEYS
    assert line["weight_norm"] == 6.0
    assert line["update_norm"] == 2.0
    assert line["relative_update"] == pytest.approx(1 / 3)
    assert line["weight_alignment"] == pytest.approx(9 / 30)
    assert line["update_alignment"] == pytest.approx(4 / 10)
    assert line["alignment_ratio"] == pytest.approx(4 / 3)
    assert line["relative_representation_change"] == pytest.approx(4 / 9)
    assert (line["tokens"], line["lr"]) == (7, 0.1)
    assert (line["top_singular_value"], line["top_singular_value_error"]) == (3.0, 1e-3)


@pytest.mark.parametrize("zero_lr", [True, False])
def test_without_an_update_its_metrics_are_null_and_the_weights_are_not(zero_lr: bool) -> None:
    sums = (*SUMS[:6], 0.0, *SUMS[7:]) if zero_lr else SUMS
    line = alignment_line(10, ROW, sums, measured=True, singular=False, updated=zero_lr)
    assert all(line[key] is None for key in UPDATE_KEYS)
    assert line["weight_alignment"] == pytest.approx(0.3)
    assert line["top_singular_value"] is None


@pytest.mark.parametrize(("relative", "known"), [(2.0**-25, False), (9.5e-7, False), (9.6e-7, True), (1e-3, True)])
def test_an_update_within_the_rounding_of_fp32_weights_is_null(relative: float, known: bool) -> None:
    sums = (36.0, 36.0 * relative**2, *SUMS[2:])
    line = alignment_line(10, ROW, sums, measured=True, singular=False, updated=True)
    assert [line[key] is not None for key in UPDATE_KEYS] == [known] * len(UPDATE_KEYS)
    assert line["weight_alignment"] == pytest.approx(0.3)


def test_an_overflow_is_null_and_not_nan() -> None:
    sums = (math.nan, math.inf, *SUMS[2:])
    line = alignment_line(10, ROW, sums, measured=True, singular=True, updated=True)
    assert [line[key] for key in ("weight_norm", "update_norm", "relative_update", "alignment_ratio")] == [None] * 4


def test_mean_over_experts_is_weighted_by_their_tokens() -> None:
    rows = [Row(f"experts.{i}.fc1", "column", 4, 9, 2.0, mean="experts.mean.fc1") for i in range(3)]
    sums = [(*SUMS[:5], tokens, *SUMS[6:]) for tokens in (1.0, 3.0, 0.0)]
    sums[0] = (144.0, *sums[0][1:])
    sums[2] = (36.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.5, 3.0, 1e-3)  # no tokens: no alignment
    lines = [alignment_line(1, row, s, True, False, True) for row, s in zip(rows, sums, strict=True)]
    assert lines[2]["weight_alignment"] is None
    forecast = NormForecast(dict.fromkeys((r.layer for r in rows), "g"), {r.layer: i + 1.0 for i, r in enumerate(rows)})
    predicted = [equilibrium_line(line, forecast, hidden_size=16) for line in lines]
    ((mean, equilibrium),) = expert_means(rows, lines, predicted)
    assert tuple(equilibrium) == keys(EquilibriumLine)
    assert (equilibrium["iteration"], equilibrium["layer"]) == (1, "experts.mean.fc1")
    assert equilibrium["weight_rms"] == pytest.approx((2 + 3 * 1) / 4)
    assert equilibrium["predicted_weight_rms"] == pytest.approx((1 + 3 * 2) / 4)
    assert equilibrium["normalised_top_singular_value"] is None
    assert (mean["layer"], mean["kind"], mean["tokens"]) == ("experts.mean.fc1", "expert_mean", 4)
    assert mean["weight_norm"] == pytest.approx((12 + 3 * 6) / 4)
    assert mean["weight_alignment"] == pytest.approx((9 / 60 + 3 * 9 / 30) / 4)
    assert mean["top_singular_value"] is None


def test_forecast_is_the_recurrence_and_survives_a_checkpoint() -> None:
    schedule = [(0.0, 0.1), (0.01, 0.1), (0.02, 0.2), (0.01, 0.2)]
    forecast = NormForecast({"a": "g", "b": "g"}, {"a": 0.02, "b": 3.0})
    for layer, rho_0 in (("a", 0.02), ("b", 3.0)):
        steps = list(trajectory(schedule, rho_0))
        again = NormForecast({"a": "g", "b": "g"}, {"a": 0.02, "b": 3.0})
        for step, (lr, weight_decay) in zip(steps, schedule, strict=True):
            assert again.weight_rms(layer) == pytest.approx(step.rho, rel=1e-12)
            again.step({"g": (lr, weight_decay), "other": (9.0, 0.0)})
            resumed = NormForecast({"a": "g", "b": "g"}, {"a": 7.0, "b": 7.0})
            resumed.load_state_dict(again.state_dict())
            assert resumed.weight_rms(layer) == again.weight_rms(layer)
            again = resumed
    assert forecast.weight_rms("unknown") is None


def test_a_checkpoint_of_another_model_starts_the_forecast_anew() -> None:
    forecast = NormForecast({"a": "g"}, {"a": 2.0})
    forecast.load_state_dict(NormForecast({"z": "h"}, {"z": 1.0}).state_dict())
    assert forecast.weight_rms("a") == 2.0


def test_equilibrium_line_sets_measured_beside_predicted() -> None:
    line = alignment_line(10, ROW, SUMS, measured=True, singular=True, updated=True)
    forecast = NormForecast({"layer": "g"}, {"layer": 0.5})
    result = equilibrium_line(line, forecast, hidden_size=16)
    assert result["weight_rms"] == pytest.approx(1.0)
    assert result["predicted_weight_rms"] == 0.5
    assert result["predicted_relative_update"] == pytest.approx(0.2)
    assert result["equilibrium_relative_update"] == pytest.approx(math.sqrt(0.1 - 0.0025))
    assert result["normalised_top_singular_value"] == pytest.approx(3.0 / (math.sqrt(0.2) * 8))
    assert tuple(result) == keys(EquilibriumLine)


def test_sublayer_line_has_the_gain_between_what_it_is_made_of() -> None:
    result = sublayer_line(10, "block", 4, (112.0, 7.0), SUMS)
    assert tuple(result) == keys(SublayerLine) == ("iteration", "layer", "input_rms", "output_rms", "gain")
    assert result["input_rms"] == pytest.approx(5 / math.sqrt(28))
    assert result["output_rms"] == 2.0
    assert result["gain"] == pytest.approx(2 / (5 / math.sqrt(28)))
