"""Which rows of each weight this rank looks at, and where their fp32 values are: alone, DDP, FSDP2, ZeRO 1 to 3.

Every rank takes a stretch of the rows of every weight, and all ranks' sampled tokens for them. So no rank holds more of
the model than its share; where the share is not at hand (ZeRO, HSDP), one weight after the other is put together, cut,
and let go.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_patch.errors import ConfigError
from megatron_patch.metrics.views import Group, group_rank, group_size
from megatron_patch.plain.modules import is_transposed, whole_shape
from megatron_patch.zero.weights import fp32_weight, has_parts


def share(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return the stretch of rows that a rank looks at, half-open: as FSDP2 cuts them.

    >>> [share(5, rank, 4) for rank in range(4)]
    [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    each = -(-rows // ranks)
    return min(rank * each, rows), min((rank + 1) * each, rows)


def matrix_shape(module: nn.Module, parameter: Tensor) -> tuple[int, int]:
    """Return [K, C] of a weight: of a convolution C k k / groups, of transformers' Conv1D turned around."""
    shape = whole_shape(parameter)
    rows, columns = (shape[1], shape[0]) if is_transposed(module) else (shape[0], torch.Size(shape[1:]).numel())
    return rows, columns


def row_reader(name: str, module: nn.Module, parameter: nn.Parameter, group: Group) -> Callable[[], Tensor]:
    """Return what reads this rank's rows of the fp32 weight, [rows, C]; a collective call where ranks share the weight.

    Args:
        name: of the layer, for messages.
        module: which owns the parameter.
        parameter: as the optimizer has it.
        group: the data-parallel ranks.

    Raises:
        ConfigError: a weight without fp32 values, or cut in a way that is not known.
    """
    rows, columns = matrix_shape(module, parameter)
    start, stop = share(rows, group_rank(group), group_size(group))
    turned = is_transposed(module)

    def cut(whole: Tensor) -> Tensor:
        matrix = whole.detach().view(whole_shape(parameter))
        return (matrix.T if turned else matrix.reshape(rows, columns))[start:stop]

    if has_parts(parameter):
        if getattr(parameter, "allreduce", True) is False:
            raise ConfigError("layers", name, "no experts of DeepSpeed's MoE", "leave them out with another pattern")
        return lambda: cut(fp32_weight(parameter))
    if parameter.dtype != torch.float32:
        raise ConfigError(
            "model",
            f"{name} in {parameter.dtype}",
            "fp32 weights, from which an update can be measured: a bf16 weight moves by 2^-8 of itself, or not at all",
            "train with autocast, FSDP2's MixedPrecisionPolicy or DeepSpeed's bf16 with ZeRO, which keep fp32 weights",
        )
    if not isinstance(parameter, DTensor):
        return lambda: cut(parameter)
    return _of_fsdp(name, parameter, group, None if turned else columns, cut)


def _of_fsdp(
    name: str, parameter: Any, group: Group, columns: int | None, cut: Callable[[Tensor], Tensor]
) -> Callable[[], Tensor]:
    mesh, placements = parameter.device_mesh, tuple(parameter.placements)
    if placements not in ((Shard(0),), (Replicate(), Shard(0))):
        raise ConfigError(
            "model",
            f"{name} with placements {placements}",
            "what fully_shard makes of one mesh dimension, or of two that replicate and shard",
            "leave it out with layers=; tensor parallelism is measured in Megatron only",
        )
    if mesh.size() != group_size(group):
        raise ConfigError(
            "process_group",
            f"of {group_size(group)} ranks",
            f"the {mesh.size()} ranks over which {name} is sharded",
            "give process_group=mesh.get_group()",
        )
    if len(placements) == 1 and columns is not None:
        return lambda: parameter.to_local().detach().reshape(-1, columns)
    return lambda: cut(parameter.full_tensor())
