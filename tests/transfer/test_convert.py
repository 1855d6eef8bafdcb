"""The tool as a user runs it: what it writes, what it refuses, and that the dry run gives the promised numbers."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_patch.files.yaml_flags import load_yaml
from megatron_patch.runs.trial import Trial, to_csv
from megatron_patch.transfer.convert import classes
from megatron_patch.transfer.yaml_edit import Change, edit
from tests.support.planted import curve, surface
from tests.support.pool import Pool

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "configs" / "target_7b_h100_bf16.yaml"
EXAMPLE_PROXY = ROOT / "configs" / "example_proxy_w32.yaml"
Tool = Callable[..., int]
PROXY_ARGUMENTS: dict[str, Any] = {
    "hidden_size": 32, "num_layers": 2, "num_attention_heads": 1, "kv_channels": 32, "ffn_hidden_size": 96,
    "global_batch_size": 8, "seq_length": 64, "train_iters": 1000, "lr_decay_style": "linear", "lr_decay_iters": 1000,
    "lr_warmup_iters": 100, "min_lr": 0.0, "tokenizer_type": "SentencePieceTokenizer", "weight_decay": 1.0, "seed": 1,
    "optimizer": "adam", "adam_beta1": 0.9, "adam_beta2": 0.95, "init_scaling": "fan-in", "width_scaling": "none",
    "vector_lr": None,
}  # fmt: skip


@pytest.fixture
def convert(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the tool on trials (or a path); return (exit code, JSON or None, stderr)."""

    def run(sweep: Sequence[Trial] | Path, target: Path | str, *arguments: object) -> tuple[int, Any, str]:
        path = sweep if isinstance(sweep, Path) else tmp_path / "sweep.csv"
        if not isinstance(sweep, Path):
            path.write_text(to_csv(sweep))
        if isinstance(target, str):
            (tmp_path / "target.yaml").write_text(target)
            target = tmp_path / "target.yaml"
        out = tmp_path / "out.yaml"
        code = tool("transfer_config", "--sweep", path, "--target", target, "--output", out, "--json", *arguments)
        captured = capsys.readouterr()
        assert out.exists() == (code == 0), "written if and only if the exit code is 0"
        return code, json.loads(captured.out) if code == 0 else None, captured.err

    return run


def runs(folder: Path, lrs: Sequence[int] = range(-9, -2), **arguments: Any) -> Path:
    """A folder of runs with an optimum at 2^-6.3."""
    for trial in curve(lrs=lrs):
        content = {
            "status": "finished",
            "final_loss": trial.loss,
            "train_iterations": 1000,
            "arguments": {**PROXY_ARGUMENTS, "lr": trial.lr, **arguments},
        }
        (folder / f"{trial.lr}").mkdir(parents=True)
        (folder / f"{trial.lr}" / "run.json").write_text(json.dumps(content))
    return folder


def test_round_trip_through_explain(convert: Any, pool: Pool, tmp_path: Path) -> None:
    """What `explain` shows of the written config, class by class, is what the tool's table said."""
    trials = [Trial(256, t.lr, t.loss, 0.1) for t in curve(at=-8.2, lrs=range(-11, -5))]
    code, said, _ = convert(trials, TARGET)
    assert code == 0
    out = tmp_path / "out.yaml"
    more = ["--save", str(tmp_path), "--vocab-size", "32000", "--num-layers", "2", "--json"]
    ended = pool.run(explain_one, distributed=False, command=["--config", str(out), *more], folder=str(tmp_path))[0]
    found = {(g["class"], g["m"], g["lr"], g["weight_decay"]) for g in json.loads(ended)["groups"]}
    promised = {(c.role, c.m, c.lr, c.weight_decay) for c in classes(load_yaml(str(out)))}
    assert sorted(found) == [
        (a, pytest.approx(b), pytest.approx(c), pytest.approx(d)) for a, b, c, d in sorted(promised)
    ]
    assert said["lr"] == load_yaml(str(out))["lr"] == pytest.approx(2**-8.2, rel=1e-3)
    matrix = next(g for g in found if g[0] == "matrix")
    assert matrix[1:] == (16, pytest.approx(said["lr"] / 4), pytest.approx(0.4)), "sqrt: 16^-1/2 and 16^1/2"


