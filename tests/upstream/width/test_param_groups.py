"""Every parameter of real models in Megatron's live param groups, against tables worked out by hand.

All models are 64 wide with a proxy of 16 (m = 4), and every other dimension has a ratio of its own, so that a layer
that is given another layer's multiplier shows. The base settings are lr 0.01, min_lr 0.001, weight decay 0.1, eps 1e-8.
"""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.building import LLAMA_STYLE, Builder, live
from tests.support.pool import Pool

Table = dict[str, tuple[str, float]]  # parameter -> class, m

TWO_RANKS = "--tensor-model-parallel-size 2 --sequence-parallel"


def layer(n: int, *tables: Table) -> Table:
    return {f"decoder.layers.{n}.{name}": entry for table in tables for name, entry in table.items()}


# --- the models ------------------------------------------------------------------------------------------------------

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
    "qk-norm": Model(
        f"{LLAMA.flags} --qk-layernorm", LLAMA.base, {**ENDS, **layer(0, NORMS, ATTENTION, QK_NORMS, DENSE_MLP)}
    ),
    "qk-norm-decayed": Model(
        f"{LLAMA.flags} --qk-layernorm --apply-wd-to-qk-layernorm",
        LLAMA.base,
        {**ENDS, **layer(0, NORMS, ATTENTION, QK_NORMS, DENSE_MLP)},
    ),
}

# --- the rules -------------------------------------------------------------------------------------------------------


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


def argv(model: str, case: Case, more: str = "") -> list[str]:
    base = MODELS[model].base if "--width-scaling" in case.flags and "none" not in case.flags else ""
    return f"{MODELS[model].flags} {case.flags} {base} {more}".split()


# --- jobs ------------------------------------------------------------------------------------------------------------


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


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_gets_what_its_own_fan_in_says(model: str, tensor_parallel: int, pool: Pool, tmp_path: Path):
    """The live groups after set-up, for every rule; split over two ranks a wrong (local) fan-in would halve m."""
    layout = TWO_RANKS if tensor_parallel == 2 else ""
    runs = [argv(model, case, layout) for case in CASES.values()]
    ranks = pool.run(build_all, ranks=tensor_parallel, runs=runs, directory=str(tmp_path), timeout=300)
    for results in ranks:
        for (name, case), (values, _) in zip(CASES.items(), results, strict=True):
            assert_same(values, expected(model, case), name)
    for (name, case), (_, file) in zip(CASES.items(), ranks[0], strict=True):
        wanted = expected(model, case)
        written = {p["name"]: p for p in file["parameters"]}
        assert sorted(written) == sorted(wanted), name
        scaled = "--base-hidden-size" in argv(model, case)
        for parameter, (kind, m) in MODELS[model].table.items():
            entry = written[parameter]
            assert entry["class"] == {"qk": "vector"}.get(kind, kind), parameter
            assert entry["m"] == pytest.approx(m if scaled else 1, rel=1e-12), parameter
            assert entry["lr"] == pytest.approx(wanted[parameter]["max_lr"], rel=1e-12), parameter
            assert entry["weight_decay"] == pytest.approx(wanted[parameter]["weight_decay"], rel=1e-12), parameter
            assert entry["eps"] == pytest.approx(wanted[parameter]["eps"], rel=1e-12), parameter


def stacked(model: str, layers: int) -> Table:
    """The table of a model of so many layers. The MoE model has two, a dense one and one of experts."""
    first = {name: entry for name, entry in MODELS[model].table.items() if ".layers.0." in name}
    more = {name.replace("s.0.", f"s.{n}."): entry for n in range(1, layers) for name, entry in first.items()}
    return MODELS[model].table if model == "moe" else MODELS[model].table | more


