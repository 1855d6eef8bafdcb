"""The proxy's sizes where no flag gives them: those of the model that Megatron builds from the same command line."""

from collections.abc import Sequence
from typing import Any

import pytest

from megatron_patch.errors import AuditError
from megatron_patch.upstream.width.parameters import spec_of
from tests.support.building import LLAMA_STYLE, Builder, live
from tests.support.pool import Pool, RankFailure
from tests.support.training import global_names

SQRT = "--width-scaling sqrt --base-hidden-size"
MOE = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"
MLA = "--multi-latent-attention --qk-head-dim 16 --qk-pos-emb-head-dim 8"


def fan_ins(argv: Sequence[str], hidden: int, base: int, rule: Sequence[str] = ()) -> tuple[Any, Any, Any]:
    """Base fan-ins of a model by our plan; fan-ins of the same command line at the base width; our flags afterwards.

    Heads are of 32: the proxy has fewer.
    """
    builder = Builder()
    heads = "--num-attention-heads"
    wide = builder.build(
        [*argv, "--hidden-size", str(hidden), heads, str(hidden // 32), *SQRT.split(), str(base), *rule]
    )
    planned = {p.spec.name: p.spec.base_fan_in for p in wide.plan.parameters if p.parameter.dim() > 1}
    settled = {name: value for name, value in vars(wide.args).items() if name.startswith("base_") and value is not None}
    proxy = builder.build([*argv, "--hidden-size", str(base), heads, str(base // 32)])
    return planned, {n: p.shape[-1] for n, p in global_names(proxy.model).items() if p.dim() > 1}, settled


@pytest.mark.parametrize(
    ("argv", "hidden", "base", "settled"),
    [
        (LLAMA_STYLE, 192, 64, {"base_ffn_hidden_size": 128}),  # 512 here: 4, not 3
        (LLAMA_STYLE, 192, 96, {}),  # 512 and 256, as the hidden sizes
        (LLAMA_STYLE.replace("--swiglu", ""), 192, 64, {}),  # 4 times the width at any width
        (f"{LLAMA_STYLE} {MOE}", 192, 64, {"base_moe_ffn_hidden_size": 128}),
        (
            f"{LLAMA_STYLE} {MOE} --num-layers 2 --moe-layer-freq [0,1]",
            192,
            64,
            {"base_ffn_hidden_size": 128, "base_moe_ffn_hidden_size": 128},
        ),
        (f"{LLAMA_STYLE} {MLA}", 192, 64, {"base_ffn_hidden_size": 128, "base_kv_lora_rank": 32}),
    ],
    ids=["swiglu", "swiglu-same-ratio", "gelu", "experts", "experts-and-dense", "mla"],
)
def test_a_base_that_is_left_out_is_what_megatron_builds(
    argv: str, hidden: int, base: int, settled: dict[str, int], pool: Pool
) -> None:
    ((planned, proxys, found),) = pool.run(fan_ins, argv=argv.split(), hidden=hidden, base=base)
    assert planned == proxys
    assert found == {"base_hidden_size": base, **settled}


def test_experts_that_follow_the_mlp_follow_that_of_the_proxy(pool: Pool) -> None:
    argv = f"{LLAMA_STYLE} {MOE} --ffn-hidden-size 256"
    rule = "--base-ffn-hidden-size 96".split()
    ((planned, _, found),) = pool.run(fan_ins, argv=argv.split(), hidden=64, base=32, rule=rule)
    assert found == {"base_hidden_size": 32, "base_ffn_hidden_size": 96, "base_moe_ffn_hidden_size": 96}
    assert {size for name, size in planned.items() if "linear_fc2" in name} == {96}


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (f"{MOE} --ffn-hidden-size 96 --moe-ffn-hidden-size 48 --base-ffn-hidden-size 24", "--base-ffn-hidden-size 24"),
        (f"{MOE} --ffn-hidden-size 96 --base-ffn-hidden-size 24 --base-moe-ffn-hidden-size 32", "--base-ffn-hidden"),
    ],
)
def test_a_base_that_no_layer_uses_is_a_mistake(argv: str, flag: str, pool: Pool) -> None:
    """All layers have experts, none an MLP."""
    words = f"{LLAMA_STYLE} {argv} {SQRT} 16".split()
    with pytest.raises(RankFailure, match=f"{flag}.*: expected a model with a layer that has it .MLP width"):
        pool.run(said_by, argv=words)


def test_a_proxy_without_an_mlp_is_refused(pool: Pool) -> None:
    """8/3 of 16 is less than 64, and Megatron rounds down."""
    with pytest.raises(RankFailure, match=r"--base-hidden-size 16: expected a proxy with a ffn_.*makes it 0"):
        pool.run(said_by, argv=f"{LLAMA_STYLE} {SQRT} 16".split())


def said_by(argv: Sequence[str]) -> list[str]:
    """What a user is warned of while the optimizer is built."""
    import megatron.training

    said: list[str] = []
    megatron.training.print_rank_0 = said.append
    Builder().build(argv)
    return said


def test_what_looks_odd_is_said(pool: Pool) -> None:
    argv = f"{LLAMA_STYLE} --ffn-hidden-size 256 {SQRT}"
    ((fraction),) = pool.run(said_by, argv=[*argv.split(), "48", "--hidden-size", "96", "--ffn-hidden-size", "257"])
    assert [line for line in fraction if "whole number" in line] == [
        "WARNING: --width-scaling: no --base-ffn-hidden-size: by the ratio of the hidden sizes the proxy's is 128.5 to "
        "the 257 here, which is no whole number; give the proxy's, or m = 2 may be wrong"
    ]
    (narrow,) = pool.run(said_by, argv=[*argv.split(), "128"])
    assert sorted(line.split(": ")[2] for line in narrow if "swapped" in line) == [
        "m = 0.5 for ffn_hidden_size",
        "m = 0.5 for hidden_size",
        "m = 0.5 for kv_projection_size",
    ]
    (nothing,) = pool.run(said_by, argv=[*argv.split(), "32"])
    assert not [line for line in nothing if "WARNING" in line]


def decoupled(argv: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Peak LR of every class as it is logged, and of every parameter's live group."""
    from megatron_patch.upstream.width.classes import parameter_classes

    built = Builder().build(argv)
    classes = parameter_classes(built.plan, built.optimizer)
    found = {name: values["max_lr"] for name, values in live(built).items()}
    return {c.label: c.hyperparameters.lr for c in classes}, found


def test_a_class_is_logged_with_what_its_own_group_is_trained_with(pool: Pool) -> None:
    """Without a rule the groups are Megatron's: --decoupled-lr is not --lr."""
    argv = f"{LLAMA_STYLE} --ffn-hidden-size 96 --base-hidden-size 16 --extra-warmup exp --extra-warmup-iters 4"
    ((classes, lrs),) = pool.run(decoupled, argv=[*argv.split(), "--decoupled-lr", "0.005"])
    assert classes == {"embedding": 0.005, "output": 0.005, "matrix": 0.01, "vector": 0.01}
    assert lrs["embedding.word_embeddings.weight"] == lrs["output_layer.weight"] == 0.005


DIMENSIONS = {"hidden_size": 64, "ffn_hidden_size": 256}
BASES = {"hidden_size": 16.0, "ffn_hidden_size": 32.0}


@pytest.mark.parametrize(
    ("name", "fan_in", "m", "assumed"),
    [
        ("vision_projection.linear_fc1.weight", 1024, 4, True),
        ("vision_projection.linear_fc2.weight", 256, 4, True),  # not the model's MLP, by whatever coincidence
        ("decoder.layers.0.mlp.linear_fc2.weight", 256, 8, False),
        ("language_model.decoder.layers.0.mlp.linear_fc2.weight", 256, 8, False),
        ("mtp.layers.0.eh_proj.weight", 128, 4, False),
        ("output_layer.weight", 64, 4, False),
    ],
)
def test_names_mean_something_in_megatrons_own_stacks_alone(name: str, fan_in: int, m: float, assumed: bool) -> None:
    role = "output" if name.startswith("output_layer") else "matrix"
    spec, found = spec_of(name, (8, fan_in), role, DIMENSIONS, BASES)  # type: ignore[arg-type]
    assert (spec.m, found) == (m, assumed)


def test_a_layer_of_megatrons_that_is_another_says_what_to_do() -> None:
    with pytest.raises(AuditError, match=r"is 64: the layer is not what its name says.*put it outside decoder"):
        spec_of("decoder.layers.0.mlp.linear_fc1.weight", (8, 65), "matrix", DIMENSIONS, BASES)
