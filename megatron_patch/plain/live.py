"""The live param groups with the parameters of the model: of optimizers of torch, Accelerate and DeepSpeed."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_patch.errors import AuditError
from megatron_patch.zero.groups import class_names, group_members, is_zero

type LiveGroup = tuple[dict[str, Any], Sequence[torch.nn.Parameter]]


def is_engine(thing: Any) -> bool:
    """Return whether something is DeepSpeed's engine."""
    return "deepspeed.runtime.engine.DeepSpeedEngine" in class_names(thing)


def inner_optimizer(optimizer: Any) -> Any:
    """Return an engine's optimizer, or what Accelerate has wrapped; anything else as it is."""
    while True:
        if is_engine(optimizer) or "accelerate.optimizer.AcceleratedOptimizer" in class_names(optimizer):
            optimizer = optimizer.optimizer
        else:
            return optimizer


def stepping_optimizer(optimizer: Any) -> Any:
    """Return the torch optimizer whose groups decide: inside ZeRO's wrappers, if there are any."""
    inner = inner_optimizer(optimizer)
    return inner if isinstance(inner, torch.optim.Optimizer) else inner.optimizer


def live_groups(optimizer: Any) -> Iterator[LiveGroup]:
    """Yield every live param group with the parameters of the model that it trains.

    ZeRO empties or flattens the groups' own lists; which parameter is in which group it keeps beside them.

    Raises:
        AuditError: an optimizer that keeps its parameters in an unknown way, or trains some with another optimizer.
    """
    inner = inner_optimizer(optimizer)
    if is_zero(inner):
        yield from zip(inner.optimizer.param_groups, group_members(inner), strict=True)
    elif isinstance(inner, torch.optim.Optimizer):
        for group in inner.param_groups:
            yield group, list(group["params"])
    else:
        raise AuditError(
            f"the optimizer {type(inner).__module__}.{type(inner).__qualname__} keeps its parameters in a way that is "
            "not known; use a torch optimizer, or DeepSpeed with ZeRO stage 1, 2 or 3"
        )


def decay_is_coupled(optimizer: Any, group: dict[str, Any]) -> bool:
    """Return whether a torch optimizer adds the weight decay to the gradient, where AdamW shrinks the weights.

    Args:
        optimizer: what `stepping_optimizer` returns.
        group: one of its live groups.
    """
    name = type(optimizer).__name__
    if hasattr(optimizer, "adam_w_mode"):  # DeepSpeed's FusedAdam and DeepSpeedCPUAdam
        return not optimizer.adam_w_mode
    if name in ("Adam", "NAdam", "RAdam"):
        return not group.get("decoupled_weight_decay", False)
    return name in ("SGD", "Adagrad", "RMSprop", "Adamax", "ASGD", "Rprop", "Adadelta")
