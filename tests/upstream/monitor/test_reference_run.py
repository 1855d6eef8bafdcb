"""The live transfer alarm in real trainings: a proxy, wider targets right and wrong, split, killed and explained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import ds_json
from tests.support.explaining import explain_all
from tests.support.pool import Pool
from tests.support.training import TINY, Patched, train

STEPS, EVERY = 32, 4
MEASUREMENTS = STEPS // EVERY
# Weight decay so strong that the weights of both widths are near equilibrium within the run.
COMMON = [
    *TINY,
    *f"--train-iters {STEPS} --lr-decay-iters {STEPS} --weight-decay 5 --untie-embeddings-and-output-weights "
    f"--init-scaling fan-in --alignment-interval {EVERY}".split(),
]
WIDE = ["--hidden-size", "64", "--num-attention-heads", "8"]
WRONG = [*WIDE, "--lr", "0.04", "--min-lr", "0.004"]  # four times the LR, by the rule none
RIGHT = [*WIDE, "--width-scaling", "independent", "--base-hidden-size", "32"]
PARTS = ("qkv/q", "qkv/k", "qkv/v", "proj")
LAYERS = {
    *(f"decoder.layers.{i}.self_attention.linear_{name}" for i in (0, 1) for name in PARTS),
    *(f"decoder.layers.{i}.mlp.linear_{name}" for i in (0, 1) for name in ("fc1", "fc2")),
    "output_layer",
}


@pytest.fixture(scope="module")
def proxy(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The metrics folder of a proxy that is 32 wide."""
    folder = tmp_path_factory.mktemp("proxy")
    pool.run(train, argv=[*COMMON, "--metrics-dir", str(folder)], steps=STEPS, hooks=Patched())
    return folder


def compared(
    pool: Pool, proxy: Path, folder: Path, flags: list[str], *, ranks: int = 1, steps: int = STEPS
) -> tuple[list[dict[str, Any]], list[str]]:
    """Train against the proxy; return the lines of the comparison and what the log says of it."""
    argv = [*COMMON, "--metrics-dir", str(folder), "--reference-run", str(proxy), *flags]
    pool.run(train, ranks=ranks, argv=argv, steps=steps, hooks=Patched())
    printed = [line for text in pool.printed for line in text.splitlines()]
    lines = [json.loads(line) for line in (folder / "transfer_check.jsonl").read_text().splitlines()]
    return lines, [line for line in printed if line.startswith(("> transfer check", "WARNING: transfer alarm"))]


@pytest.fixture(scope="module")
def wrong(pool: Pool, proxy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], list[str]]:
    """A target with four times the LR: its folder, its lines, its log."""
    folder = tmp_path_factory.mktemp("wrong")
    return folder, *compared(pool, proxy, folder, WRONG)


def test_a_wrong_target_is_named_within_the_training(wrong: tuple[Path, list[Any], list[str]]) -> None:
    _, lines, said = wrong
    assert len(lines) == 2 * len(LAYERS) * MEASUREMENTS
    assert {line["layer"] for line in lines} == LAYERS
    assert said[0].startswith("> transfer check: 13 layers with ")
    assert said[0].endswith(", factor 1.5, 3 times in a row")
    warning = said[1]
    assert warning.startswith("WARNING: transfer alarm at iteration 12 (37.5% of training)")
    for name in PARTS:
        assert f"decoder.layers.0-1.self_attention.linear_{name} relative update" in warning
    assert "decoder.layers.0-1.mlp.linear_fc1 relative update" in warning
    assert "output_layer relative update" in warning
    assert "lr is 4 times the proxy's where the rule none asks for 1; check --lr" in warning
    updates = [line for line in lines if line["quantity"] == "relative_update" and line["iteration"] >= 12]
    assert all(line["alarm"] for line in updates)
    assert all(line["ratio"] > 1.5 for line in updates)
    assert len(said) <= 3, "a row is told once"


def test_values_are_those_of_both_runs(proxy: Path, wrong: tuple[Path, list[Any], list[str]]) -> None:
    folder, lines, _ = wrong

    def measured(where: Path) -> dict[tuple[int, str], Any]:
        entries = [json.loads(text) for text in (where / "alignment.jsonl").read_text().splitlines()]
        return {(entry["iteration"], entry["layer"]): entry for entry in entries}

    here, there = measured(folder), measured(proxy)
    for line in lines:
        key = line["iteration"], line["layer"]
        assert line["value"] == here[key][line["quantity"]]
        assert line["reference"] == there[key][line["quantity"]]
        assert line["ratio"] == line["value"] / line["reference"]
        assert line["fraction"] == line["iteration"] / STEPS


