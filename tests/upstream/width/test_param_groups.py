"""Every parameter of real models in Megatron's live param groups, against the tables of support/param_groups.py."""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.building import LLAMA_STYLE, Builder
from tests.support.param_groups import (
    CASES,
    MODELS,
    TWO_RANKS,
    argv,
    assert_same,
    build_all,
    expected,
    expected_of,
    stacked,
)
from tests.support.pool import Pool


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_gets_what_its_own_fan_in_says(model: str, tensor_parallel: int, pool: Pool, tmp_path: Path):
    """The live groups after set-up, for every rule; split over two ranks a wrong (local) fan-in would halve m."""
    if model == "hybrid" and "MEGATRON_NEXT" in os.environ:
        pytest.skip(
            "without Transformer Engine main's is_inference_column_parallel_linear stops multi-token prediction"
        )
    layout = TWO_RANKS if tensor_parallel == 2 else ""
    runs = [argv(model, case, layout) for case in CASES.values()]
    ranks = pool.run(build_all, ranks=tensor_parallel, runs=runs, directory=str(tmp_path))
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
