"""What a measured step leaves: lines in the files of the layers that are wanted, and values for the writers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.metrics.forecast import NormForecast
from megatron_patch.metrics.registry import Registry, Sublayer
from megatron_patch.metrics.reporter import Measured, Reporter, open_files
from megatron_patch.metrics.views import Row

ROWS = [Row("a", "column", 4, 9, 1.0), Row("b", "row", 4, 9, 1.0)]
SUMS = (36.0, 4.0, 25.0, 81.0, 16.0, 7.0, 0.1, 0.5, 3.0, 1e-3)
"""In the order of `SLOTS`."""


@pytest.mark.parametrize("alignment", [True, False])
def test_a_step_goes_to_files_and_writers(tmp_path: Path, alignment: bool) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    reporter = Reporter(
        Registry(ROWS, [Sublayer("block", "a", 4)], None),
        [False, True],
        16,
        lambda values, iteration: logged.append((iteration, dict(values))),
        open_files(str(tmp_path), 0),
    )
    measured = Measured(10, alignment, not alignment, True, [SUMS, SUMS], [(112.0, 7.0)])
    reporter.report(measured, NormForecast({"b": "g"}, {"b": 0.5}))

    def layers(name: str) -> list[Any]:
        return [json.loads(line)["layer"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    # A block's gain needs its first layer's input, whether or not that layer has a line.
    assert [layers(name) for name in ("alignment", "equilibrium", "sublayers")] == [
        ["b"],
        ["b"],
        ["block"] if alignment else [],
    ]
    ((iteration, values),) = logged
    assert iteration == 10
    always = {"weight_norm/b", "weight_rms/b", "predicted_weight_rms/b", "predicted_relative_update/b"}
    measured_now = {
        True: {
            "update_norm/b",
            "relative_update/b",
            "weight_alignment/b",
            "update_alignment/b",
            "alignment_ratio/b",
            "relative_representation_change/b",
            "sublayer_gain/block",
        },
        False: {"top_singular_value/b", "normalised_top_singular_value/b"},
    }
    assert set(values) == always | measured_now[alignment]
    assert values["weight_rms/b"] == 1.0


def test_numbers_that_are_not_finite_are_null_and_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(Registry(ROWS, [], None), [True, True], 16, lambda *_: None, open_files(str(tmp_path), 0))
    forecast = NormForecast({"a": "g", "b": "g"}, {"a": 0.5, "b": 0.5})
    spoilt = (math.nan, *SUMS[1:8], math.nan, math.nan)
    for iteration in (1, 2, 3):
        reporter.report(Measured(iteration, True, True, True, [SUMS, SUMS if iteration == 1 else spoilt], []), forecast)
    lines = [json.loads(line) for line in (tmp_path / "alignment.jsonl").read_text().splitlines()]
    keys = ("weight_norm", "relative_update", "top_singular_value", "top_singular_value_error")
    nulls = [[line[key] is None for key in keys] for line in lines]
    assert nulls == [[False] * 4, [False] * 4, [False] * 4, [True] * 4, [False] * 4, [True] * 4]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert len(said) == 1
    assert "iteration 2" in said[0]
    assert "of b (1 of 2 lines)" in said[0]
