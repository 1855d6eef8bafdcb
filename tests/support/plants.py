"""A Megatron script with a fault in it, for the selfcheck to find: which one is in the variable PLANT.

It trains as launch/pretrain.py does. Faults are planted where a mistake of ours, or of a library, would be.
"""

import os
import runpy
import time
from typing import Any

from tests.support.pool import ROOT

BUSY = 0.5
"""Seconds of processor time that a slow path takes; a step of the model that is timed takes a tenth."""


def work() -> None:
    """Keep the processor busy."""
    ends = time.process_time() + BUSY
    while time.process_time() < ends:
        pass


def wrong_lr_in_the_step() -> None:
    """The optimizer trains with 2% more than its groups say."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    def more(optimizer: Any, *_: Any) -> None:
        optimizer.planted = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= 1.02

    def back(optimizer: Any, *_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, optimizer.planted, strict=True):
            group["lr"] = lr

    register_optimizer_step_pre_hook(more)
    register_optimizer_step_post_hook(back)


def wrong_lr_in_the_schedule() -> None:
    """From the eighth step on the extra warmup gives 0.1% too much; the audit, which asks the same function, agrees."""
    from megatron_patch.upstream.width.scheduler import WidthTransferScheduler

    original = WidthTransferScheduler.factor

    def factor(self: Any) -> float:
        return original(self) * (1.001 if self.optimizer_steps > 6 else 1.0)

    WidthTransferScheduler.factor = factor  # type: ignore[method-assign]


def wrong_metric() -> None:
    """Norms are 0.005% too large."""
    from megatron_patch.metrics import meter

    original = meter.part_sums_of_squares
    meter.part_sums_of_squares = lambda *args: original(*args) * 1.0001


def slow_metrics() -> None:
    """A measured step does something long."""
    from megatron_patch.metrics.meter import Meter

    original = Meter.before_update

    def before_update(self: Any, *args: Any) -> None:
        work()
        work()
        original(self, *args)

    Meter.before_update = before_update  # type: ignore[method-assign]


def slow_patch() -> None:
    """Every step with the patch does something long."""
    from megatron_patch.upstream.width.scheduler import WidthTransferScheduler

    original = WidthTransferScheduler.step

    def step(self: Any, increment: int) -> None:
        work()
        original(self, increment)

    WidthTransferScheduler.step = step  # type: ignore[method-assign]


def syncs() -> None:
    """A measured step waits three times more for the device."""
    import torch

    from megatron_patch.metrics.meter import Meter

    original = Meter.before_update

    def before_update(self: Any, *args: Any) -> None:
        for _ in range(3):
            torch.ones(1).item()
        original(self, *args)

    Meter.before_update = before_update  # type: ignore[method-assign]


def other_weights_after_a_load() -> None:
    """A resumed run starts with one entry of each weight in its last bit wrong."""
    from megatron_patch.upstream.hooks import Hook, after
    from megatron_patch.upstream.patch import Session

    def spoil(_: Any, model: Any) -> None:
        import torch

        for chunk in model:
            for parameter in chunk.parameters():
                with torch.no_grad():
                    first = parameter.view(-1)[:1]
                    first.copy_(torch.nextafter(first, torch.tensor(torch.inf)))

    target = "megatron.training.training:load_checkpoint"
    Session().add(
        (Hook(target, ("ddp_model",), after(spoil, "ddp_model"), "spoil it", ("megatron.training.checkpointing",)),)
    )


if __name__ == "__main__":
    for fault in filter(None, os.environ.get("PLANT", "").split()):
        globals()[fault]()
    runpy.run_path(str(ROOT / "launch" / "pretrain.py"), run_name="__main__")
