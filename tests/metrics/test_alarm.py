"""The comparison with a proxy: interpolation, rows of deviations, resuming, and folders that cannot be used."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch.config import Settings
from megatron_patch.errors import ConfigError
from megatron_patch.files.json_lines import JsonLines
from megatron_patch.files.lines import AlignmentLine, CheckLine, read_lines
from megatron_patch.metrics.alarm import FILE, QUANTITIES, Curve, Proxy, TransferCheck, collapsed, read_proxy
from megatron_patch.metrics.derive import KEYS
from megatron_patch.theory.deviation import UNKNOWN
from megatron_patch.theory.width import RULES, Rule

PROPERTY = settings(max_examples=50, deadline=None)
TOTAL = 100
LAYERS = ("decoder.layers.0.mlp.linear_fc2", "decoder.layers.1.mlp.linear_fc2")


def line(iteration: int, layer: str = LAYERS[0], size: float | None = 0.02, lr: float = 0.01, **more: Any) -> Any:
    """A line of alignment.jsonl; `size` is both the relative update and the relative representation change."""
    found = dict.fromkeys(KEYS) | {"iteration": iteration, "layer": layer, "kind": "column", "fan_in": 16}
    found |= {"fan_out": 16, "m": 1.0, "lr": lr, "weight_decay": 0.1, "tokens": 8, "weight_norm": 4.0}
    return found | dict.fromkeys(QUANTITIES, size) | more


def write_proxy(folder: Path, lines: Sequence[Any], total: int | None = TOTAL, **arguments: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"train_iterations": total, "arguments": arguments}))
    (folder / "alignment.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return str(folder)


def proxy_of(folder: Path, lines: Sequence[Any], **more: Any) -> Proxy:
    return read_proxy(write_proxy(folder, lines, **more))


def check_of(proxy: Proxy, factor: float = 1.5, count: int = 3, total: int = TOTAL, earlier: Any = ()) -> TransferCheck:
    return TransferCheck(proxy, lambda layer: RULES["none"], total, factor, count, earlier)


# --- interpolation ---------------------------------------------------------------------------------------------------

# Not closer than the iterations of a long run: numpy divides by the distance, which may be nothing.
fractions = st.floats(min_value=0, max_value=1).map(lambda fraction: round(fraction, 9))
points = st.dictionaries(fractions, st.floats(min_value=1e-3, max_value=10), min_size=1, max_size=8)


@PROPERTY
@given(points, fractions)
def test_a_curve_is_numpys_interpolation_and_ends_where_its_points_end(known: dict[float, float], at: float) -> None:
    curve = Curve(known.items())
    for fraction in (at, *known):
        if min(known) <= fraction <= max(known):
            ordered = sorted(known)
            expected = np.interp(fraction, ordered, [known[f] for f in ordered])
            assert curve.at(fraction) == pytest.approx(expected, rel=1e-6)
        else:
            assert curve.at(fraction) is None
    assert all(curve.at(fraction) == value for fraction, value in known.items())


def test_runs_of_different_length_are_compared_at_the_same_fraction(tmp_path: Path) -> None:
    proxy = proxy_of(tmp_path, [line(10, size=0.01), line(20, size=0.03)])
    found = check_of(proxy, total=1000).compare([line(150, size=0.05)])
    assert [entry["quantity"] for entry in found] == list(QUANTITIES)
    for entry in found:
        assert (entry["fraction"], entry["value"]) == (0.15, 0.05)
        assert entry["reference"] == pytest.approx(0.02)
        assert entry["ratio"] == pytest.approx(2.5)
    for outside in (99, 201):
        assert check_of(proxy, total=1000).compare([line(outside)]) == []


def test_nulls_other_layers_and_the_end_of_the_schedule_are_left_out(tmp_path: Path) -> None:
    lines = [line(10), line(20, size=None), line(30, size=0.04), line(90, lr=1e-3), line(100, size=0.5, lr=4e-5)]
    check = check_of(proxy_of(tmp_path, lines))
    assert check.compare([line(10, size=None), line(10, "output_layer")]) == []
    assert check.compare([line(20)])[0]["reference"] == pytest.approx(0.03)  # between 10 and 30
    assert check.compare([line(90)]) != []
    assert check.compare([line(95)]) == check.compare([line(100)]) == []  # 0.4% of the peak LR: not measurable
    assert check.unmatched([LAYERS[0], "output_layer", LAYERS[1]]) == ["output_layer", LAYERS[1]]
    one = check.compare([line(30, relative_update=None, relative_representation_change=0.1)])
    assert [entry["quantity"] for entry in one] == ["relative_representation_change"]


# --- rows of deviations ----------------------------------------------------------------------------------------------

ratios = st.lists(st.none() | st.floats(min_value=0.05, max_value=20), max_size=20)


def brute_force(sequence: Sequence[float | None], factor: float, count: int) -> list[bool]:
    """Whether the last `count` measurements up to each one are beyond the factor, nulls not counted."""
    seen: list[bool] = []
    alarms = []
    for ratio in sequence:
        if ratio is not None:
            seen.append(ratio > factor or ratio < 1 / factor)
            alarms.append(len(seen) >= count and all(seen[-count:]))
    return alarms


@PROPERTY
@given(ratios, st.floats(min_value=1.01, max_value=5), st.integers(1, 4))
def test_an_alarm_is_so_many_deviations_in_a_row(
    tmp_path: Path, sequence: list[float | None], factor: float, count: int
) -> None:
    proxy = proxy_of(tmp_path, [line(1, size=1.0), line(TOTAL, size=1.0)])
    check = check_of(proxy, factor, count)
    rows = [check.compare([line(i, size=ratio)]) for i, ratio in enumerate(sequence, start=1)]
    for quantity in QUANTITIES:
        found = [entry for row in rows for entry in row if entry["quantity"] == quantity]
        assert [entry["alarm"] for entry in found] == brute_force(sequence, factor, count)
        assert [entry["cause"] is not None for entry in found] == [entry["alarm"] for entry in found]
    # One warning at the beginning of every row that is long enough.
    alarms = [False, *brute_force(sequence, factor, count)]
    starts = sum(now and not before for before, now in pairwise(alarms))
    assert sum(check.warning(row) is not None for row in rows) == starts


@PROPERTY
@given(ratios, st.integers(0, 20), st.integers(1, 4))
def test_a_resumed_comparison_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, sequence: list[float | None], cut: int, count: int
) -> None:
    proxy = proxy_of(tmp_path, [line(1, size=1.0), line(TOTAL, size=1.0)])

    def rows(check: TransferCheck, first: int, some: Sequence[float | None]) -> list[list[Any]]:
        return [check.compare([line(i, size=ratio)]) for i, ratio in enumerate(some, start=first)]

    whole = rows(check_of(proxy, count=count), 1, sequence)
    path = str(tmp_path / FILE)
    Path(path).unlink(missing_ok=True)
    file = JsonLines(path, 0)
    for row in rows(check_of(proxy, count=count), 1, sequence):  # the killed run got further than its checkpoint
        file.write(row)
    JsonLines(path, cut)
    earlier = read_lines(path, CheckLine, [])
    assert rows(check_of(proxy, count=count, earlier=earlier), cut + 1, sequence[cut:]) == whole[cut:]


def test_a_run_is_like_itself(tmp_path: Path) -> None:
    lines = [line(i, layer, size=0.01 * i) for i in range(5, 100, 5) for layer in LAYERS]
    check = check_of(proxy_of(tmp_path, lines), factor=1.0001, count=1)
    found = check.compare(lines)
    assert len(found) == 2 * len(lines)
    assert {entry["ratio"] for entry in found} == {1.0}
    assert check.warning(found) is None


# --- what is said ----------------------------------------------------------------------------------------------------


def test_warning_names_layers_values_and_cause_once(tmp_path: Path) -> None:
    proxy = proxy_of(tmp_path, [line(i, layer) for i in (10, 90) for layer in (*LAYERS, "output_layer")])
    check = check_of(proxy, count=2)

    def measured(iteration: int) -> list[Any]:
        high = [line(iteration, LAYERS[0], 0.08, lr=0.04), line(iteration, LAYERS[1], 0.06, lr=0.04)]
        return [*high, line(iteration, "output_layer")]

    assert check.warning(check.compare(measured(20))) is None
    text = check.warning(found := check.compare(measured(30)))
    assert text is not None
    assert "\n" not in text
    assert text.startswith(
        "WARNING: transfer alarm at iteration 30 (30.0% of training): not within a factor 1.5 of the proxy's, 2 times "
        "in a row: decoder.layers.0-1.mlp.linear_fc2 relative update 0.08 for 0.02 (3 to 4 times), "
        "decoder.layers.0-1.mlp.linear_fc2 RRC 0.08 for 0.02 (3 to 4 times); likely cause: its lr * weight decay is 4 "
        "times the proxy's: lr is 4 times the proxy's where the rule none asks for 1; check --lr, the schedule and "
        "--extra-warmup; its weight norm is 1/2 of"
    )
    assert text.endswith("all values are in transfer_check.jsonl")
    assert {entry["layer"] for entry in found if entry["alarm"]} == set(LAYERS)
    assert check.warning(check.compare(measured(40))) is None


def test_two_causes_name_their_layers(tmp_path: Path) -> None:
    proxy = proxy_of(tmp_path, [line(i, layer) for i in (10, 90) for layer in LAYERS])
    text = check_of(proxy, count=1).warning(
        check_of(proxy, count=1).compare([line(20, LAYERS[0], 0.08), line(20, LAYERS[1], 0.05, weight_decay=0.9)])
    )
    assert text is not None
    assert f"likely cause: {LAYERS[0]}: {UNKNOWN}; or {LAYERS[1]}: its lr * weight decay is 9 times" in text


def test_no_update_at_all_is_a_deviation_without_a_known_cause(tmp_path: Path) -> None:
    check = check_of(proxy_of(tmp_path, [line(10), line(90)]), count=1)
    found = check.compare([line(20, size=0.0)])
    assert {(entry["ratio"], entry["alarm"], entry["cause"]) for entry in found} == {(0.0, True, UNKNOWN)}
    assert "0 for 0.02 (0 times)" in str(check.warning(found))


def test_names_are_collapsed() -> None:
    names = [f"decoder.layers.{i}.mlp.experts.local_experts.2.linear_fc2" for i in (7, 0, 1, 2, 9)]
    assert collapsed([*names, "output_layer"]) == [
        "decoder.layers.0-2,7,9.mlp.experts.local_experts.2.linear_fc2",
        "output_layer",
    ]


# --- rules and folders -----------------------------------------------------------------------------------------------


def rules_of(arguments: dict[str, Any]) -> Callable[[str], Rule]:
    return Settings.of(arguments).width.trained_by()


def test_rules_of_a_runs_arguments() -> None:
    custom = {"width_scaling": "custom", "lr_width_exponent": 0.25, "wd_width_exponent": 0.75}
    assert (rules_of(custom)("x").lr_exponent, rules_of(custom)("x").wd_exponent) == (0.25, 0.75)
    assert rules_of({})("x") is rules_of({"width_scaling": None})("output_layer") is RULES["none"]
    assert rules_of({"use_mup": True})("x") is RULES["standard"]
    kept = rules_of({"width_scaling": "sqrt", "no_scale_output_layer": True})
    assert (kept("decoder.x"), kept("output_layer")) == (RULES["sqrt"], RULES["none"])


def unusable(folder: Path, what: str) -> str:
    """Make a proxy's folder unusable in one way; returns a part of the message."""
    if what == "no folder":
        return "run.json: No such file or directory"
    write_proxy(folder, [line(10)])
    if what == "no run.json":
        (folder / "run.json").unlink()
        return "run.json: No such file or directory"
    if what == "no alignment":
        (folder / "alignment.jsonl").unlink()
        return "there is no alignment.jsonl"
    if what == "nothing measured":
        write_proxy(folder, [line(10, size=None)])
        return "alignment.jsonl has no measured relative update"
    if what == "empty":
        (folder / "alignment.jsonl").write_text("")
        return "alignment.jsonl has no measured relative update"
    if what == "no length":
        write_proxy(folder, [line(10)], total=None)
        return "run.json is not what megatron_patch writes"
    if what == "another rule":
        write_proxy(folder, [line(10)], width_scaling="cubic")
        return "run.json is not what megatron_patch writes: no 'cubic'"
    (folder / "run.json").write_text(what)
    return "run.json is not what megatron_patch writes"


