"""The metrics in the writers that Megatron keeps: TensorBoard and Weights & Biases."""

from collections.abc import Mapping, Sequence
from typing import Any


def scalars(lines: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, float]:
    """Return the measured values under the keys of the writers, ``<metric>/<layer>``."""
    return {
        f"{metric}/{line['layer']}": line[metric] for line in lines for metric in metrics if line[metric] is not None
    }


def log_scalars(values: Mapping[str, float], iteration: int, tensorboard: Any, wandb: Any) -> None:
    """Give values to Megatron's writers.

    Args:
        values: by key.
        iteration: 1-based; W&B refuses a smaller one than the last.
        tensorboard: a SummaryWriter or None.
        wandb: the module `wandb` or None.
    """
    if tensorboard is not None:
        for key, value in values.items():
            tensorboard.add_scalar(key, value, iteration)
    if wandb is not None:
        wandb.log(dict(values), iteration)
