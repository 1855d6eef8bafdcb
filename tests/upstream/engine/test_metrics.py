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
BF16 = ("--bf16", "--accumulate-allreduce-grads-in-fp32")
# Of what is compared, what may differ: nothing that is a label, and numbers by this much, relative.
TOLERANCE = 1e-5


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


def apart(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, Any]:
    """The largest relative difference of a number, and where it is."""
    worst: tuple[float, Any] = (0.0, None)
    for name in theirs:
        assert ours[name].keys() == theirs[name].keys()
        assert len(theirs[name]) > STEPS, name
        for place, line in theirs[name].items():
            assert ours[name][place].keys() == line.keys()
            for key, value in line.items():
                mine = ours[name][place][key]
                if isinstance(value, float) and value:
                    worst = max(worst, (abs(mine / value - 1), (name, place, key)), key=lambda pair: pair[0])
                else:
                    assert mine == value, (name, place, key)
    return worst


@pytest.mark.parametrize("layout", ["dp2", "tp2"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32(measured: Any, stage: int, layout: str) -> None:
    flags = TP2 if layout == "tp2" else ()
    difference, where = apart(measured(2, flags, stage), measured(2, flags, None))
    assert difference < TOLERANCE, where
    print(layout, stage, difference, where)
