"""The engine against Megatron's DDP and optimizer: same model, data, seed and rule give the same run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.engine import LOSSES, RUN, Watched, ds_json
from tests.support.pool import Pool
from tests.support.training import Outcome, train

TP2 = ("--tensor-model-parallel-size", "2")


@pytest.fixture(scope="module")
def megatrons(pool: Pool) -> Any:
    """Runs of Megatron's own optimizer, each made once."""
    made: dict[tuple[int, tuple[str, ...]], list[Outcome]] = {}

    def run(ranks: int, *flags: str) -> list[Outcome]:
        if (ranks, flags) not in made:
            made[ranks, flags] = pool.run(train, ranks=ranks, argv=[*RUN, *flags], steps=LOSSES, hooks=Watched())
        return made[ranks, flags]

    return run


def worst(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest distance of a parameter, in parts of its norm.

    Without the bias of queries, keys and values: that of a key has no gradient but rounding, which Adam blows up.
    """
    assert ours.keys() == theirs.keys()
    names = [name for name in ours if not name.endswith("linear_qkv.bias")]
    norm = np.linalg.norm
    return max(float(norm(ours[name] - theirs[name]) / norm(theirs[name])) for name in names)


def same(engine: list[Outcome], megatron: list[Outcome], losses: float, norms: float, weights: float) -> None:
    """Hold a run to another: losses, gradient norms, every parameter's LR, weight decay, eps at every step, weights."""
    for mine, theirs in zip(engine, megatron, strict=True):
        print(
            "loss",
            max(abs(a - b) for a, b in zip(mine.losses, theirs.losses, strict=True)),
            "norm",
            max(abs(a / b - 1) for a, b in zip(mine.grad_norms, theirs.grad_norms, strict=True)),
            "weights",
            worst(mine.extra[1], theirs.extra[1]),
        )
        assert len(mine.losses) == LOSSES
        assert mine.losses == pytest.approx(theirs.losses, abs=losses)
        assert mine.grad_norms == pytest.approx(theirs.grad_norms, rel=norms)
        assert mine.extra[0] == theirs.extra[0]
        assert worst(mine.extra[1], theirs.extra[1]) < weights


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32(pool: Pool, megatrons: Any, tmp_path: Path, stage: int, layout: str) -> None:
    ranks, flags = {"one": (1, ()), "dp2": (2, ()), "tp2": (2, TP2)}[layout]
    argv = [*RUN, *flags, *ds_json(tmp_path, stage)]
    engine = pool.run(train, ranks=ranks, argv=argv, steps=LOSSES, hooks=Watched())
    same(engine, megatrons(ranks, *flags), 1e-6, 1e-6, 1e-5)
