"""An optimizer step in a CUDA graph, without a GPU: the LR must be where a captured step reads it anew.

Transformer Engine's FusedAdam keeps the LR of each group in a tensor, in fp32, which Megatron's scheduler fills. Here
torch's AdamW does, which stands in for it; nothing is captured.
"""

from typing import Any

import pytest

from tests.support.observed import ObservedWithPatch
from tests.support.pool import Pool, RankFailure
from tests.support.training import TINY, Run, train

FLAGS = [*TINY, *"--width-scaling sqrt --base-hidden-size 8 --weight-decay 2 --extra-warmup decay-away".split()]
AUDITED = [*FLAGS, "--audit-interval", "1"]


class Captured(ObservedWithPatch):
    """Says that steps are captured, from the first step on; Megatron's own loop has looked before."""

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        super().stepped(run, iteration, losses)
        run.args.optimizer_cuda_graph = iteration < 3


class InTensors(Captured):
    def __init__(self, shared: bool = False) -> None:
        self.shared = shared

    def before_arguments(self) -> None:
        import torch

        super().before_arguments()
        adam, shared = torch.optim.AdamW, self.shared

        class Adam(adam):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                one = torch.tensor(0.0)
                for group in self.param_groups:
                    group["lr"] = one if shared else torch.tensor(group["lr"], dtype=torch.float32)

        torch.optim.AdamW = Adam  # type: ignore[misc]


def test_lrs_in_tensors_are_audited_and_train_the_same(pool: Pool) -> None:
    """The audit knows that they are fp32."""
    (numbers,) = pool.run(train, argv=FLAGS, steps=3, hooks=ObservedWithPatch())
    (tensors,) = pool.run(train, argv=AUDITED, steps=3, hooks=InTensors())
    assert tensors.losses == pytest.approx(numbers.losses, rel=1e-6)
    for found, wanted in zip(tensors.extra.rates, numbers.extra.rates, strict=True):
        for (lr, decay), (other, same) in zip(found, wanted, strict=True):
            assert float.fromhex(lr) == pytest.approx(float.fromhex(other), rel=2**-23)
            assert decay == same


WRONG = {
    "--optimizer-cuda-graph given: expected an optimizer with its LRs in tensors": Captured(),
    "the optimizer has lr =": InTensors(shared=True),
}


@pytest.mark.parametrize("said", WRONG)
def test_lrs_that_are_no_numbers_of_their_own_are_refused(said: str, pool: Pool) -> None:
    """A captured step would keep a number; and one tensor for all groups has the LR of the last."""
    with pytest.raises(RankFailure, match=said):
        pool.run(train, argv=AUDITED, steps=3, hooks=WRONG[said])
