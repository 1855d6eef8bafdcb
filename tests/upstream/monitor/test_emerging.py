"""Metrics of runs under Muon, SOAP and Lion, against weights read beside the package and against other layouts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.emerging import needs_emerging_optimizers
from tests.support.monitored import read_lines
from tests.support.pool import Pool
from tests.support.training import MOE, TINY, Patched, Run, train

pytestmark = needs_emerging_optimizers
LLAMA = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
    "--position-embedding-type rope --ffn-hidden-size 96 --lr 0.01 --weight-decay 0.1 --lr-warmup-iters 0"
).split()
RULE = "--width-scaling sqrt --base-hidden-size 8".split()
STEPS = 3


@dataclass
class Witness(Patched):
    """Reads every fp32 weight that this rank trains before and after each step, by Megatron's own attribute for it."""

    seen: list[dict[str, Any]] = field(default_factory=list)

    def built(self, run: Run) -> None:
        """Around the optimizer's step, outside whatever else is wrapped around it."""
        from tests.support.training import global_names

        step = run.optimizer.step
        names = global_names(run.model)

        def weights() -> dict[str, Any]:
            # Under bf16 the rank that trains a whole parameter, and no other, has `main_param`.
            return {
                name: getattr(p, "main_param", None if run.args.bf16 else p)
                for name, p in names.items()
                if ".linear_" in name
            }

        def stepped(*args: Any, **kwargs: Any) -> Any:
            old = {name: w.detach().double().clone() for name, w in weights().items() if w is not None}
            scale = {
                name: 1 - g["lr"] * g["weight_decay"] for g in run.optimizer.param_groups for name in _names(g, names)
            }
            result = step(*args, **kwargs)
            new = {name: w.detach().double() for name, w in weights().items() if w is not None}
            self.seen.append(
                {name: float((new[name] - scale[name] * w).square().sum()) for name, w in old.items() if name in scale}
            )
            return result

        run.optimizer.step = stepped

    def result(self, run: Run) -> Any:
        return self.seen


def _names(group: dict[str, Any], names: dict[str, Any]) -> list[str]:
    held = {id(p) for p in group["params"]}
    return [name for name, p in names.items() if {id(p), id(getattr(p, "main_param", None))} & held]


def sums(lines: dict[tuple[int, str], dict[str, Any]], iteration: int, name: str) -> float:
    """The squared update norm of a weight from the lines of its parts."""
    layer = name.removesuffix(".weight")
    return sum(
        float(line["update_norm"]) ** 2
        for (at, row), line in lines.items()
        if at == iteration and row.partition("/")[0] == layer
    )


def run_with(pool: Pool, folder: Path, ranks: int, flags: list[str]) -> tuple[Any, dict[tuple[int, str], Any]]:
    argv = [*TINY, *LLAMA, *flags, "--alignment-interval", "1", "--metrics-dir", str(folder)]
    outcomes = pool.run(train, ranks=ranks, argv=argv, steps=STEPS, hooks=Witness())
    return outcomes, read_lines(folder)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "--optimizer muon"),
        (1, "--optimizer muon --muon-scale-mode unit_rms_norm --muon-nesterov"),
        (1, "--optimizer soap"),
        (1, "--optimizer lion"),
        (1, "--optimizer muon --muon-scalar-optimizer lion --bf16"),
        (2, "--optimizer muon --tensor-model-parallel-size 2 --muon-tp-mode duplicated"),
        (2, "--optimizer muon --bf16 --use-distributed-optimizer"),
        (2, "--optimizer dist_muon --bf16"),
        (4, "--optimizer muon --bf16 --use-distributed-optimizer --tensor-model-parallel-size 2 "
            "--muon-tp-mode distributed --sequence-parallel"),
    ],
)  # fmt: skip
def test_updates_are_those_of_the_weights_themselves(pool: Pool, tmp_path: Path, ranks: int, flags: str) -> None:
    """Also where each rank trains some of the weights only, whose updates the others never see."""
    outcomes, lines = run_with(pool, tmp_path, ranks, [*flags.split(), *RULE])
    assert not [line for line in lines.values() if line["update_norm"] is None]
    shards = 2 if "--tensor-model-parallel-size 2" in flags else 1
    replicas = ranks // shards if "dist" not in flags.replace("tp-mode distributed", "") else 1
    for iteration in range(1, STEPS + 1):
        truth: dict[str, float] = {}
        for outcome in outcomes:
            for name, square in outcome.extra[iteration - 1].items():
                truth[name] = truth.get(name, 0.0) + square / replicas
        assert len(truth) == 8
        for name, square in truth.items():
            assert sums(lines, iteration, name) == pytest.approx(square, rel=1e-4), (iteration, name)


