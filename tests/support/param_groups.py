"""Models and rules with the values of every parameter worked out by hand.

All models are 64 wide with a proxy of 16 (m = 4), and every other dimension has a ratio of its own, so that a layer
that is given another layer's multiplier shows. The base settings are lr 0.01, min_lr 0.001, weight decay 0.1, eps 1e-8.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.building import LLAMA_STYLE, Builder, live

Table = dict[str, tuple[str, float]]  # parameter -> class, m
TWO_RANKS = "--tensor-model-parallel-size 2 --sequence-parallel"


def layer(n: int, *tables: Table) -> Table:
    return {f"decoder.layers.{n}.{name}": entry for table in tables for name, entry in table.items()}


ENDS: Table = {
    "embedding.word_embeddings.weight": ("embedding", 1),
    "decoder.final_layernorm.weight": ("vector", 1),
    "output_layer.weight": ("output", 64 / 16),
}
NORMS: Table = {"input_layernorm.weight": ("vector", 1), "pre_mlp_layernorm.weight": ("vector", 1)}
# 4 heads of 24, the proxy's heads times head size is 48: 96 / 48.
ATTENTION: Table = {
    "self_attention.linear_qkv.weight": ("matrix", 64 / 16),
    "self_attention.linear_qkv.bias": ("vector", 1),
    "self_attention.linear_proj.weight": ("matrix", 96 / 48),
}
DENSE_MLP: Table = {"mlp.linear_fc1.weight": ("matrix", 64 / 16), "mlp.linear_fc2.weight": ("matrix", 96 / 32)}
EXPERTS: Table = {
    f"mlp.experts.local_experts.{i}.{name}": entry
    for i in range(4)
    for name, entry in {"linear_fc1.weight": ("matrix", 64 / 16), "linear_fc2.weight": ("matrix", 48 / 8)}.items()
}
MOE_MLP: Table = {
    "mlp.router.weight": ("matrix", 64 / 16),
    **EXPERTS,
    "mlp.shared_experts.linear_fc1.weight": ("matrix", 64 / 16),
    "mlp.shared_experts.linear_fc2.weight": ("matrix", 80 / 16),
    "mlp.shared_experts.gate_weight": ("matrix", 64 / 16),
}
QK_NORMS: Table = {"self_attention.q_layernorm.weight": ("qk", 1), "self_attention.k_layernorm.weight": ("qk", 1)}


@dataclass(frozen=True)
class Model:
    flags: str
    base: str
    table: Table


LLAMA = Model(
    f"{LLAMA_STYLE} --ffn-hidden-size 96 --kv-channels 24 --group-query-attention --num-query-groups 2 --add-qkv-bias",
    "--base-hidden-size 16 --base-ffn-hidden-size 32 --base-kv-projection-size 48",
    {**ENDS, **layer(0, NORMS, ATTENTION, DENSE_MLP)},
)
MODELS = {
    "llama": LLAMA,
    "moe": Model(
        f"{LLAMA.flags} --num-layers 2 --moe-layer-freq [0,1] --num-experts 4 --moe-router-topk 2 "
        "--moe-ffn-hidden-size 48 --moe-shared-expert-intermediate-size 80 --moe-shared-expert-gate "
        "--moe-token-dispatcher-type alltoall",
        f"{LLAMA.base} --base-moe-ffn-hidden-size 8 --base-moe-shared-expert-intermediate-size 16",
        {**ENDS, **layer(0, NORMS, ATTENTION, DENSE_MLP), **layer(1, NORMS, ATTENTION, MOE_MLP)},
    ),
    "mla": Model(
        f"{LLAMA_STYLE} --ffn-hidden-size 96 --multi-latent-attention --qk-layernorm --q-lora-rank 24 "
        "--kv-lora-rank 40 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 20",
        "--base-hidden-size 16 --base-ffn-hidden-size 32 --base-q-lora-rank 8 --base-kv-lora-rank 20 "
        "--base-kv-projection-size 16",
        {
            **ENDS,
            **layer(
                0,
                NORMS,
                {
                    "self_attention.linear_q_down_proj.weight": ("matrix", 64 / 16),
                    "self_attention.linear_q_up_proj.weight": ("matrix", 24 / 8),
                    "self_attention.linear_kv_down_proj.weight": ("matrix", 64 / 16),
                    "self_attention.linear_kv_up_proj.weight": ("matrix", 40 / 20),
                    "self_attention.linear_proj.weight": ("matrix", 4 * 20 / 16),
                    "self_attention.q_layernorm.weight": ("qk", 1),
                    # Not one of those that --apply-wd-to-qk-layernorm means: it normalises a latent, not keys.
                    "self_attention.kv_layernorm.weight": ("vector", 1),
                },
                DENSE_MLP,
            ),
        },
    ),
    # GPT-2: tied embeddings, learned positions, biases everywhere; and no base size but the hidden one, so all m are 4.
    "tied": Model(
        "--position-embedding-type learned_absolute",
        "--base-hidden-size 16",
        {
            "embedding.word_embeddings.weight": ("embedding", 1),
            "embedding.position_embeddings.weight": ("embedding", 1),
            "decoder.final_layernorm.weight": ("vector", 1),
            "decoder.final_layernorm.bias": ("vector", 1),
            **layer(
                0,
                NORMS,
                {
                    "input_layernorm.bias": ("vector", 1),
                    "pre_mlp_layernorm.bias": ("vector", 1),
                    "self_attention.linear_qkv.weight": ("matrix", 4),
                    "self_attention.linear_qkv.bias": ("vector", 1),
                    "self_attention.linear_proj.weight": ("matrix", 4),
                    "self_attention.linear_proj.bias": ("vector", 1),
                    "mlp.linear_fc1.weight": ("matrix", 4),
                    "mlp.linear_fc1.bias": ("vector", 1),
                    "mlp.linear_fc2.weight": ("matrix", 4),
                    "mlp.linear_fc2.bias": ("vector", 1),
                },
            ),
        },
    ),
    # Mamba, attention, experts, MLP, and a predicted token; the mixer is 60 wide inside.
    "hybrid": Model(
        f"{LLAMA.flags} --hybrid-layer-pattern M*E-/*- --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 "
        "--moe-shared-expert-intermediate-size 80 --moe-shared-expert-gate --moe-token-dispatcher-type alltoall "
        "--mamba-num-heads 6 --mamba-head-dim 10 --mamba-state-dim 4 --mamba-num-groups 2",
        f"{LLAMA.base} --base-moe-ffn-hidden-size 8 --base-moe-shared-expert-intermediate-size 16 "
        "--base-mamba-inner-size 20",
        {
            "embedding.word_embeddings.weight": ("embedding", 1),
            "decoder.final_norm.weight": ("vector", 1),
            "output_layer.weight": ("output", 64 / 16),
            **layer(
                0,
                {
                    "norm.weight": ("vector", 1),
                    "mixer.in_proj.weight": ("matrix", 64 / 16),
                    "mixer.out_proj.weight": ("matrix", 60 / 20),
                    "mixer.conv1d_weight": ("matrix", 1),
                    **{
                        f"mixer.{name}": ("vector", 1)
                        for name in ("conv1d_bias", "A_log", "D", "dt_bias", "norm.weight")
                    },
                },
            ),
            **layer(1, {"input_layernorm.weight": ("vector", 1)}, ATTENTION),
            **layer(2, {"pre_mlp_layernorm.weight": ("vector", 1)}, MOE_MLP),
            **layer(3, {"pre_mlp_layernorm.weight": ("vector", 1)}, DENSE_MLP),
            **{f"mtp.layers.0.{name}.weight": ("vector", 1) for name in ("enorm", "hnorm", "final_layernorm")},
            "mtp.layers.0.eh_proj.weight": ("matrix", 128 / 32),
            **{
                f"mtp.layers.0.mtp_model_layer.{name.removeprefix('decoder.')}": entry
                for name, entry in {
                    **layer(0, {"input_layernorm.weight": ("vector", 1)}, ATTENTION),
                    **layer(1, {"pre_mlp_layernorm.weight": ("vector", 1)}, DENSE_MLP),
                }.items()
            },
        },
    ),
    "qk-norm": Model(
        f"{LLAMA.flags} --qk-layernorm", LLAMA.base, {**ENDS, **layer(0, NORMS, ATTENTION, QK_NORMS, DENSE_MLP)}
    ),
    "qk-norm-decayed": Model(
        f"{LLAMA.flags} --qk-layernorm --apply-wd-to-qk-layernorm",
        LLAMA.base,
        {**ENDS, **layer(0, NORMS, ATTENTION, QK_NORMS, DENSE_MLP)},
    ),
}


@dataclass(frozen=True)
class Case:
    """Flags, and what they mean as factors on the base LR, weight decay and eps."""

    flags: str
    lr: Callable[[float], float]
    weight_decay: Callable[[float], float]
    embedding_decay: float = 1.0
    vector_decay: float = 1.0  # of QK layernorms under --apply-wd-to-qk-layernorm
    vector_lr: float = 1.0
    eps: Callable[[float], float] = lambda m: 1.0
    output: bool = True


CASES = {
    "none": Case("--width-scaling none", lambda m: 1, lambda m: 1),
    "standard": Case("--width-scaling standard", lambda m: 1 / m, lambda m: 1),
    "independent": Case("--width-scaling independent", lambda m: 1 / m, lambda m: m),
    "sqrt": Case("--width-scaling sqrt", lambda m: 1 / math.sqrt(m), math.sqrt),
    "sqrt-decay": Case("--width-scaling sqrt-decay", lambda m: 1 / m, math.sqrt, embedding_decay=0),
    "no-decay": Case("--width-scaling no-decay", lambda m: 1 / m, lambda m: 0, embedding_decay=0, vector_decay=0),
    "custom": Case(
        "--width-scaling custom --lr-width-exponent 2 --wd-width-exponent 0.5 --scale-adam-eps "
        "--vector-lr 0.03 --embedding-weight-decay 0.025",
        lambda m: 1 / (m * m),
        math.sqrt,
        embedding_decay=0.25,
        vector_lr=3,
        eps=lambda m: 1 / (m * m),
    ),
    "output-unscaled": Case(
        "--width-scaling independent --no-scale-output-layer", lambda m: 1 / m, lambda m: m, output=False
    ),
    # The two-phase sweep's second phase on the proxy itself: no rule, and yet two LRs.
    "vector-lr-alone": Case("--vector-lr 0.002", lambda m: 1, lambda m: 1, vector_lr=0.2),
}


def expected(model: str, case: Case) -> dict[str, dict[str, float]]:
    """The table of a model times the factors of a case."""
    return expected_of(MODELS[model].table, model, case)


def expected_of(table: Table, model: str, case: Case) -> dict[str, dict[str, float]]:
    values = {}
    for name, (kind, m) in table.items():
        lr, decay, eps = case.lr(m), case.weight_decay(m), case.eps(m)
        if kind == "embedding":
            lr, decay, eps = case.vector_lr, case.embedding_decay, 1
        elif kind == "vector" or (kind == "qk" and model != "qk-norm-decayed"):
            lr, decay, eps = case.vector_lr, 0, 1
        elif kind == "qk":
            lr, decay, eps = case.vector_lr, case.vector_decay, 1
        elif kind == "output" and not case.output:
            lr, decay, eps = 1, 1, 1
        values[name] = {
            "max_lr": 0.01 * lr,
            "min_lr": 0.001 * lr,
            "lr": 0.01 * lr,
            "weight_decay": 0.1 * decay,
            "eps": 1e-8 * eps,
        }
    return values


def stacked(model: str, layers: int) -> Table:
    """The table of a model of so many layers. The MoE model has two, a dense one and one of experts."""
    first = {name: entry for name, entry in MODELS[model].table.items() if ".layers.0." in name}
    more = {name.replace("s.0.", f"s.{n}."): entry for n in range(1, layers) for name, entry in first.items()}
    return MODELS[model].table if model == "moe" else MODELS[model].table | more


def argv(model: str, case: Case, more: str = "") -> list[str]:
    base = MODELS[model].base if "--width-scaling" in case.flags and "none" not in case.flags else ""
    return f"{MODELS[model].flags} {case.flags} {base} {more}".split()


def build_all(runs: list[list[str]], directory: str = "") -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each command line: the live values of this rank, and what hyperparameters.json says."""
    builder = Builder()
    results = []
    for i, run in enumerate(runs):
        metrics = f"{directory}/{i}"
        built = builder.build([*run, "--metrics-dir", metrics] if directory else run)
        file = Path(metrics, "hyperparameters.json")
        results.append((live(built), json.loads(file.read_text()) if directory and built.args.rank == 0 else {}))
    return results


def assert_same(got: dict[str, dict[str, float]], wanted: dict[str, dict[str, float]], where: str) -> None:
    assert sorted(got) == sorted(wanted), where
    for name, values in wanted.items():
        for key, value in values.items():
            assert got[name][key] == pytest.approx(value, rel=1e-12, abs=0), f"{where}: {key} of {name}"
