"""HybridModel against unmodified Megatron's GPT of the same weights, and its metrics against float64."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.hybrids import MAMBA, Groups, MonitoredHybrid, PatchedGroups, in_gpt, renamed
from tests.support.layouts import DISTRIBUTED, EP2, LLAMA, METRICS, MIXTURE, PP2, SAMPLED, SP, STEPS, TP2, differences
from tests.support.monitored import read_lines
from tests.support.pool import Pool
from tests.support.training import MOE, TINY, Outcome, train

LLAMA_LIKE = tuple(
    "--swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights".split()
)
SQRT = ("--width-scaling", "sqrt", "--base-hidden-size", "8", "--base-ffn-hidden-size", "32", "--weight-decay", "0.5")
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
    truth = gpt(pool, *MOE)
    argv = [*TINY, *LLAMA_LIKE, *MOE, "--hybrid-layer-pattern", "*E*E", *EP2, *DISTRIBUTED]
    mine = pool.run(train, ranks=2, argv=argv, steps=4, hooks=PatchedGroups())[0]
    assert mine.losses == pytest.approx(truth.losses, rel=2e-5)
    assert {in_gpt(name) for name in mine.checksums} == set(truth.checksums)


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
    flags += [
        "--save",
        str(tmp_path),
        "--ckpt-format",
        "torch_dist",
        "--no-save-optim",
        "--override-opt-param-scheduler",
    ]
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
            assert my_lines[key][metric] == pytest.approx(line[metric], rel=1e-3), (key, metric)
    if more[0] != "--hybrid-layer-pattern":  # sublayers are measured where their stage is
        assert my_gains.keys() == gains.keys()
    for key in my_gains:
        assert my_gains[key]["gain"] == pytest.approx(gains[key]["gain"], rel=1e-3)
