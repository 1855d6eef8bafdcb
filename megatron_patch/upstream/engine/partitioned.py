"""Parameters of which ZeRO 3 keeps a part on every rank of the data group."""

from collections.abc import Callable

import torch
from torch import Tensor


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Return whether a parameter is ZeRO 3's, whole on no rank between its uses."""
    return hasattr(parameter, "ds_id")


def gathered(parameter: torch.nn.Parameter) -> Callable[[], Tensor]:
    """Return what reads a partitioned parameter whole; a collective call over the data group.

    One parameter at a time is whole, and only as long as the caller keeps it.
    """

    def read() -> Tensor:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

        if parameter.ds_status is ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
            return parameter.detach()  # small ones are whole on every rank
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    return read
