"""The weights that ZeRO keeps in parts: fp32 ones of stages 1 to 3, and the parameters themselves at stage 3."""

from collections.abc import Callable

import torch
from torch import Tensor


def has_parts(parameter: torch.nn.Parameter) -> bool:
    """Return whether ZeRO keeps the fp32 weights of a parameter in parts on the ranks of the data group."""
    return is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Return whether a parameter is ZeRO 3's, whole on no rank between its uses."""
    return hasattr(parameter, "ds_id")


def fp32_weight(parameter: torch.nn.Parameter) -> Tensor:
    """Return the whole fp32 weight of a parameter that `has_parts`; a collective call over the data group."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole: Tensor = safe_get_full_fp32_param(parameter)
    return whole


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
