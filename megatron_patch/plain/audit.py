"""The audit: what every live parameter is trained with, read back from the optimizer, against what was planned."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.tensor import DTensor

from megatron_patch.errors import AuditError
from megatron_patch.plain.groups import Planned, WidthPlan, planned, summary
from megatron_patch.plain.live import LiveGroup, decay_is_coupled, is_engine, live_groups, stepping_optimizer
from megatron_patch.plain.modules import plain_name

TOLERANCE = 1e-9
"""Relative: the live values are the planned ones up to the rounding of a few float64 products."""


@dataclass(frozen=True)
class Audited:
    """An optimizer that holds what was planned."""

    plan: WidthPlan = field(repr=False)
    factor: float
    """Where the schedule is: every live LR over its peak, an extra warmup aside."""
    lines: tuple[str, ...]
    """A line for each live group."""


def audit(optimizer: Any, scheduler: Any = None) -> Audited:
    """Compare the live param groups with what `width_groups` has planned for their parameters.

    LRs may stand anywhere in a schedule, but all at the same fraction of their planned peaks: a scheduler that gives
    groups the same LR, or lifts them all as far, is found. Call it when optimizer and scheduler are built, after
    a checkpoint is loaded, and during the warmup or later, when no LR is 0.

    Args:
        optimizer: a torch optimizer, Accelerate's wrapper of one, ZeRO's, or DeepSpeed's engine.
        scheduler: its scheduler, if it is not an engine's own: tells the peaks where all LRs are 0 now.

    Raises:
        AuditError: a parameter that was not planned, is in no group, or no longer the model's; another LR, weight decay
            or eps than planned, with group, parameter, live and planned value; weight decay that is not decoupled;
            another LR or weight decay in DeepSpeed's config; all LRs 0, and nothing that tells their peaks.
    """
    groups = list(live_groups(optimizer))
    plan = _require_planned(groups)
    _require_the_models_own(groups, plan)
    _require_decoupled(optimizer, groups)
    if is_engine(optimizer):
        _check_config(optimizer, plan)
        scheduler = optimizer.lr_scheduler if scheduler is None else scheduler
    for number, (group, parameters) in enumerate(groups):
        for parameter in parameters:
            _check_constants(number, group, _plan_of(parameter))
    told = _check_peaks(groups, scheduler)
    factor = _common_factor(groups, plan, scheduled=told or scheduler is not None)
    if factor == 0 and not told:
        raise AuditError(
            "every live LR is 0, so that nothing can be said of them; audit again when the warmup has begun, or give "
            "the scheduler"
        )
    return Audited(plan, factor, tuple(summary([group for group, _ in groups])))


def _plan_of(parameter: Any) -> Planned:
    found = planned(parameter)
    assert found is not None, "checked by _require_planned"
    return found[1]


def _require_planned(groups: Sequence[LiveGroup]) -> WidthPlan:
    plans = set()
    seen: dict[str, int] = {}
    plan: WidthPlan | None = None
    for number, (_, parameters) in enumerate(groups):
        for parameter in parameters:
            found = planned(parameter)
            if found is None:
                raise AuditError(
                    f"group {number}: the optimizer trains a parameter of shape {tuple(parameter.shape)} that "
                    "width_groups was not asked about; build the optimizer with width_groups(model, ...) of the model "
                    "that is trained, after fully_shard"
                )
            plan = found[0]
            plans.add(id(plan))
            seen[found[1].spec.name] = number
    if plan is None:
        raise AuditError("the optimizer has no parameters")
    if len(plans) > 1:
        raise AuditError("the optimizer's parameters are from several calls of width_groups; build it with one")
    missing = [name for name in plan.parameters if name not in seen]
    if missing:
        raise AuditError(f"{missing[0]} ({len(missing)} in all) is in no param group: the optimizer does not train it")
    return plan


def _require_the_models_own(groups: Sequence[LiveGroup], plan: WidthPlan) -> None:
    """An optimizer may train, as planned, parameters that the model has been rid of."""
    model = plan.model()
    if model is None:
        return
    current = {plain_name(name): p for name, p in model.named_parameters()}
    for number, (group, parameters) in enumerate(groups):
        for parameter in parameters:
            name = _plan_of(parameter).spec.name
            own = current.get(name)
            # fully_shard shows whole weights in a forward pass, and for as long as it keeps them.
            gathered = isinstance(parameter, DTensor) and not isinstance(own, DTensor)
            if own is not parameter and not gathered:
                raise AuditError(
                    f"{_called(number, group)}: the model's {name} is another parameter since width_groups was called, "
                    "as fully_shard and to_empty make it, and is not trained; call width_groups after them"
                )


def _require_decoupled(optimizer: Any, groups: Sequence[LiveGroup]) -> None:
    """Weight decay added to the gradient is divided by Adam's denominator: the shrink is not lr * weight decay."""
    inner = stepping_optimizer(optimizer)
    for number, (group, _) in enumerate(groups):
        if group["weight_decay"] != 0 and decay_is_coupled(inner, group):
            raise AuditError(
                f"{_called(number, group)}: weight_decay {group['weight_decay']:g} of {type(inner).__name__} is added "
                "to the gradient, where AdamW shrinks the weights by lr * weight_decay, as the rules expect; use AdamW"
            )