def test_an_mlp_that_is_left_to_megatron_is_what_megatron_makes_of_it(pool: Pool, tmp_path: Path) -> None:
    """SwiGLU: 8h/3 in whole multiples of 64, 512 at width 192 and 128 at 64, so that m is 4 where the widths' is 3."""
    config = tmp_path / "target.yaml"
    config.write_text(
        "hidden-size: 192\nnum-attention-heads: 4\nnum-layers: 2\nswiglu: true\nseq-length: 64\n"
        "max-position-embeddings: 64\nmicro-batch-size: 1\ntrain-iters: 10\nlr: 0.01\nweight-decay: 0.1\n"
        "width-scaling: sqrt\nbase-hidden-size: 64\ntokenizer-type: NullTokenizer\nvocab-size: 255\n"
        "untie-embeddings-and-output-weights: true\nposition-embedding-type: rope\nmock-data: true\n"
    )
    command = ["--config", str(config), "--json"]
    ended = pool.run(explain_one, distributed=False, command=command, folder=str(tmp_path))[0]
    found = {(g["class"], g["m"]) for g in json.loads(ended)["groups"]}
    told = {(c.role, c.m) for c in classes(load_yaml(str(config)))}
    assert told == found
    assert ("matrix", 4.0) in told and ("matrix", 3.0) in told


def test_the_proxys_mlp_is_the_base_where_the_target_leaves_its_own_to_megatron(convert: Any, tmp_path: Path) -> None:
    """The run would derive it from the command line, as if the proxy had left it out too."""
    target = MINIMAL.replace("128", "192") + "swiglu: true\nwidth-scaling: sqrt\nweight-decay: 0.3\n"
    (tmp_path / "s.csv").write_text("hidden_size,lr,loss\n" + "".join(f"32,{t.lr},{t.loss}\n" for t in curve()))
    (tmp_path / "proxy.yaml").write_text("hidden-size: 32\nffn-hidden-size: 96\nswiglu: true\n")
    code, _, _ = convert(tmp_path / "s.csv", target, "--proxy", tmp_path / "proxy.yaml", "--force")
    assert code == 0
    flags = load_yaml(str(tmp_path / "out.yaml"))
    assert flags["base-ffn-hidden-size"] == 96
    assert 512 / 96 in {c.m for c in classes(flags)}


def explain_one(command: list[str], folder: str) -> str:
    """Runs in a process of its own; returns what `explain` printed."""
    import contextlib
    import io
    import os

    from megatron_patch.entry.explain import explain

    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        explain(command)
    return text.getvalue()


def test_only_changed_lines_differ(convert: Any, tmp_path: Path) -> None:
    code, said, _ = convert([Trial(256, t.lr, t.loss, 0.1) for t in curve()], TARGET)
    assert code == 0
    before, after = TARGET.read_bytes().splitlines(True), (tmp_path / "out.yaml").read_bytes().splitlines(True)
    changed = [(a.decode(), b.decode()) for a, b in zip(before, after, strict=True) if a != b]
    assert [a for a, _ in changed] == ["lr: 2.0e-3\n", "weight-decay: 0.02\n"]
    assert changed[0][1].startswith(f"lr: {said['lr']!r}  # the sweep's optimum at width 256, 90% interval ")
    assert changed[1][1] == "weight-decay: 0.1  # the sweep's weight decay, was 0.02\n"