def test_layer_wise_alignments_are_those_of_one_rank(pool: Pool, tmp_path: Path) -> None:
    """Two ranks of one microbatch each see the tokens that one rank sees in a microbatch of two.

    In bf16 gradients differ by rounding, which Muon magnifies where there is hardly any gradient.
    """
    flags = "--optimizer muon --bf16 --global-batch-size 2".split()
    one, truth = run_with(pool, tmp_path / "one", 1, [*flags, *"--micro-batch-size 2 --alignment-tokens 64".split()])
    more = "--micro-batch-size 1 --alignment-tokens 32 --use-distributed-optimizer".split()
    two, lines = run_with(pool, tmp_path / "two", 2, [*flags, *more])
    assert one[0].losses[0] == pytest.approx(two[0].losses[0], rel=1e-3)
    assert set(lines) == set(truth)
    for layer in {layer for _, layer in truth}:
        line, expected = lines[1, layer], truth[1, layer]
        assert line["tokens"] == expected["tokens"] == 64
        for metric in ("weight_norm", "weight_alignment", "update_norm", "update_alignment"):
            assert line[metric] == pytest.approx(expected[metric], rel=0.03), (layer, metric)


def test_experts_under_muon_on_two_ranks(pool: Pool, tmp_path: Path) -> None:
    """Experts have data-parallel groups of their own; each is trained by one rank of them."""
    flags = "--optimizer muon --bf16 --use-distributed-optimizer --no-use-layer-wise-param-layout".split()
    outcomes, lines = run_with(pool, tmp_path, 2, [*MOE, *flags, *RULE])
    truth: dict[str, float] = {}
    for outcome in outcomes:
        for name, square in outcome.extra[0].items():
            assert name not in truth, "two ranks train one weight"
            truth[name] = square
    experts = [name for name in truth if ".local_experts." in name]
    assert len(experts) == 2 * 4 * 2
    for name in experts:
        assert sums(lines, 1, name) == pytest.approx(truth[name], rel=1e-4), name


def test_the_predicted_norm_and_update_alignment_of_muon(pool: Pool, tmp_path: Path) -> None:
    """Relative updates of one step are b eta / rho by the scale's closed form, and updates stay aligned as they were.

    A semi-orthogonal update has the alignment 1/sqrt(C) with any input where fan-out >= fan-in: it cannot fall.
    """
    flags = "--optimizer muon --muon-scale-mode spectral --weight-decay 0".split()
    _, lines = run_with(pool, tmp_path, 1, [*flags, *RULE])
    layer = "decoder.layers.0.mlp.linear_fc1"
    for iteration in range(1, STEPS + 1):
        parts = [lines[iteration, f"{layer}/{part}"] for part in ("gate", "up")]
        norm = sum(part["update_norm"] ** 2 for part in parts) ** 0.5
        size = sum(part["fan_in"] * part["fan_out"] for part in parts) ** 0.5
        assert norm == pytest.approx(parts[0]["lr"] * size, rel=0.15)
        outputs = sum((part["update_norm"] * part["update_alignment"]) ** 2 for part in parts) ** 0.5
        assert outputs / norm == pytest.approx(parts[0]["fan_in"] ** -0.5, rel=0.15)
    predicted = read_lines(tmp_path, "equilibrium")
    assert predicted[1, f"{layer}/up"]["predicted_relative_update"] > 0
    assert predicted[STEPS, "output_layer"]["predicted_weight_rms"] > 0


def test_nothing_is_predicted_where_the_growth_is_not_known(pool: Pool, tmp_path: Path) -> None:
    run_with(pool, tmp_path, 1, ["--optimizer", "lion"])
    for (_, layer), line in read_lines(tmp_path, "equilibrium").items():
        assert (line["predicted_weight_rms"] is None) == (layer != "output_layer"), layer
