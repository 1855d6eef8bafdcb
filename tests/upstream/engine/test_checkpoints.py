"""Checkpoints of a run on the engine: resumed, it goes on as if it had not been stopped."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.engine import RUN, Watched, ds_json
from tests.support.pool import Pool, RankFailure
from tests.support.training import Outcome, train

STEPS, HALF = 6, 3
TP2 = ("--tensor-model-parallel-size", "2")
WARMUP = ("--extra-warmup", "decay-away")


def whole_and_resumed(
    pool: Pool, folder: Path, stage: int, ranks: int, *flags: str, **ds: Any
) -> tuple[list[Outcome], list[Outcome]]:
    """A run in one piece, and the second half of one in two."""
    engine = ds_json(folder, stage, **ds)
    argv = [*RUN, *WARMUP, *flags, *engine, "--train-iters", str(STEPS)]
    whole = pool.run(train, ranks=ranks, argv=argv, steps=STEPS, hooks=Watched())
    kept = ["--save", str(folder / "save"), "--save-interval", str(HALF)]
    pool.run(train, ranks=ranks, argv=[*argv, *kept], steps=HALF, hooks=Watched())
    resumed = pool.run(train, ranks=ranks, argv=[*argv, "--load", str(folder / "save")], steps=STEPS, hooks=Watched())
    return whole, resumed


@pytest.mark.parametrize(("ranks", "flags"), [(2, ()), (2, TP2)], ids=["dp2", "tp2"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumed_is_uninterrupted_to_the_last_bit(
    pool: Pool, tmp_path: Path, stage: int, ranks: int, flags: tuple[str, ...]
) -> None:
    whole, resumed = whole_and_resumed(pool, tmp_path, stage, ranks, *flags)
    for a, b in zip(whole, resumed, strict=True):
        assert b.losses == a.losses[HALF:]
        assert b.grad_norms == a.grad_norms[HALF:]
        assert b.extra[0] == a.extra[0][HALF:]
        assert all(np.array_equal(a.extra[1][name], b.extra[1][name]) for name in a.extra[1])
    assert "Overwriting old incomplete" not in "".join(pool.printed)