def test_to_the_proxys_own_width_changes_nothing(convert: Any, tmp_path: Path) -> None:
    code, said, _ = convert(runs(tmp_path / "runs"), EXAMPLE_PROXY, "--rule", "independent")
    assert code == 0
    flags = load_yaml(str(tmp_path / "out.yaml"))
    assert (flags["lr"], flags["weight-decay"], flags["base-hidden-size"]) == (said["lr"], 1.0, 32)
    assert (flags["base-kv-projection-size"], flags["base-ffn-hidden-size"]) == (32, 96)
    for c in classes(flags):
        assert (c.m, c.lr) == (1, said["lr"])
        assert c.weight_decay == (0 if c.role == "vector" else 1)


MINIMAL = "hidden-size: 128\n"


def test_minimal_csv(convert: Any, tmp_path: Path) -> None:
    """Three columns: rule and weight decay are the target's."""
    (tmp_path / "s.csv").write_text("hidden_size,lr,loss\n" + "".join(f"32,{t.lr},{t.loss}\n" for t in curve()))
    code, said, _ = convert(tmp_path / "s.csv", MINIMAL + "width-scaling: sqrt\nweight_decay: 0.3\n")
    assert code == 0
    assert said.keys() == {
        "lr", "lr_interval", "weight_decay", "base_hidden_size", "rule", "expected_loss", "warnings"
    }  # fmt: skip
    assert (said["rule"], said["weight_decay"], said["base_hidden_size"]) == ("sqrt", 0.3, 32)
    assert math.log2(said["lr"]) == pytest.approx(-6.3, abs=0.1)
    assert said["lr_interval"][0] <= said["lr"] <= said["lr_interval"][1]