def _check_config(engine: Any, plan: WidthPlan) -> None:
    """The block gives only what groups lack; with another number its writer believes in what does not happen."""
    params = engine.optimizer_params() or {}
    for key, value in (("lr", plan.lr), ("weight_decay", plan.weight_decay)):
        given = params.get(key)
        if isinstance(given, (int, float)) and not math.isclose(given, value, rel_tol=TOLERANCE):
            raise AuditError(
                f"the block optimizer of DeepSpeed's config has {key} = {given:g}, but width_groups was given "
                f"{value:g}, and it is the groups that count; leave {key} out of the block"
            )


def _check_constants(number: int, group: Mapping[str, Any], one: Planned) -> None:
    values = {"weight_decay": one.weight_decay}
    if one.eps is not None:
        values["eps"] = one.eps
    for key in ("max_lr", "initial_lr"):  # OneCycleLR's, every other scheduler of torch's
        if key in group:
            values[key] = one.lr
            break
    for key, value in values.items():
        _compare(number, group, one, key, float(group.get(key, math.nan)), value)


def _check_peaks(groups: Sequence[LiveGroup], scheduler: Any) -> bool:
    """Compare the peaks that a scheduler of DeepSpeed's has set itself; return whether the peaks are known."""
    while hasattr(scheduler, "scheduler"):  # an ExtraWarmup's, Accelerate's
        scheduler = scheduler.scheduler
    peaks = getattr(scheduler, "max_lrs", None) or getattr(scheduler, "org_lrs", None)
    if peaks is not None:
        for number, ((group, parameters), peak) in enumerate(zip(groups, peaks, strict=True)):
            for parameter in parameters:
                key = f"the peak LR of {type(scheduler).__name__}"
                _compare(number, group, _plan_of(parameter), key, peak, _plan_of(parameter).lr, _FLATTENS)
        return True
    return all("initial_lr" in group for group, _ in groups)  # compared by _check_constants


_FLATTENS = (
    ": a scheduler that sets LRs of its own, as DeepSpeed's WarmupDecayLR, and WarmupLR with warmup_max_lr, do, undoes "
    "the rule; use one that multiplies, such as torch's LambdaLR or WarmupCosineLR"
)


def _common_factor(groups: Sequence[LiveGroup], plan: WidthPlan, scheduled: bool) -> float:
    """Return what every live LR is of its planned peak."""
    factor: float | None = None
    for number, (group, parameters) in enumerate(groups):
        warmed = float(group.get("extra_warmup", 1.0))
        for one in map(_plan_of, parameters):
            if one.lr == 0:
                _compare(number, group, one, "lr", float(group["lr"]), 0.0)
                continue
            if factor is None:
                factor = float(group["lr"]) / (one.lr * warmed)
                if not scheduled and "initial_lr" not in group:
                    factor = 1.0  # nothing that would change an LR
            wanted = one.lr * warmed * factor
            where = f" at {factor:.6g} of the peak, where the first group stands{_FLATTENS}"
            if factor == 1:
                where = "" if scheduled or "initial_lr" in group else "; if a scheduler did that, give it to audit"
            _compare(number, group, one, "lr", float(group["lr"]), wanted, where)
    if factor is not None and factor > 1 + TOLERANCE:
        raise AuditError(
            f"every live LR is {factor:.6g} times what was planned as its peak; give width_groups the peak LR, and do "
            "not resume an extra warmup without ExtraWarmup"
        )
    return 1.0 if factor is None else factor


def _compare(
    number: int,
    group: Mapping[str, Any],
    one: Planned,
    key: str,
    live: float,
    wanted: float,
    more: str = "",
) -> None:
    if not math.isclose(live, wanted, rel_tol=TOLERANCE, abs_tol=0.0):
        raise AuditError(
            f"{_called(number, group)}, {one.spec.name}: the optimizer has {key} = {live:.12g}, but the plan gives "
            f"{wanted:.12g}{more}"
        )


def _called(number: int, group: Mapping[str, Any]) -> str:
    return f"group {number} ({group.get('name', 'without a name')})"