OPTIMIZERS = {
    "bf16": "--bf16",
    "distributed": "--use-distributed-optimizer",
    "distributed-bf16": "--use-distributed-optimizer --bf16",
}
LAYOUTS = [
    # Two replicas; the distributed optimizer gives each a part of the parameters, some of them cut in two.
    *[("llama", optimizer) for optimizer in OPTIMIZERS.values()],
    ("moe", OPTIMIZERS["distributed-bf16"]),
    ("llama", TWO_RANKS),
    ("llama", "--pipeline-model-parallel-size 2"),
    # Interleaved stages: rank 0 has the first and the third layer, as layer 0 of two chunks.
    (
        "llama",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
        "--microbatch-group-size-per-virtual-pipeline-stage 2",
    ),
    # One stage of nothing but the embedding: it has nothing to scale, and that is no mistake.
    ("llama", "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E|ttL"),
    # The last stage holds a second copy of the embedding, in the place of the LM head.
    ("tied", "--pipeline-model-parallel-size 2"),
    ("tied", "--pipeline-model-parallel-size 2 --use-distributed-optimizer --bf16"),
    ("moe", "--expert-model-parallel-size 2"),
    ("moe", "--expert-model-parallel-size 2 --use-distributed-optimizer"),
    ("moe", TWO_RANKS),
    # Experts are whole on each rank although everything else is split: their fan-in must not be doubled.
    ("moe", f"{TWO_RANKS} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
]


@pytest.fixture(scope="module")
def on_one_rank(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Any]:
    """What hyperparameters.json says of a model of so many layers on one rank."""

    @functools.cache
    def parameters(model: str, layers: int) -> Any:
        run = argv(model, CASES["custom"], f"--num-layers {layers}")
        ((_, file),) = pool.run(build_all, runs=[run], directory=str(tmp_path_factory.mktemp("one")))[0]
        return file["parameters"]

    return parameters


@pytest.mark.parametrize(("model", "layout"), LAYOUTS)
def test_layout_and_optimizer_change_no_number_and_no_name(
    model: str, layout: str, pool: Pool, tmp_path: Path, on_one_rank: Callable[[str, int], Any]
):
    """Two ranks and any optimizer give every parameter what one rank gives it, and the file says the same."""
    layers = 4 if "virtual" in layout else 2
    table = stacked(model, layers)
    run = argv(model, CASES["custom"], f"--num-layers {layers} {layout}")
    ranks = pool.run(build_all, ranks=2, runs=[run], directory=str(tmp_path))
    union: dict[str, dict[str, float]] = {}
    for ((values, _),) in ranks:
        for name, value in values.items():
            # The last stage's copy of a tied embedding is no parameter of the whole model.
            whole = name.replace("output_layer", "embedding.word_embeddings") if model == "tied" else name
            assert union.setdefault(whole, value) == value, name
    assert_same(union, expected_of(table, model, CASES["custom"]), layout)
    (_, file) = ranks[0][0]
    assert [p["name"] for p in file["parameters"]] == sorted(table)
    assert file["parameters"] == on_one_rank(model, layers)


# --- one step with zero gradients ------------------------------------------------------------------------------------


def shrink_all(runs: list[list[str]]) -> list[dict[str, float]]:
    """For each command line, by how much the first optimizer step shrinks each parameter when all gradients are 0."""
    import torch

    from tests.support.building import groups_of
    from tests.support.training import global_names

    builder = Builder()
    results = []
    for run in runs:
        built = builder.build(run)
        names = {id(parameter): name for name, parameter in global_names(built.model).items()}
        stepped = [(names[id(parameter)], tensor) for _, tensor, parameter in groups_of(built.optimizer)]
        with torch.no_grad():
            for _, tensor in stepped:
                tensor.add_(1.0)  # biases start at 0 and would show no decay
        before = [tensor.detach().double().clone() for _, tensor in stepped]
        for chunk in built.model:
            chunk.zero_grad_buffer()
        assert built.optimizer.step()[0]
        shrink = {}
        for (name, tensor), old in zip(stepped, before, strict=True):
            kept = tensor.detach().double() / old
            assert kept.max() - kept.min() < 1e-6, f"{name} did not shrink as a whole"
            shrink[name] = 1 - float(kept.mean())
        results.append(shrink)
    return results


# rule: what is left of lr 0.01 times weight decay 0.1 for a matrix of multiplier m; for embeddings.
SHRINK: dict[str, tuple[Callable[[float], float], float]] = {
    "none": (lambda m: 0.001, 0.001),
    "standard": (lambda m: 0.001 / m, 0.001),
    "independent": (lambda m: 0.001, 0.001),
    "sqrt": (lambda m: 0.001, 0.001),
    "sqrt-decay": (lambda m: 0.001 / math.sqrt(m), 0),
    "no-decay": (lambda m: 0, 0),
}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(1, ""), (1, "--bf16"), (2, "--use-distributed-optimizer --bf16"), (2, TWO_RANKS)],
    ids=["fp32", "bf16", "distributed-bf16", "tensor-parallel"],
)
def test_a_step_with_zero_gradients_shrinks_weights_by_the_rules_product(ranks: int, layout: str, pool: Pool):
    """AdamW multiplies by 1 - lr * weight decay: under independent and sqrt by the same number at every width."""
    runs = [
        (rule, width, f"{LLAMA_STYLE} --add-qkv-bias --ffn-hidden-size {3 * width} --hidden-size {width} {layout}")
        for rule in SHRINK
        for width in (32, 64)
    ]
    command_lines = [
        f"{flags} {'--width-scaling ' + rule + ' --base-hidden-size 16' if rule != 'none' else ''}".split()
        for rule, _, flags in runs
    ]
    for results in pool.run(shrink_all, ranks=ranks, runs=command_lines):
        for (rule, width, _), shrink in zip(runs, results, strict=True):
            matrix, embedding = SHRINK[rule]
            assert any("linear_fc" in name for name in shrink)
            for name, value in shrink.items():
                wanted = matrix(width / 16)
                if "norm" in name or name.endswith("bias"):
                    wanted = 0
                elif "embedding" in name:
                    wanted = embedding
                assert value == pytest.approx(wanted, rel=1e-4, abs=2e-8), f"{rule}, {width} wide: {name}"
