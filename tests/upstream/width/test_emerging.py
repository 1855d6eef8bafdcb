"""Rules under Muon, SOAP and Lion: every parameter in the live groups, what is refused, and who trains what."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.errors import ConfigError
from tests.support.building import Builder
from tests.support.emerging import needs_emerging_optimizers
from tests.support.param_groups import MODELS
from tests.support.pool import Pool
from tests.support.training import TINY, Patched, train

pytestmark = needs_emerging_optimizers
DUPLICATED = "--tensor-model-parallel-size 2 --sequence-parallel --muon-tp-mode duplicated"

# Global shape here and in the proxy of every matrix of the models in support/param_groups.py: hidden 64 and 16.
SHAPES: dict[str, tuple[int, int, float, float]] = {
    "self_attention.linear_qkv.weight": (192, 64, 96, 16),
    "self_attention.linear_proj.weight": (64, 96, 16, 48),
    "mlp.linear_fc1.weight": (192, 64, 64, 16),
    "mlp.linear_fc2.weight": (64, 96, 16, 32),
    "mlp.router.weight": (4, 64, 4, 16),
    "linear_fc1.weight": (96, 64, 16, 16),  # experts
    "linear_fc2.weight": (64, 48, 16, 8),
    "mlp.shared_experts.linear_fc1.weight": (160, 64, 32, 16),
    "mlp.shared_experts.linear_fc2.weight": (64, 80, 16, 16),
    "mlp.shared_experts.gate_weight": (1, 64, 1, 16),
}


def build(argv: list[str], directory: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    return build_all([argv], directory)[0]


def build_all(runs: list[list[str]], directory: str) -> list[tuple[dict[str, dict[str, Any]], dict[str, Any]]]:
    """Return of every run what this rank's live groups hold by parameter, and what hyperparameters.json says."""
    builder = Builder()
    return [_build(builder, argv, f"{directory}/{i}") for i, argv in enumerate(runs)]