def test_missing_weight_decay_names_the_option(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.csv").write_text(to_csv(curve()))
    (tmp_path / "t.yaml").write_text(MINIMAL)
    words = ("--sweep", tmp_path / "s.csv", "--target", tmp_path / "t.yaml", "--output", tmp_path / "o.yaml")
    assert tool("transfer_config", *words) == 2
    assert "--weight-decay not given" in capsys.readouterr().err
    assert tool("transfer_config", *words, "--weight-decay", 0.2) == 0
    assert load_yaml(str(tmp_path / "o.yaml"))["weight-decay"] == 0.2


def test_a_rule_that_nobody_named_is_said_aloud(convert: Any, tmp_path: Path) -> None:
    code, said, error = convert(curve(), MINIMAL + "weight-decay: 0.1\n")
    assert (code, said["rule"]) == (0, "independent")
    assert any("names a width rule" in w for w in said["warnings"]) and "names a width rule" in error
    assert "width-scaling: independent  # chosen for lack of a rule" in (tmp_path / "out.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "target", "trials", "rule"),
    [
        (["--rule", "standard"], "sqrt", "none", "standard"),
        ([], "sqrt", "standard", "sqrt"),
        ([], None, "standard", "standard"),
    ],
)
def test_where_the_rule_comes_from(
    convert: Any, options: list[str], target: str | None, trials: str, rule: str
) -> None:
    text = MINIMAL + "weight-decay: 0.1\n" + (f"width-scaling: {target}\n" if target else "")
    code, said, _ = convert([Trial(t.hidden_size, t.lr, t.loss, rule=trials) for t in curve()], text, *options)
    assert (code, said["rule"]) == (0, rule)


def test_several_widths(convert: Any) -> None:
    trials = curve() + [Trial(64, t.lr, t.loss - 0.2, rule="sqrt") for t in curve(at=-5.2)]
    target = MINIMAL + "weight-decay: 0.1\nwidth-scaling: sqrt\n"
    code, said, _ = convert(trials, target)
    assert (code, said["base_hidden_size"]) == (0, 32)
    assert any("widths 32, 64: the proxy is 32" in w for w in said["warnings"])
    assert math.log2(said["lr"]) == pytest.approx(-6.3, abs=0.1)
    code, said, _ = convert(trials, target, "--base-hidden-size", 64)
    assert math.log2(said["lr"]) == pytest.approx(-5.2, abs=0.1)


def test_ridge(convert: Any, tmp_path: Path) -> None:
    code, said, _ = convert(surface(noise=0.002), MINIMAL + "width-scaling: independent\n")
    assert code == 0
    assert math.log2(said["lr"]) == pytest.approx(-6.15, abs=0.1)
    assert math.log2(said["weight_decay"]) == pytest.approx(-1.15, abs=0.1)
    assert any("ridge" in w for w in said["warnings"])
    code, said, _ = convert(surface(noise=0.002), MINIMAL + "width-scaling: independent\n", "--weight-decay", 0.5)
    assert (code, said["weight_decay"]) == (0, 0.5)


@pytest.mark.parametrize(
    ("trials", "reason"),
    [
        (curve(lrs=range(-10, -6)), "the highest of the grid"),
        (curve(lrs=(-7, -6)), "a fit needs 3"),
        ([Trial(32, t.lr, 6 - t.loss) for t in curve()], "wrong sign of curvature"),
        (curve(lrs=(-10, -6, -2)), "wider than 2 octaves"),
    ],
)
def test_refusals_and_force(convert: Any, trials: list[Trial], reason: str) -> None:
    target = MINIMAL + "weight-decay: 0.1\nwidth-scaling: sqrt\n"
    code, _, error = convert(trials, target)
    assert code == 3 and error.startswith("refused: ") and reason in error
    code, said, _ = convert(trials, target, "--force")
    assert code == 0 and any(reason in w for w in said["warnings"])


def test_a_sweep_that_blew_up_is_refused_and_what_blew_up_is_named(convert: Any) -> None:
    """marin-community/marin 122c5018: written at LR 0.005548 once, with an interval of 0.02 octaves."""
    target = MINIMAL + "weight-decay: 0.1\nwidth-scaling: independent\n"
    losses = {0.004: 3.272, 0.008: 3.264, 0.016: 7.760, 0.032: 7.784}
    sweep = [Trial(32, lr, loss) for lr, loss in losses.items()]
    code, _, error = convert(sweep, target)
    assert code == 3 and "as they blew up: loss 7.76 at LR 0.016, 7.784 at LR 0.032" in error
    valley = [Trial(32, lr, 3.26 + 0.05 * math.log2(lr / 0.004) ** 2) for lr in (0.001, 0.002, 0.004, 0.008)]
    code, said, _ = convert([*valley, *sweep[2:]], target)
    assert (code, said["lr"]) == (0, pytest.approx(0.004, rel=0.01))
    assert "2 runs count as diverged, as they blew up: loss 7.76 at LR 0.016, 7.784 at LR 0.032" in said["warnings"]


def test_what_force_overruled_is_in_the_file(convert: Any, tmp_path: Path) -> None:
    """Each reason a comment of its own, whether flags were added at the end or only values changed."""
    sweep = runs(tmp_path / "runs", lrs=range(-10, -6), num_layers=4, kv_channels=16)
    target = ROOT / "configs" / "example_target_w256.yaml"
    code, said, _ = convert(sweep, target, "--force")
    assert code == 0
    text = (tmp_path / "out.yaml").read_text()
    comments = [line for line in text.splitlines() if line.startswith("# Written by --force against: ")]
    assert len(comments) == 3
    for reason in ("0.007812 is the highest of the grid", "layers: 4 in the proxy", "head size: 16 in the proxy"):
        assert sum(reason in line for line in comments) == 1
        assert sum(reason in line for line in said["warnings"]) == 1
    assert load_yaml(str(tmp_path / "out.yaml"))["lr"] == said["lr"]
    assert convert(runs(tmp_path / "good"), target)[0] == 0
    assert "Written by --force" not in (tmp_path / "out.yaml").read_text()


@pytest.mark.parametrize(
    ("lrs", "interval"),
    [
        (range(-10, -6), [2.0**-8, None]),  # the best LR is the highest of the grid
        (range(-6, -1), [None, 2.0**-5]),
    ],
)
def test_an_interval_at_the_edge_of_the_grid_is_open(
    convert: Any, tmp_path: Path, lrs: Sequence[int], interval: list[float | None]
) -> None:
    code, said, _ = convert(curve(lrs=lrs), MINIMAL + "weight-decay: 0.1\nwidth-scaling: sqrt\n", "--force")
    assert (code, said["lr_interval"]) == (0, interval)
    shown = ["(open)" if end is None else f"{end:.4g}" for end in interval]
    text = (tmp_path / "out.yaml").read_text()
    assert f"the sweep's best point at width 32, its neighbours {shown[0]} to {shown[1]}" in text


def test_all_refusals_come_at_once(convert: Any, tmp_path: Path) -> None:
    """Who heard of the config's only after training more LRs would have trained in vain."""
    sweep = runs(tmp_path / "runs", lrs=range(-10, -6), num_layers=4, kv_channels=16)
    code, _, error = convert(sweep, ROOT / "configs" / "example_target_w256.yaml")
    assert code == 3 and error.count("\n") == 1
    for part in ("highest of the grid", "add 0.01562", "layers: 4", "head size: 16", "--depth-lr"):
        assert part in error


def test_a_mistake_in_the_config_comes_before_a_refusal_of_the_fit(convert: Any) -> None:
    code, _, error = convert(curve(lrs=(-7, -6)), MINIMAL + "width-scaling: sqrt\n")
    assert code == 2 and error.startswith("error: --weight-decay not given")


def test_a_refusal_of_a_wandb_sweep_says_whose_losses_they_are(
    convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [replace(t, source=f"run-{t.lr}.wandb") for t in curve(lrs=range(-10, -6))]
    monkeypatch.setattr("megatron_patch.transfer.convert.read_trials", lambda path: tuple(trials))
    target = MINIMAL + "weight-decay: 0.1\nwidth-scaling: sqrt\n"
    code, _, error = convert(tmp_path, target)
    assert code == 3 and "the losses are that set's" in error and error.count("\n") == 1
    code, said, _ = convert(tmp_path, target, "--force")
    assert code == 0 and any("the losses are that set's" in w for w in said["warnings"])


def test_not_even_force_makes_an_optimum_of_nothing(convert: Any) -> None:
    target = MINIMAL + "weight-decay: 0.1\nwidth-scaling: sqrt\n"
    assert convert([Trial(32, 2.0**x, math.nan) for x in range(3)], target, "--force")[0] == 3


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_layers": 4}, "layers: 4 in the proxy, 2 in the target"),
        ({"kv_channels": 16}, "head size: 16 in the proxy, 32 in the target"),
        (
            {"global_batch_size": 16, "train_iters": 500, "lr_decay_iters": 500, "lr_warmup_iters": 50},
            "sequences a step",
        ),
        ({"train_iters": 2000, "lr_decay_iters": 2000, "lr_warmup_iters": 200}, "training tokens: 1.024e+06"),
        ({"lr_decay_style": "cosine"}, "LR schedule: cosine"),
        ({"lr_warmup_iters": 300}, "LR warmup: 0.3 in the proxy, 0.1"),
        ({"tokenizer_type": "NullTokenizer"}, "tokenizer: NullTokenizer"),
    ],
)
def test_what_the_rule_does_not_cover(convert: Any, tmp_path: Path, changed: Mapping[str, Any], says: str) -> None:
    target = ROOT / "configs" / "example_target_w256.yaml"
    sweep = runs(tmp_path / "runs", **changed)
    code, _, error = convert(sweep, target)
    assert code == 3 and says in error and "--force" in error
    code, said, _ = convert(sweep, target, "--force")
    assert code == 0 and any(says in w for w in said["warnings"])


