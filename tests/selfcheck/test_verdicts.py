"""What each line says of results that are right, and of results with one thing wrong."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_patch.selfcheck import cost, verdicts
from megatron_patch.selfcheck.runs import FP8, LAYOUTS, Machine, runs_of
from megatron_patch.selfcheck.sizes import QUICK, QUICKSTART, ZEROED, CostSize, Size
from megatron_patch.selfcheck.table import chosen, judge, needed, rows_of
from megatron_patch.selfcheck.verdicts import Missing

ROOT = Path(__file__).parents[2]
CPU = Machine(0, False, dict.fromkeys(FP8, "needs a GPU"), quick=False)
H200 = Machine(
    1, True, {"delayed": "", "tensorwise": "", "blockwise": "", "mxfp8": "needs compute capability 10.0"}, False
)
TWO = Machine(2, True, dict.fromkeys(FP8, ""), False)
NAMES = ("embedding.word_embeddings.weight", "decoder.layers.0.mlp.linear_fc1.weight", "decoder.final_layernorm.weight")


def result() -> dict[str, Any]:
    """What a healthy run of `QUICK` leaves, cut short."""
    steps = range(1, QUICK.steps + 1)
    line = {"kind": "column", "weight_norm": 2.0, "weight_alignment": 0.1, "tokens": 64, "top_singular_value": 1.5}
    return {
        "losses": {str(step): 6.0 - 0.1 * step for step in steps},
        "live": {str(step): {name: list(QUICK.trained_with(name, step)) for name in NAMES} for step in steps},
        "shrunk": {name: [math.prod(QUICK.trained_with(name, ZEROED)), 1000] for name in NAMES},
        "digests": dict.fromkeys(NAMES, "0a"),
        "exact": {"8": {"fc1": {key: value for key, value in line.items() if key != "kind"}}},
        "actual": {"8": {"fc1": 1e-4}},
        "lines": {"4 fc1": dict(line), "8 fc1": dict(line)},
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    """A result with one thing set; steps of the path are separated by commas."""
    content = result()
    *parents, last = path.split(",")
    inside = content
    for name in parents:
        inside = inside[name]
    inside[last] = value(inside[last]) if callable(value) else value
    return content


LINES = {
    "losses": lambda run: verdicts.same_losses(result(), run, 1e-4),
    "live": lambda run: verdicts.live_rates(run, QUICK),
    "shrunk": lambda run: verdicts.shrunk(run, QUICK),
    "exact": lambda run: verdicts.exact_metrics(run, 1e-5),
    "product": lambda run: verdicts.actual_product(run, 1e-2),
    "metrics": lambda run: verdicts.same_metrics(result(), run, 1e-4),
    "resume": lambda run: verdicts.bit_exact(result(), run),
}


@pytest.mark.parametrize("line", LINES)
def test_a_healthy_run_passes(line: str) -> None:
    verdict = LINES[line](result())
    assert verdict.passed, verdict
    assert verdict.why
    assert verdict.figure is not None and verdict.bound is not None


@pytest.mark.parametrize(
    ("line", "path", "value", "said"),
    [
        ("losses", "losses,7", lambda x: x * 1.001, "largest at step 7"),
        ("losses", "losses,7", math.nan, "largest at step 7"),
        ("live", f"live,5,{NAMES[1]}", lambda pair: [pair[0] * 1.00001, pair[1]], f"{NAMES[1]}, step 5: LR"),
        ("live", f"live,5,{NAMES[1]}", lambda pair: [pair[0], 0.1], "weight decay 0.1, by hand 0.2"),
        ("live", f"live,5,{NAMES[2]}", lambda pair: [pair[0], 0.1], NAMES[2]),
        ("shrunk", f"shrunk,{NAMES[0]}", lambda pair: [pair[0] * 1.01, pair[1]], NAMES[0]),
        ("shrunk", f"shrunk,{NAMES[1]}", [0.0, 1000], NAMES[1]),
        ("shrunk", f"shrunk,{NAMES[2]}", [1e-6, 1000], NAMES[2]),
        ("shrunk", f"shrunk,{NAMES[2]}", [math.nan, 1000], NAMES[2]),
        ("exact", "lines,8 fc1,weight_alignment", 0.100002, "weight_alignment of fc1, step 8"),
        ("exact", "lines,8 fc1,top_singular_value", 1.504, "top_singular_value of fc1"),
        ("exact", "lines,8 fc1,weight_norm", None, "null"),
        ("exact", "lines,8 fc1,weight_norm", math.inf, "weight_norm"),
        ("exact", "lines", {}, "was not measured"),
        ("exact", "lines", lambda lines: {**lines, "8 fc9": lines["8 fc1"]}, "nothing to compare with: 8 fc9"),
        ("product", "actual,8,fc1", 0.02, "largest of fc1, step 8"),
        ("product", "actual,8,fc1", math.nan, "largest of fc1"),
        ("metrics", "lines,4 fc1,weight_norm", 2.001, "weight_norm of fc1"),
        ("metrics", "lines", lambda lines: {"4 fc1": lines["4 fc1"]}, "lines that one of both lacks: 1, 8 fc1"),
        ("metrics", "lines", {}, "lacks"),
        ("resume", "losses,9", lambda x: x * (1 + 2**-52), "the first: 9"),
        ("resume", f"digests,{NAMES[0]}", "0b", NAMES[0]),
        ("resume", "lines,8 fc1,weight_norm", 2.0000001, "8 fc1"),
    ],
)
def test_one_thing_wrong_fails(line: str, path: str, value: Any, said: str) -> None:
    verdict = LINES[line](changed(path, value))
    assert not verdict.passed, verdict
    assert said in verdict.why


@pytest.mark.parametrize(
    ("line", "path"),
    [("losses", "losses"), ("live", "live"), ("shrunk", "shrunk"), ("exact", "exact"), ("product", "actual"),
     ("resume", "losses")],
)  # fmt: skip
def test_nothing_seen_is_no_pass(line: str, path: str) -> None:
    with pytest.raises(Missing):
        LINES[line](changed(path, {}))


def test_losses_that_do_not_fall_fail_even_if_they_agree() -> None:
    flat = changed("losses", {str(step): 6.0 for step in range(1, 13)})
    verdict = verdicts.same_losses(flat, copy.deepcopy(flat), 1e-4)
    assert not verdict.passed and "did not fall" in verdict.why


def timed(**kinds: float) -> dict[str, Any]:
    """Five cycles of steps that take 1 s, but for those of some kinds, and one that somebody else has held up."""
    seconds = [(place, kinds.get(kind, 1.0)) for _ in range(5) for place, kind in enumerate(cost.CYCLE)]
    seconds[9] = (1, 50.0)
    return {"seconds_of_steps": seconds, "peaks": [[place, 2**30] for place in range(8)]}


@pytest.mark.parametrize(
    ("kinds", "what", "figure"),
    [
        ({}, "on", 1.0),
        ({"off": 0.5}, "on", 2.0),
        ({"metrics": 3.0}, "on", 1.0),
        ({"metrics": 3.0}, "metrics", 1.2),
        ({"after": 3.0}, "metrics", 1.2),  # what a measured step leaves to the next counts as its own
        ({"spectral": 11.0}, "spectral", 2.0),
        ({"spectral": 11.0}, "metrics", 1.0),
    ],
)
def test_cost_is_that_of_its_kind_of_step(kinds: dict[str, float], what: str, figure: float) -> None:
    verdict = verdicts.cost(timed(**kinds), what, 1.5)
    assert verdict.figure == pytest.approx(figure)
    assert verdict.passed == (figure <= 1.5)


def test_waits_are_counted_by_step() -> None:
    def steps(inside: dict[int, list[str]]) -> list[cost.Event]:
        events: list[cost.Event] = []
        for place in range(8):
            events.append((f"selfcheck step {place}", 100.0 * place, 100.0 * place + 90, 0.0))
            names = ["aten::mm", "aten::_local_scalar_dense", *inside.get(place, [])]
            events += [(name, 100.0 * place + 10 + i, 100.0 * place + 11 + i, 0.0) for i, name in enumerate(names)]
        return events

    found = cost.syncs_by_step(steps({3: ["aten::_local_scalar_dense"], 4: ["megatron_patch::to_host"]}))
    assert found == {0: 1, 1: 1, 2: 1, 3: 2, 4: 2, 5: 1, 6: 1, 7: 1}
    verdict = verdicts.host_syncs({"syncs": {str(k): v for k, v in found.items()}}, "metrics", 1.0)
    assert (verdict.figure, verdict.passed) == (2, False)
    on_gpu = cost.syncs_by_step(steps({3: ["cudaStreamSynchronize"]}))  # there a scalar's read shows as CUDA's wait
    assert on_gpu == {place: int(place == 3) for place in range(8)}
    assert verdicts.host_syncs({"syncs": {str(k): v for k, v in on_gpu.items()}}, "metrics", 1.0).passed


def test_peak_memory_and_collectives() -> None:
    run = timed()
    assert verdicts.peak_memory(run, 1.25).figure == 1.0
    run["peaks"][3][1] = 2**31
    assert not verdicts.peak_memory(run, 1.25).passed
    events: list[cost.Event] = [("selfcheck step 0", 0.0, 100.0, 0.0), ("ncclDevKernel_AllReduce", 5.0, 6.0, 25.0)]
    assert cost.share_of_collectives(events) == 0.25
    assert cost.longest([*events, ("aten::mm", 0.0, 50.0, 40.0), ("gemm", 0.0, 1.0, 30.0)]) == [
        "gemm",
        "ncclDevKernel_AllReduce",
    ]


def test_the_proxy_is_that_of_the_quickstart() -> None:
    with open(ROOT / "configs" / "quickstart_proxy.yaml", encoding="utf-8") as file:
        config = yaml.safe_load(file)
    flags = QUICKSTART.flags()
    given = {
        flag[2:]: None if i + 1 == len(flags) or flags[i + 1].startswith("--") else flags[i + 1]
        for i, flag in enumerate(flags)
        if flag.startswith("--")
    }
    mine = {name: config[name] for name in given if name in config}
    shown = {name: value if value is not None else True for name, value in given.items() if name in config}
    own = {"tokenizer-type", "train-iters", "eval-interval", "eval-iters", "num-workers"}
    assert len(mine) > 30
    for name in set(mine) - own:
        assert str(shown[name]) == str(mine[name]) or float(shown[name]) == float(mine[name]), name
    assert config["extra-warmup-fraction"] * config["train-iters"] == float(given["extra-warmup-iters"] or 0)


@pytest.mark.parametrize("size", [QUICK, QUICKSTART])
def test_exact_steps_are_measured_ones_after_the_zeroed(size: Size) -> None:
    assert all(step % size.interval == 0 and step > ZEROED for step in size.exact)
    assert size.half > ZEROED


@pytest.mark.parametrize("machine", [CPU, H200, TWO, Machine(1, False, dict.fromkeys(FP8, "no TE"), False)])
def test_every_line_has_its_runs_or_a_reason(machine: Machine) -> None:
    rows, specs = rows_of(machine), runs_of(machine)
    names = {spec.name for spec in specs}
    assert len({row.name for row in rows}) == len(rows)
    assert len(names) == len(specs)
    for row in rows:
        assert bool(row.skip) == (not set(row.needs) <= names or row.skip == "needs a GPU"), row
    assert {spec.name for spec in needed(specs, rows)} == names, "a run that no line needs"
    assert all(spec.limit > 0 for spec in specs)
    if machine is TWO:
        assert {row.name for row in rows if row.skip} == set()
    if machine is H200:
        skipped = {row.name: row.skip for row in rows if row.skip}
        assert skipped["same/fp8-mxfp8"] == "needs compute capability 10.0"
        assert {skipped[f"parallel/{name}"] for name in LAYOUTS} == {"needs two GPUs"}


def test_all_runs_of_a_gpu_fit_ten_minutes_by_their_limits() -> None:
    """Not a measurement: what comes alone at the end keeps its time whatever the others do."""
    alone = [spec for spec in runs_of(H200) if spec.alone]
    assert [spec.name for spec in alone] == ["cost"]
    assert sum(spec.limit for spec in alone) < 570 / 2
    assert isinstance(alone[0].size, CostSize) and alone[0].size.hidden == 2048 and alone[0].size.layers == 8


def test_only_what_is_asked_for() -> None:
    rows = chosen(rows_of(CPU), "^rules/fp32")
    assert {row.name for row in rows if not row.skip} == {"rules/fp32/rates", "rules/fp32/decay"}
    assert [spec.name for spec in needed(runs_of(CPU), rows)] == ["fp32"]
    assert "fp32" in {spec.name for spec in needed(runs_of(CPU), chosen(rows_of(CPU), "^resume$"))}
    row = next(row for row in rows if row.name == "rules/fp32/rates")
    assert judge(row, {}) is None
