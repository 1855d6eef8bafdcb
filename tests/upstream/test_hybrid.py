"""HybridModel against unmodified Megatron's GPT of the same weights, and its metrics against float64."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.hybrids import MAMBA, Groups, MixerInputs, MonitoredHybrid, PatchedGroups, in_gpt, renamed
from tests.support.layouts import DISTRIBUTED, EP2, LLAMA, METRICS, MIXTURE, PP2, SAMPLED, SP, STEPS, TP2, differences
from tests.support.monitored import read_lines
from tests.support.observed import ObservedWithPatch, bits
from tests.support.pool import Pool, RankFailure
from tests.support.training import MOE, TINY, Outcome, train

LLAMA_LIKE = tuple(
    "--swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights".split()
)
SQRT = ("--width-scaling", "sqrt", "--base-hidden-size", "8", "--ffn-hidden-size", "128", "--weight-decay", "0.5")
DENSE, STAGED = ("--hybrid-layer-pattern", "*-*-"), ("--hybrid-layer-pattern", "*-|*-")


def gpt(pool: Pool, *flags: str, hooks: Any = None, steps: int = 4) -> Outcome:
    """Unmodified Megatron on one rank; on a rank for each stage where there are some, which draw other weights."""
    argv, ranks = [*TINY, *LLAMA_LIKE, *flags], 2 if PP2[0] in flags else 1
    outcome: Outcome = pool.run(train, ranks=ranks, argv=argv, steps=steps, hooks=hooks or Groups())[0]
    return outcome


LAYOUTS = {
    "one": (1, DENSE),
    "tp2-sp-distributed": (2, (*DENSE, *TP2, *SP, *DISTRIBUTED)),
    "dp2-distributed": (2, (*DENSE, *DISTRIBUTED)),
    "pp2": (2, (*STAGED, *PP2)),
    "tp2-pp2": (4, (*STAGED, *TP2, *PP2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hybrid_model_is_unmodified_megatrons_gpt(pool: Pool, layout: str) -> None:
    """With a rule at the base width, which changes nothing: losses, gradient norms and every final weight."""
    ranks, flags = LAYOUTS[layout]
    truth = gpt(pool, *(PP2 if PP2[0] in flags else ()))
    identity = ["--width-scaling", "independent", "--base-hidden-size", "32"]
    argv = [*TINY, *LLAMA_LIKE, *flags, *identity]
    mine = pool.run(train, ranks=ranks, argv=argv, steps=4, hooks=PatchedGroups())[0]
    exact = 1e-12 if ranks == 1 else 2e-5
    assert mine.losses == pytest.approx(truth.losses, rel=exact)
    assert mine.grad_norms == pytest.approx(truth.grad_norms, rel=exact)
    norms = {in_gpt(name): checksum.norm for name, checksum in mine.checksums.items()}
    assert norms == pytest.approx({name: checksum.norm for name, checksum in truth.checksums.items()}, rel=exact)


def test_experts_of_a_hybrid_model_are_those_of_the_gpt(pool: Pool) -> None:
    shared = [*TINY, *LLAMA_LIKE, *MOE, *EP2, *DISTRIBUTED]
    truth = pool.run(train, ranks=2, argv=shared, steps=4, hooks=Groups())[0]
    mine = pool.run(train, ranks=2, argv=[*shared, "--hybrid-layer-pattern", "*E*E"], steps=4, hooks=PatchedGroups())[0]
    assert mine.losses == pytest.approx(truth.losses, rel=1e-12)
    norms = {in_gpt(name): checksum.norm for name, checksum in mine.checksums.items()}
    assert norms == pytest.approx({name: checksum.norm for name, checksum in truth.checksums.items()}, rel=1e-12)


@pytest.mark.parametrize("layout", ["one", "tp2-sp-distributed", "pp2"])
def test_groups_by_a_rule_are_those_of_the_gpt(pool: Pool, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    one = gpt(pool, *SQRT, hooks=PatchedGroups(), steps=1).extra
    outcomes = pool.run(train, ranks=ranks, argv=[*TINY, *LLAMA_LIKE, *flags, *SQRT], steps=1, hooks=PatchedGroups())
    live: dict[str, Any] = {}
    for outcome in outcomes:
        live |= outcome.extra
    assert renamed(live) == one
    # By hand, so that both cannot be wrong in the same way: m = 4 for all, lr / 2 and weight decay * 2.
    fc2 = live["decoder.layers.3.mlp.linear_fc2.weight"]
    assert (fc2["max_lr"], fc2["weight_decay"]) == (0.005, 1.0)
    assert live["decoder.layers.0.input_layernorm.weight"]["weight_decay"] == 0.0
    assert live["embedding.word_embeddings.weight"]["max_lr"] == 0.01


MEASURED = {
    "one": (LLAMA, 1, 1, DENSE),
    "tp2-sp": (LLAMA, 2, 1, (*DENSE, *TP2, *SP)),
    "tp2-dp2-distributed": (LLAMA, 4, 2, (*DENSE, *TP2, *DISTRIBUTED)),
    "pp2": (LLAMA, 2, 1, (*STAGED, *PP2)),
    "moe-ep2-dp2-distributed": (MIXTURE, 4, 4, ("--hybrid-layer-pattern", "*E*E", *EP2, *DISTRIBUTED)),
}


@pytest.mark.parametrize("layout", MEASURED)
def test_every_metric_is_that_of_the_gpt_in_float64(pool: Pool, tmp_path: Path, layout: str) -> None:
    model, ranks, data_ranks, flags = MEASURED[layout]
    hooks = MonitoredHybrid(str(tmp_path), spectral=1, tokens=SAMPLED)
    pool.run(train, ranks=ranks, argv=[*TINY, *model.flags(), *flags], steps=STEPS, hooks=hooks)
    worst = differences(model, renamed(read_lines(tmp_path)), data_ranks)
    assert max(worst[metric][0] for metric in METRICS) < 1e-5, worst
    assert worst["top_singular_value"][0] < 1e-3, worst


# --- Mamba -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, (*TP2, *SP, *DISTRIBUTED)),
        (2, ("--hybrid-layer-pattern", "M*|M-", *PP2)),
        (1, ("--disable-mamba-mem-eff-path",)),
    ],
    ids=["tp2-sp-distributed", "pp2", "no-mem-eff-path"],
)
def test_mamba_goes_on_as_on_one_rank(pool: Pool, tmp_path: Path, ranks: int, more: tuple[str, ...]) -> None:
    """From one checkpoint, since a mixer draws other weights at another tensor-parallel size."""
    flags = [*TINY, *LLAMA_LIKE, *MAMBA, *SQRT, "--hybrid-layer-pattern", "M*M-", "--train-iters", "6"]
    flags += ["--save", str(tmp_path), "--save-interval", "3", "--ckpt-format", "torch_dist", "--no-save-optim"]
    pool.run(train, argv=flags, steps=3, hooks=PatchedGroups())
    loading = [*flags[: flags.index("--save")], "--load", str(tmp_path), "--no-load-rng", "--no-load-optim"]
    results = []
    for number, layout in ((1, ()), (ranks, more)):
        folder = tmp_path / f"metrics{len(results)}"
        measure = ["--alignment-interval", "1", "--alignment-tokens", "1000", "--metrics-dir", str(folder)]
        outcome = pool.run(train, ranks=number, argv=[*loading, *layout, *measure], steps=6, hooks=PatchedGroups())[0]
        results.append((outcome, read_lines(folder), read_lines(folder, "sublayers")))
    (one, lines, gains), (mine, my_lines, my_gains) = results
    assert mine.losses == pytest.approx(one.losses, rel=2e-5)
    assert my_lines.keys() == lines.keys()
    layers = {layer for _, layer in lines}
    assert {f"decoder.layers.{i}.mixer.{name}_proj" for i in (0, 2) for name in ("in", "out")} <= layers
    assert {f"decoder.layers.{i}.mixer" for i in (0, 2)} <= {layer for _, layer in gains}
    for key, line in lines.items():
        for metric in METRICS:
            if line[metric] is None:  # the first step of a new schedule has no LR
                assert (key[0], my_lines[key][metric]) == (4, None)
            else:
                assert my_lines[key][metric] == pytest.approx(line[metric], rel=1e-3), (key, metric)
    if more[0] != "--hybrid-layer-pattern":  # sublayers are measured where their stage is
        assert my_gains.keys() == gains.keys()
    for key in my_gains:
        assert my_gains[key]["gain"] == pytest.approx(gains[key]["gain"], rel=1e-3)


def test_metrics_of_a_mixer_are_those_of_full_matrices_in_float64(pool: Pool, tmp_path: Path) -> None:
    """‖WX‖ / (‖W‖ ‖X‖) and its kin (arXiv 2510.19093, section 5), from all tokens of the first microbatch."""
    flags = [*TINY, *LLAMA_LIKE, *MAMBA, *SQRT, "--hybrid-layer-pattern", "M*", "--lr-warmup-iters", "0"]
    flags += ["--alignment-interval", "1", "--alignment-tokens", "1000", "--metrics-dir", str(tmp_path)]
    steps = pool.run(train, argv=flags, steps=3, hooks=MixerInputs())[0].extra
    lines = read_lines(tmp_path)
    for iteration, step in enumerate(steps, start=1):
        assert step.keys() == {"decoder.layers.0.mixer.in_proj", "decoder.layers.0.mixer.out_proj"}
        for name, (x, before, after) in step.items():
            line = lines[iteration, name]
            x, w = x.double(), before.double()
            update = after.double() - (1 - line["lr"] * line["weight_decay"]) * w
            expected = {
                "weight_norm": w.norm(),
                "update_norm": update.norm(),
                "weight_alignment": (x @ w.T).norm() / (x.norm() * w.norm()),
                "update_alignment": (x @ update.T).norm() / (x.norm() * update.norm()),
            }
            assert (line["tokens"], line["m"]) == (len(x), 4.0)
            for metric, value in expected.items():
                assert line[metric] == pytest.approx(float(value), rel=1e-4), (name, metric)


# --- a GPT's checkpoint ----------------------------------------------------------------------------------------------

HALF = 4
WARMUP = ("--extra-warmup", "decay-away")
OPTIMIZERS = {
    "one": ((), ()),
    "distributed-tp2": ((*DISTRIBUTED, "--dist-ckpt-optim-fully-reshardable"), TP2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gpt_goes_on_as_a_hybrid_model(pool: Pool, tmp_path: Path, optimizer: str) -> None:
    """Where Megatron translates the checkpoint: the run that went on as a GPT is the truth, to the last bit."""
    sharding, later = OPTIMIZERS[optimizer]
    ranks = 2 if sharding else 1
    common = [*TINY, *LLAMA_LIKE, *SQRT, *WARMUP, "--train-iters", str(2 * HALF), *sharding]
    measure = ["--alignment-interval", "1", "--alignment-tokens", "1000"]
    saving = ["--save", str(tmp_path / "c"), "--save-interval", str(HALF), "--ckpt-format", "torch_dist"]
    first = [*common, *measure, *saving, "--metrics-dir", str(tmp_path / "first")]
    pool.run(train, ranks=ranks, argv=first, steps=HALF, hooks=ObservedWithPatch())
    outcomes = []
    for place, model in (("gpt", ()), ("hybrid", DENSE)):
        argv = [
            *common,
            *measure,
            *model,
            *later,
            "--load",
            str(tmp_path / "c"),
            "--metrics-dir",
            str(tmp_path / place),
        ]
        outcomes.append(pool.run(train, ranks=ranks, argv=argv, steps=2 * HALF, hooks=ObservedWithPatch())[0])
        assert any("successfully loaded checkpoint" in text for text in pool.printed)
    truth, mine = outcomes
    assert len(truth.losses) == HALF
    assert bits(mine.losses) == bits(truth.losses)
    assert bits(mine.grad_norms) == bits(truth.grad_norms)
    assert mine.extra.rates == truth.extra.rates, "the schedule, warmup included, goes on where it was"
    assert mine.extra.adam_steps == truth.extra.adam_steps == {HALF}
    assert {in_gpt(name): each for name, each in mine.checksums.items()} == truth.checksums
    for name in ("alignment", "equilibrium"):  # the second holds what the forecast predicts since the very start
        lines, expected = (read_lines(tmp_path / place, name) for place in ("hybrid", "gpt"))
        named = {key: {**line, "layer": in_gpt(line["layer"])} for key, line in renamed(lines).items()}
        assert named == expected


def test_another_rule_is_refused_across_models_too(pool: Pool, tmp_path: Path) -> None:
    common = [*TINY, *LLAMA_LIKE, "--train-iters", "4"]
    saving = ["--save", str(tmp_path), "--save-interval", "2", "--ckpt-format", "torch_dist"]
    pool.run(train, argv=[*common, *SQRT, *saving], steps=2, hooks=PatchedGroups())
    other = [*common, *DENSE, *SQRT, "--width-scaling", "independent", "--load", str(tmp_path)]
    with pytest.raises(RankFailure, match="--width-scaling: sqrt -> independent"):
        pool.run(train, argv=other, steps=4, hooks=PatchedGroups())


# --- --reference-run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proxy", ["gpt", "hybrid"])
def test_a_proxy_meets_a_target_of_the_other_kind(pool: Pool, tmp_path: Path, proxy: str) -> None:
    """The target is its own proxy, as the other kind of model: every ratio is 1, and no layer is left over."""
    common = [
        *TINY,
        *LLAMA_LIKE,
        *SQRT,
        "--train-iters",
        "4",
        "--alignment-interval",
        "1",
        "--alignment-tokens",
        "1000",
    ]
    kinds = {"gpt": (), "hybrid": DENSE}
    target = "hybrid" if proxy == "gpt" else "gpt"
    first = [*common, *kinds[proxy], "--metrics-dir", str(tmp_path / "proxy")]
    pool.run(train, argv=first, steps=4, hooks=PatchedGroups())
    then = [
        *common,
        *kinds[target],
        "--metrics-dir",
        str(tmp_path / "target"),
        "--reference-run",
        str(tmp_path / "proxy"),
    ]
    pool.run(train, argv=then, steps=4, hooks=PatchedGroups())
    assert not any("no counterpart" in text for text in pool.printed)
    lines = read_lines(tmp_path / "target", "transfer_check")
    assert {layer for _, layer in lines} == {layer for _, layer in read_lines(tmp_path / "target")}
    assert all(line["ratio"] == pytest.approx(1.0, rel=1e-6) for line in lines.values())