def test_the_example_target_differs_in_width_only(convert: Any, tmp_path: Path) -> None:
    code, said, _ = convert(runs(tmp_path / "runs"), ROOT / "configs" / "example_target_w256.yaml")
    assert (code, said["rule"], said["base_hidden_size"], said["warnings"]) == (0, "independent", 32, [])


def test_options_beyond_width(convert: Any, tmp_path: Path) -> None:
    target = ROOT / "configs" / "example_target_w256.yaml"
    sweep = runs(tmp_path / "a", train_iters=500, lr_decay_iters=500, lr_warmup_iters=50)
    code, said, _ = convert(sweep, target, "--ema-timescale")
    flags = load_yaml(str(tmp_path / "out.yaml"))
    assert (code, said["weight_decay"], flags["weight-decay"]) == (0, 1.0, 0.5), "twice the steps, half the decay"
    assert "2405.13698" in (tmp_path / "out.yaml").read_text()

    shorter = {"train_iters": 4000, "lr_decay_iters": 4000, "lr_warmup_iters": 400}
    sweep = runs(tmp_path / "b", global_batch_size=2, **shorter)
    code, said, _ = convert(sweep, target, "--batch-lr", "sqrt", "--ema-timescale")
    flags = load_yaml(str(tmp_path / "out.yaml"))
    assert flags["lr"] == pytest.approx(2 * said["lr"], rel=1e-5), "4 times the batch"
    assert flags["weight-decay"] == pytest.approx(2), "a quarter of the steps at twice the LR"

    code, said, _ = convert(runs(tmp_path / "c", num_layers=1), target, "--depth-lr")
    flags = load_yaml(str(tmp_path / "out.yaml"))
    assert flags["lr"] == pytest.approx(said["lr"] / math.sqrt(2), rel=1e-5)
    assert flags["vector-lr"] == said["lr"]
    assert any("residual" in w for w in said["warnings"])