@pytest.mark.parametrize(
    "what",
    [
        "no folder",
        "no run.json",
        "no alignment",
        "nothing measured",
        "empty",
        "no length",
        "another rule",
        "{",
        "[]",
        "{}",
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "proxy"
    detail = unusable(folder, what)
    with pytest.raises(ConfigError) as caught:
        read_proxy(str(folder))
    text = str(caught.value)
    assert text.startswith(f"--reference-run {folder}: expected the metrics folder of a run with --alignment-interval")
    assert detail in text
    assert "\n" not in text


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    folder = Path(write_proxy(tmp_path, [line(10), line(20)]))
    (folder / "alignment.jsonl").write_text('{"iteration": 3}\n' + (folder / "alignment.jsonl").read_text())
    with pytest.raises(ConfigError, match=r"alignment\.jsonl line 1 \(no 'layer'\)"):
        read_proxy(str(folder))


def test_a_growing_file_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    folder = write_proxy(tmp_path, [line(10), line(20)])
    with open(tmp_path / "alignment.jsonl", "a", encoding="utf-8") as file:
        file.write('{"iteration": 30, "lay')
    notes: list[str] = []
    assert len(read_lines(f"{folder}/alignment.jsonl", AlignmentLine, notes)) == 2
    assert len(notes) == 1
    assert read_proxy(folder).curves[LAYERS[0]]["relative_update"].at(0.15) == 0.02
