"""The metrics of a run on the engine are those of the same run on Megatron's optimizer."""

from typing import Any

import pytest

from tests.support.engine import RUN, ds_json
from tests.support.monitored import read_lines
from tests.support.pool import Pool
from tests.support.training import Patched, train

STEPS = 3
METRICS = ("--alignment-interval", "1", "--alignment-tokens", "10", "--spectral-interval", "3", "--no-report")
TP2 = ("--tensor-model-parallel-size", "2")
# By how much numbers may differ, relative. The error of a singular value is the bound of something near 0.
TOLERANCE = {"top_singular_value_error": 1e-3}
OTHERS = 1e-5


@pytest.fixture(scope="module")
def measured(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Metrics of runs by the file's name, each made once."""
    made: dict[tuple[Any, ...], dict[str, Any]] = {}

    def run(ranks: int, flags: tuple[str, ...], stage: int | None, **ds: Any) -> dict[str, Any]:
        key = (ranks, flags, stage, repr(ds))
        if key not in made:
            folder = tmp_path_factory.mktemp("metrics")
            engine = [] if stage is None else ds_json(folder, stage, **ds)
            argv = [*RUN, *flags, *METRICS, "--metrics-dir", str(folder), *engine]
            pool.run(train, ranks=ranks, argv=argv, steps=STEPS, hooks=Patched())
            made[key] = {name: read_lines(folder, name) for name in ("alignment", "sublayers", "equilibrium")}
        return made[key]

    return run


def compare(ours: dict[str, Any], theirs: dict[str, Any], iterations: int = STEPS) -> dict[str, float]:
    """Return the largest relative difference of each number; what is none must be the same."""
    worst: dict[str, float] = {}
    for name in theirs:
        assert ours[name].keys() == theirs[name].keys()
        assert len(theirs[name]) > STEPS, name
        for place, line in theirs[name].items():
            assert ours[name][place].keys() == line.keys()
            for key, value in line.items() if place[0] <= iterations else ():
                mine = ours[name][place][key]
                if isinstance(value, float) and value:
                    worst[key] = max(worst.get(key, 0.0), abs(mine / value - 1))
                else:
                    assert mine == value, (name, place, key)
    return worst


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    worst = compare(ours, theirs)
    assert {key: gap for key, gap in worst.items() if gap >= TOLERANCE.get(key, OTHERS)} == {}
    print(max((gap, key) for key, gap in worst.items() if key not in TOLERANCE))
    assert {"update_norm", "update_alignment", "alignment_ratio", "top_singular_value"} <= worst.keys()


@pytest.mark.parametrize("layout", ["dp2", "tp2"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32(measured: Any, stage: int, layout: str) -> None:
    flags = TP2 if layout == "tp2" else ()
    same(measured(2, flags, stage), measured(2, flags, None))


LLAMA = (
    *("--swiglu", "--ffn-hidden-size", "64", "--untie-embeddings-and-output-weights", "--disable-bias-linear"),
    *("--normalization", "RMSNorm", "--group-query-attention", "--num-query-groups", "2"),
)
SP = (*TP2, "--sequence-parallel")
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
PERSISTENT = {"zero_optimization": {"stage3_param_persistence_threshold": 100000}}


@pytest.mark.parametrize(
    ("ranks", "stage", "flags", "ds"),
    [
        (2, 1, (*SP, *LLAMA), {}),
        (2, 3, (*SP, *LLAMA), {}),
        (4, 2, (*TP2, *LLAMA), {}),
        (4, 3, (*TP2, *LLAMA), {}),
        (2, 2, (), OFFLOAD),
        (2, 3, (), OFFLOAD),
        (2, 3, (), PERSISTENT),
    ],
    ids=["sp-1", "sp-3", "tp2-dp2-2", "tp2-dp2-3", "offload-2", "offload-3", "persistent-3"],
)
def test_more_of_fp32(measured: Any, ranks: int, stage: int, flags: tuple[str, ...], ds: dict[str, Any]) -> None:
    same(measured(ranks, flags, stage, **ds), measured(ranks, flags, None))


BF16 = ("--bf16", "--attention-softmax-in-fp32")
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("stage", "ds"),
    [(1, {}), (1, FP32_SUMS), (2, {}), (3, {})],
    ids=["1", "1-fp32-sums", "2", "3"],
)
def test_bf16(measured: Any, stage: int, ds: dict[str, Any]) -> None:
    """Of the first two steps: the first has the LR 0, so that both begin with the same weights.

    The update is Adam's, of gradients that were rounded to bf16.
    """
    worst = compare(measured(2, BF16, stage, **ds), measured(2, BF16, None), iterations=2)
    print(worst)
    assert worst["weight_norm"] < 1e-6
    assert worst["weight_alignment"] < 1e-5
    assert max(worst.values()) < 1e-3
    assert {"update_norm", "update_alignment", "alignment_ratio"} <= worst.keys()