def test_a_right_target_raises_hardly_an_alarm(pool: Pool, proxy: Path, tmp_path: Path) -> None:
    lines, said = compared(pool, proxy, tmp_path, RIGHT)
    assert sum(line["alarm"] for line in lines) <= 0.05 * len(lines)
    assert not any("check --lr" in text or "lets it fall" in text for text in said)


def test_split_over_ranks_the_lines_are_the_same(
    pool: Pool, proxy: Path, wrong: tuple[Path, list[Any], list[str]], tmp_path: Path
) -> None:
    split = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    lines, said = compared(pool, proxy, tmp_path, [*WRONG, *split], ranks=2, steps=12)
    expected = [line for line in wrong[1] if line["iteration"] <= 12]
    exact = ("iteration", "fraction", "layer", "quantity", "reference", "in_a_row", "alarm")

    def key(line: dict[str, Any]) -> tuple[Any, ...]:
        return line["iteration"], line["layer"], line["quantity"]

    for mine, one in zip(sorted(lines, key=key), sorted(expected, key=key), strict=True):
        assert {name: mine[name] for name in exact} == {name: one[name] for name in exact}
        assert mine["value"] == pytest.approx(one["value"], rel=1e-3)
        assert (mine["cause"] is None) == (one["cause"] is None)
    assert len(said) == 2, "one rank speaks"


def test_a_killed_and_resumed_run_counts_on(
    pool: Pool, proxy: Path, wrong: tuple[Path, list[Any], list[str]], tmp_path: Path
) -> None:
    """Killed after the second deviation of every layer: the third, after the resume, is the alarm."""
    save = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "8", "--ckpt-format", "torch_dist"]
    folder = tmp_path / "metrics"
    compared(pool, proxy, folder, [*WRONG, *save], steps=8)
    with open(folder / "transfer_check.jsonl", "a", encoding="utf-8") as file:  # as far as the killed run got
        file.write('{"iteration": 12, "layer": "output_layer", "quantity": "relative_update", "ratio": 1.0}\n{"iter')
    lines, said = compared(pool, proxy, folder, [*WRONG, *save], steps=12)
    assert lines == [line for line in wrong[1] if line["iteration"] <= 12]
    assert any(text.startswith("WARNING: transfer alarm at iteration 12") for text in said)


def test_layers_without_counterpart_are_listed_once(pool: Pool, proxy: Path, tmp_path: Path) -> None:
    lines, said = compared(pool, proxy, tmp_path, [*WIDE, "--num-layers", "4"], steps=4)
    assert {line["layer"] for line in lines} == LAYERS
    (listed,) = [text for text in said if "no counterpart" in text]
    names = listed.removeprefix("> transfer check: no counterpart for ").split(", ")
    assert sorted(names) == sorted(name.replace("layers.1", "layers.2-3") for name in LAYERS if "layers.1" in name)


def test_explain_reads_the_proxys_run(pool: Pool, proxy: Path, tmp_path: Path) -> None:
    deeper = tmp_path / "deeper"
    shutil.copytree(proxy, deeper)
    record = json.loads((deeper / "run.json").read_text())
    record["arguments"]["num_layers"] = 6
    (deeper / "run.json").write_text(json.dumps(record))
    argv = ["--cpu", "--mock-data", *COMMON, *RIGHT, "--metrics-dir", str(tmp_path / "x"), "--json", "--reference-run"]
    same, other, absent = pool.run(
        explain_all, distributed=False, commands=[[*argv, str(proxy)], [*argv, str(deeper)], [*argv, "absent"]]
    )[0]
    assert not any("depth" in warning for warning in same.json["warnings"])
    assert any(
        warning.startswith("depth: the base model of --reference-run has 6, this one 2")
        for warning in other.json["warnings"]
    )
    assert (absent.code, absent.out) == (2, "")
    assert absent.err.startswith("error: --reference-run absent: expected the metrics folder of a run")
    assert absent.err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_target_on_deepspeeds_engine_is_compared_alike(pool: Pool, proxy: Path, tmp_path: Path) -> None:
    megatron, said = compared(pool, proxy, tmp_path / "megatron", WRONG, ranks=2, steps=16)
    engine, also_said = compared(pool, proxy, tmp_path / "engine", [*WRONG, *ds_json(tmp_path, 2)], ranks=2, steps=16)
    assert also_said == said
    assert any("transfer alarm" in line for line in said)
    assert len(engine) == len(megatron) > len(LAYERS)
    for ours, theirs in zip(engine, megatron, strict=True):
        numbers = {key: pytest.approx(value, rel=1e-3) for key, value in theirs.items() if isinstance(value, float)}
        assert ours == {**theirs, **numbers}