@pytest.mark.parametrize(
    ("sweep", "target", "options", "says"),
    [
        ("hidden_size,lr\n32,0.1\n", MINIMAL, [], "a column loss"),
        ("hidden_size,lr,loss\n32,x,3\n", MINIMAL, [], "line 2 lr 'x'"),
        ("hidden_size,lr,loss\n", MINIMAL, [], "at least one row"),
        (None, MINIMAL, [], "no such file"),
        ("good", "lr: 0.1\n", [], "--target: hidden-size"),
        ("good", "{hidden-size: 128}\n", ["--weight-decay", "0.1"], "without braces"),
        ("good", MINIMAL + "lr: 1\nlr: 2\n", [], "each flag once"),
        ("good", MINIMAL + "width-scaling: cubic\n", [], "--target: width-scaling cubic"),
        ("good", MINIMAL + "width-scaling: custom\nweight-decay: 0.1\n", [], "--lr-width-exponent"),
        ("good", MINIMAL, ["--base-hidden-size", "48"], "--base-hidden-size 48: expected a width of the sweep: 32"),
        (
            "good",
            MINIMAL + "base-hidden-size: 16\nbase-ffn-hidden-size: 40\nweight-decay: 1\n",
            [],
            "--proxy PROXY.yaml",
        ),
        ("good", MINIMAL + "weight-decay: 1\n", ["--ema-timescale"], "the proxy's batch to be known"),
    ],
)
def test_mistakes(convert: Any, tmp_path: Path, sweep: str | None, target: str, options: list[str], says: str) -> None:
    path = tmp_path / "s.csv"
    if sweep is not None:
        path.write_text(to_csv(curve()) if sweep == "good" else sweep)
    code, _, error = convert(path, target, *options)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and says in error


