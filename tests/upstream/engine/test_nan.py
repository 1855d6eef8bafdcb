"""A gradient that is not finite, with a finite loss: what the run does about it on the engine."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import RUN, ds_json
from tests.support.pool import Pool, RankFailure
from tests.support.training import Patched, Run, train


@dataclass
class Poisoned(Patched):
    """The gradient of one parameter is nan in the second step."""

    steps: int = 0
    skipped: Any = None

    def built(self, run: Run) -> None:
        weight = next(p for n, p in run.model[0].named_parameters() if n.endswith("linear_fc1.weight"))
        weight.register_hook(lambda gradient: gradient * (float("nan") if self.steps == 1 else 1.0))

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        self.steps = iteration

    def result(self, run: Run) -> Any:
        return run.optimizer.engine.skipped_steps


BF16 = ("--bf16", "--attention-softmax-in-fp32")


@pytest.mark.parametrize(("stage", "flags"), [(0, ()), (1, ()), (1, BF16), (3, ())], ids=["0", "1", "1-bf16", "3"])
def test_it_ends_the_run_as_with_megatrons_optimizer(
    pool: Pool, tmp_path: Path, stage: int, flags: tuple[str, ...]
) -> None:
    """ZeRO by itself leaves out the step and goes on."""
    argv = [*RUN, *flags, *ds_json(tmp_path, stage), "--metrics-dir", str(tmp_path / "metrics")]
    with pytest.raises(RankFailure) as caught:
        pool.run(train, ranks=2, argv=argv, steps=5, hooks=Poisoned())
    assert "found NaN or Inf in the gradients" in str(caught.value)
    assert json.loads((tmp_path / "metrics/run.json").read_text())["status"] == "diverged"


def test_without_the_check_the_step_is_left_out(pool: Pool, tmp_path: Path) -> None:
    argv = [*RUN, *ds_json(tmp_path, 2), "--no-check-for-nan-in-loss-and-grad"]
    (one,) = pool.run(train, argv=argv, steps=5, hooks=Poisoned())
    assert one.extra == 1
    assert math.isinf(one.grad_norms[1])
    assert all(math.isfinite(loss) for loss in one.losses)
