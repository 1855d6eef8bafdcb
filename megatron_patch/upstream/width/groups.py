"""When two param groups are the same: to Megatron on resume, to a schedule, and to a class of the plan."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_patch.upstream.width.plan import Hyperparameters

TOLERANCE = 1e-9
"""Relative; the live values are the planned ones up to the rounding of one or two float64 products."""

IDENTIFIER_KEYS = (
    "wd_mult",
    "lr_mult",
    "is_expert_parallel",
    "is_decoupled_lr",
    "max_lr",
    "min_lr",
    "start_wd",
    "end_wd",
)
"""What Megatron matches saved and live param groups by (0.19's, a superset of earlier ones)."""

SCHEDULE_KEYS = ("max_lr", "min_lr", "start_wd", "end_wd", "wd_mult")
"""What decides the LR and weight decay of a group at every step."""


def identifier(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what Megatron finds a group by on resume: two groups with the same one are mixed up."""
    return tuple(group.get(key) for key in IDENTIFIER_KEYS)


def schedule_key(group: Mapping[str, Any]) -> str:
    """Return what tells param groups with different schedules apart: the same text on every rank."""
    return " ".join(f"{key}={group.get(key)!r}" for key in SCHEDULE_KEYS)


def trains_with(group: Mapping[str, Any], planned: Hyperparameters) -> bool:
    """Return whether a live group has peak and minimum LR, weight decay and eps of `planned`, up to rounding."""
    return (
        math.isclose(group["max_lr"], planned.lr, rel_tol=TOLERANCE)
        and math.isclose(group["min_lr"] or 0.0, planned.min_lr, rel_tol=TOLERANCE)
        and math.isclose(group["wd_mult"], planned.factors.weight_decay, rel_tol=TOLERANCE)
        and same_eps(group.get("eps"), planned.eps)
    )


def same_eps(live: float | None, planned: float | None) -> bool:
    """Return whether two eps are one, up to rounding; nothing is asked of a group or an optimizer that has none."""
    return live is None or planned is None or math.isclose(live, planned, rel_tol=TOLERANCE)