BASED = MINIMAL + "width-scaling: sqrt\nweight-decay: 0.1\n"


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        (BASED, ["--extra-warmup", "exp"], "exactly one of the two with --extra-warmup exp"),
        (
            BASED + "extra-warmup: exp\nextra-warmup-iters: 5\n",
            ["--extra-warmup-fraction", "0.25"],
            "exactly one of the two with --extra-warmup exp",
        ),
        (BASED, ["--extra-warmup-fraction", "0.25"], "--extra-warmup-fraction 0.25: expected --extra-warmup exp"),
        (BASED + "extra-warmup: linear\n", [], "--extra-warmup linear: expected one of none, exp, decay-away"),
        (BASED + "extra-warmup-scope: width-dependent\n", [], "an --extra-warmup to restrict"),
        (BASED + "embedding-weight-decay: -1\n", [], "--embedding-weight-decay -1.0: expected a finite number >= 0"),
        (BASED + "init-scaling: fan-out\n", [], "--init-scaling fan-out: expected one of megatron, fan-in"),
        (BASED + "base-hidden-size: wide\n", ["--rule", "none"], "--base-hidden-size wide: expected an integer"),
        (BASED + "scale-adam-eps: true\n", ["--rule", "none"], "--scale-adam-eps given: expected a width rule"),
        (BASED + "no-scale-output-layer: true\n", ["--rule", "none"], "--no-scale-output-layer given"),
        (BASED + "alignment-tokens: 64\n", [], "--alignment-tokens 64: expected an --alignment-interval"),
    ],
)
def test_what_a_run_would_refuse_is_not_written(convert: Any, target: str, options: list[str], says: str) -> None:
    code, _, error = convert(curve(), target, *options)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and says in error


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ("", ["--extra-warmup", "exp", "--extra-warmup-fraction", "0.25"]),
        ("extra-warmup: exp\nextra-warmup-iters: 5\n", []),
        ("alignment-interval: 10\n", []),  # --metrics-dir or --save may come with the command line
        ("vector-lr: 1e-3\nembedding-weight-decay: 1e-2\n", []),  # texts, says YAML
    ],
)
def test_what_a_run_takes_is_written(convert: Any, more: str, options: list[str]) -> None:
    code, _, error = convert(curve(), BASED + more, *options)
    assert code == 0, error


def test_never_over_the_target(tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.csv").write_text(to_csv(curve()))
    (tmp_path / "t.yaml").write_text(MINIMAL)
    (tmp_path / "link.yaml").symlink_to(tmp_path / "t.yaml")
    for output in ("t.yaml", "link.yaml", "s.csv"):
        words = ("--sweep", tmp_path / "s.csv", "--target", tmp_path / "t.yaml", "--output", tmp_path / output)
        assert tool("transfer_config", *words, "--weight-decay", 0.1) == 2
        assert "--output" in capsys.readouterr().err
    assert (tmp_path / "t.yaml").read_text() == MINIMAL


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("lr: 1\n", "lr: 0.5  # why, was 1\n"),
        ("  lr:   1   # mine\nx: 2\n", "  lr:   0.5  # why, was 1   # mine\nx: 2\n"),
        ("x: 2\r\n--lr: 1\r\ny: 3", "x: 2\r\n--lr: 0.5  # why, was 1\r\ny: 3"),
        ("lr:\nx: 2\n", "lr: 0.5  # why\nx: 2\n"),
        ("lr: 0.50  # mine\n", "lr: 0.50  # mine\n"),
        ('"lr": "1"\n', '"lr": 0.5  # why, was "1"\n'),
        ("x: 2\n", "x: 2\n\n# title\nlr: 0.5  # why\n"),
        ("x: é\nl_r: 1", "x: é\nl_r: 1\n\n# title\nlr: 0.5  # why\n"),
        ("# nothing\n", "# nothing\n\n# title\nlr: 0.5  # why\n"),
    ],
)
def test_editing(before: str, after: str) -> None:
    if before.startswith("  "):
        before, after = before.replace("x:", "  x:"), after.replace("x:", "  x:")
    assert edit("t.yaml", before, {"lr": Change(0.5, "why")}, "title") == after
    assert yaml.safe_load(after)


def test_an_alias_is_not_edited() -> None:
    with pytest.raises(ValueError, match="alias"):
        edit("t.yaml", "x: &a 1\nlr: *a\n", {"lr": Change(0.5, "why")}, "title")