def _build(builder: Builder, argv: list[str], directory: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    import json

    from tests.support.building import groups_of
    from tests.support.training import global_names

    built = builder.build([*argv, "--metrics-dir", directory])
    names = {id(parameter): name for name, parameter in global_names(built.model).items()}
    found = {}
    for group, _, parameter in groups_of(_flat(built.optimizer)):
        keys = ("max_lr", "min_lr", "lr", "weight_decay", "eps", "optimizer")
        found[names[id(parameter)]] = {key: group.get(key) for key in keys}
    text = Path(directory, "hyperparameters.json").read_text() if built.args.rank == 0 else "{}"
    return found, json.loads(text)


def _flat(optimizer: Any) -> Any:
    from types import SimpleNamespace

    children: list[Any] = []
    for child in optimizer.chained_optimizers:
        children += getattr(child, "chained_optimizers", [child])
    return SimpleNamespace(chained_optimizers=children)


def expected_lr(name: str, rule: str, mode: str) -> float:
    """What keeps eta s sqrt(C / K), the spectral condition, or under sqrt eta b sqrt(C): with upstream's own s."""
    from emerging_optimizers.orthogonalized_optimizers import get_muon_scale_factor

    key = name.split("experts.local_experts.")[-1].split(".", 1)[-1] if "local_experts" in name else None
    rows, columns, base_rows, base_columns = SHAPES[key or name.split(".", 3)[-1]]

    def kept(k: float, c: float) -> float:
        s = get_muon_scale_factor(k, c, mode)
        return float(s * (c / k) ** 0.5 if rule != "sqrt" else s * (min(k, c) / k) ** 0.5)

    return kept(base_rows, base_columns) / kept(rows, columns)


@pytest.mark.parametrize("layout", ["", DUPLICATED], ids=["one", "tp2"])
def test_every_parameter_of_a_mixture_under_muon(pool: Pool, tmp_path: Path, layout: str) -> None:
    """Matrices by the closed forms; LM head, embedding and norms by Adam's rule, with m = 4."""
    modes = ("spectral", "unit_rms_norm", "shape_scaling")
    cases = list(itertools.product(("independent", "sqrt", "standard"), modes))
    flags = f"{MODELS['moe'].flags} {MODELS['moe'].base} --optimizer muon {layout}".split()
    runs = [[*flags, "--width-scaling", rule, "--muon-scale-mode", mode] for rule, mode in cases]
    everyones = pool.run(build_all, ranks=2 if layout else 1, runs=runs, directory=str(tmp_path))
    for i, (rule, mode) in enumerate(cases):
        check_mixture([ranks[i] for ranks in everyones], rule, mode)


def check_mixture(ranks: list[Any], rule: str, mode: str) -> None:
    head = {"independent": (1 / 4, 4.0), "sqrt": (1 / 2, 2.0), "standard": (1 / 4, 1.0)}[rule]
    written = {entry["name"]: entry for entry in ranks[0][1]["parameters"]}
    for name, (role, _) in MODELS["moe"].table.items():
        adam = role != "matrix"
        lr, decay = {"embedding": (1.0, 1.0), "vector": (1.0, 0.0), "output": head}.get(role, (0.0, 0.0))
        if not adam:
            lr = expected_lr(name, rule, mode)
            decay = 1.0 if rule == "standard" else 1 / lr
        wanted = {"max_lr": 0.01 * lr, "min_lr": 0.001 * lr, "lr": 0.01 * lr, "weight_decay": 0.1 * decay}
        for values, _ in ranks:
            got = values[name]
            assert {key: got[key] for key in wanted} == pytest.approx(wanted, rel=1e-9), name
            assert (got["eps"], got["optimizer"]) == ((1e-8, "adam") if adam else (None, None)), name
        entry = written[name]
        assert (entry["eps"], entry["optimizer"]) == ((1e-8, "adam") if adam else (None, "muon")), name
        assert (entry["lr"], entry["weight_decay"]) == pytest.approx((0.01 * lr, 0.1 * decay), rel=1e-9), name


@pytest.mark.parametrize(("optimizer", "eps"), [("soap", 1e-8), ("lion", None)])
def test_entrywise_optimizers_have_adams_exponents(pool: Pool, tmp_path: Path, optimizer: str, eps: float) -> None:
    argv = f"{MODELS['llama'].flags} {MODELS['llama'].base} --optimizer {optimizer} --width-scaling independent"
    values, _ = pool.run(build, argv=argv.split(), directory=str(tmp_path))[0]
    for name, (role, m) in MODELS["llama"].table.items():
        scaled = role in ("matrix", "output")
        assert values[name]["max_lr"] == pytest.approx(0.01 / m if scaled else 0.01, rel=1e-12), name
        assert values[name]["eps"] == (eps if role == "matrix" else 1e-8), name


def build_refused(argv: list[str]) -> str:
    try:
        Builder().parse(argv)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--optimizer muon --tensor-model-parallel-size 2", "--muon-tp-mode blockwise: expected duplicated"),
        ("--optimizer soap --tensor-model-parallel-size 2", "--optimizer soap: expected no tensor parallelism"),
        ("--optimizer muon --use-distributed-optimizer", "--use-distributed-optimizer in fp32: expected --bf16"),
        ("--optimizer adaptive_muon", "--optimizer adaptive_muon: expected adam, muon, soap or lion"),
        ("--optimizer muon --tensor-model-parallel-size 2 --muon-tp-mode distributed", ""),
        ("--optimizer lion --tensor-model-parallel-size 2", ""),
        ("--optimizer muon --use-distributed-optimizer --bf16", ""),
    ],
)
def test_what_would_depend_on_the_layout_is_refused(pool: Pool, argv: str, said: str) -> None:
    words = f"{MODELS['llama'].flags} {MODELS['llama'].base} --width-scaling sqrt {argv}".split()
    for got in pool.run(build_refused, ranks=2, argv=words):
        assert got.startswith(said) if said else got == ""


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_layer_wise_optimizer_on_data_parallel_ranks(pool: Pool, tmp_path: Path, ranks: int) -> None:
    """Every rank trains some of the parameters; together they hold what one rank holds, each parameter once."""
    argv = f"{MODELS['llama'].flags} {MODELS['llama'].base} --optimizer muon --bf16 --width-scaling sqrt "
    argv += f"--num-layers 2 --global-batch-size {ranks}"
    alone, file = pool.run(build, argv=argv.split(), directory=str(tmp_path / "one"))[0]
    together = pool.run(
        build, ranks=ranks, argv=[*argv.split(), "--use-distributed-optimizer"], directory=str(tmp_path / "many")
    )
    held: dict[str, list[dict[str, Any]]] = {}
    for values, _ in together:
        for name, entry in values.items():
            held.setdefault(name, []).append(entry)
    assert sorted(held) == sorted(alone)
    assert all(entry == alone[name] for name, entries in held.items() for entry in entries)
    matrices = [name for name, entry in alone.items() if entry["optimizer"] is None]
    assert matrices and all(len(held[name]) == 1 for name in matrices)
    assert len({tuple(sorted(values)) for values, _ in together}) > 1
    assert together[0][1]["parameters"] == file["parameters"]


RESUMED = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --ffn-hidden-size 96 "
    "--position-embedding-type rope --weight-decay 0.1 --train-iters 4 --save-interval 2 "
    "--width-scaling sqrt --base-hidden-size 8 --extra-warmup decay-away"
).split()


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "--optimizer muon"),
        (1, "--optimizer lion"),
        (2, "--optimizer muon --bf16 --use-distributed-optimizer"),
        (2, f"--optimizer muon --muon-scale-mode unit_rms_norm {DUPLICATED}"),
    ],
)  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(pool: Pool, tmp_path: Path, ranks: int, flags: str) -> None:
    """Audited after the load; the same losses and weights to the last bit."""
    argv = [*TINY, *RESUMED, *flags.split()]
    whole = pool.run(train, ranks=ranks, argv=[*argv, "--save", str(tmp_path / "whole")], steps=4, hooks=Patched())
    folder = str(tmp_path / "parts")
    pool.run(train, ranks=ranks, argv=[*argv, "--save", folder], steps=2, hooks=Patched())
    again = pool.run(train, ranks=ranks, argv=[*argv, "--save", folder, "--load", folder], steps=4, hooks=Patched())
    assert again[0].losses == whole[0].losses[2:]
    assert again[0].checksums == whole[0].checksums
