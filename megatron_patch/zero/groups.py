"""Which parameters of the model ZeRO trains in which param group (DeepSpeed 0.19.8)."""

from typing import Any

import torch

from megatron_patch.errors import AuditError


def class_names(thing: Any) -> set[str]:
    """Return the full names of an object's classes: what tells a package's objects without importing it."""
    return {f"{c.__module__}.{c.__qualname__}" for c in type(thing).__mro__}


def is_zero(optimizer: Any) -> bool:
    """Return whether an optimizer is ZeRO's, of stage 1, 2 or 3, whose groups' own lists are flattened or empty."""
    kinds = {name.rpartition(".")[2] for name in class_names(optimizer) if name.startswith("deepspeed.")}
    return bool(kinds & {"DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer"})


def group_members(zero: Any) -> list[list[torch.nn.Parameter]]:
    """Return the parameters that each live group of ZeRO's optimizer trains on all ranks together.

    Args:
        zero: ZeRO's optimizer, as `is_zero` knows it.

    Raises:
        AuditError: the tensor that a group trains is not the flat one that ZeRO has made of its parameters; or a second
            optimizer trains a part of them.
    """
    groups = zero.optimizer.param_groups
    if hasattr(zero, "sub_group_to_group_id"):  # stage 3
        if hasattr(zero, "backup_optimizer"):
            raise AuditError(
                "offload_optimizer.ratio below 1, or super_offload: DeepSpeed updates a part of the weights by a second"
                " optimizer, whose first param group keeps the LR and weight decay that it was built with; remove it"
            )
        members: list[list[torch.nn.Parameter]] = [[] for _ in groups]
        for sub_group, parameters in enumerate(zero.fp16_groups):
            members[zero.sub_group_to_group_id[sub_group]] += parameters
        return members
    if hasattr(zero, "bf16_groups"):  # stage 1 with data_types.grad_accum_dtype fp32
        by_group, flat = zero.bf16_groups, zero.fp32_groups_flat_partition
    else:
        by_group, flat = zero.bit16_groups, zero.single_partition_of_fp32_groups
    for i, (group, tensor) in enumerate(zip(groups, flat, strict=True)):
        trained = group["params"]
        if len(trained) != 1 or trained[0] is not tensor:
            raise AuditError(
                f"param group {i} of the engine trains {len(trained)} tensors, but not the flat one that ZeRO keeps its"
                " parameters in"
            )
    return [list(parameters) for parameters in by_group]
