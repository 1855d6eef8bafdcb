"""What a run leaves behind: hyperparameters.json, run.json, and LR and weight decay per class in Megatron's writers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_patch.config import Settings
from megatron_patch.errors import AuditError, ConfigError
from megatron_patch.files.run_json import Status
from megatron_patch.upstream.width.audit import live_groups
from megatron_patch.upstream.width.plan import Hyperparameters, Plan


@dataclass(frozen=True)
class ParameterClass:
    """Parameters that share every hyperparameter, under the name by which they are logged."""

    label: str
    """The class, e.g. ``matrix``; with the multiplier, e.g. ``matrix_m4``, where a class has several."""
    hyperparameters: Hyperparameters


def _gather(value: Any) -> list[Any]:
    if not torch.distributed.is_initialized():
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def parameter_classes(plan: Plan) -> tuple[ParameterClass, ...]:
    """Return the classes of the whole model, the same on every rank; a collective call.

    Raises:
        AuditError: there is a rule, but no parameter of the whole model that it could scale. (One rank may well have
            none: a pipeline stage of embeddings alone.)
    """
    local = {(p.spec.role, p.spec.m, plan.hyperparameters[p.spec.name]) for p in plan.parameters}
    distinct = {entry for entries in _gather(local) for entry in entries}
    by_role: dict[str, dict[Hyperparameters, float]] = {}
    for role, m, hyperparameters in distinct:
        by_role.setdefault(role, {})[hyperparameters] = m
    if plan.width.rule != "none" and not by_role.keys() & {"matrix", "output"}:
        raise AuditError(
            f"--width-scaling {plan.rule.name} scales no parameter: the model has {', '.join(sorted(by_role))} only"
        )
    classes = []
    for role, variants in sorted(by_role.items()):
        for hyperparameters, m in sorted(variants.items(), key=lambda item: (item[1], item[0].weight_decay)):
            label = role
            if len(variants) > 1:
                many_m = len(set(variants.values())) > 1
                label = f"{role}_m{m:g}" if many_m else f"{role}_wd{hyperparameters.weight_decay:g}"
            classes.append(ParameterClass(label, hyperparameters))
    return tuple(classes)


def live_values(classes: Sequence[ParameterClass], optimizer: Any) -> dict[str, tuple[float, float]]:
    """Return ``{label: (lr, weight decay)}`` that the coming step will use, from the live param groups.

    Every rank holds every group, also those whose parameters live on other ranks.
    """
    values = {}
    for c in classes:
        h = c.hyperparameters
        for group in optimizer.param_groups:
            if (
                math.isclose(group["max_lr"], h.lr, rel_tol=1e-9)
                and math.isclose(group["wd_mult"], h.factors.weight_decay, rel_tol=1e-9)
                and math.isclose(group.get("eps", h.eps), h.eps, rel_tol=1e-9)
            ):
                values[c.label] = (float(group["lr"]), float(group["weight_decay"]))
                break
    return values


def hyperparameter_table(plan: Plan, optimizer: Any) -> dict[str, Any]:
    """Return the content of hyperparameters.json, the values read from the live groups of every rank; a collective.

    Raises:
        AuditError: a parameter that no rank trains, or replicas of one that are trained differently.
    """
    specs = {id(p.parameter): p.spec for p in plan.parameters}
    live: dict[str, dict[str, float]] = {}
    for group, parameters in live_groups(optimizer):
        for parameter in parameters:
            name = specs[id(parameter)].name
            live[name] = {
                "lr": group["max_lr"],
                "weight_decay": group["wd_mult"] * plan.weight_decay,
                "eps": group.get("eps", plan.hyperparameters[name].eps),
            }
    merged: dict[str, dict[str, float]] = {}
    described: dict[str, Any] = {}
    for rank_specs, rank_live in _gather((list(specs.values()), live)):
        described.update((spec.name, spec) for spec in rank_specs)
        for name, values in rank_live.items():
            if merged.setdefault(name, values) != values:
                raise AuditError(f"{name} is trained with {merged[name]} on one rank and with {values} on another")
    missing = sorted(set(described) - set(merged))
    if missing:
        raise AuditError(f"{missing[0]} is in no param group of any rank: the optimizer does not train it")
    width = plan.width
    return {
        "rule": plan.rule.name,
        "exponents": [plan.rule.lr_exponent, plan.rule.wd_exponent],
        "base": {"hidden_size": width.base_hidden_size, **width.base_dimensions},
        "source": plan.rule.source,
        "parameters": [
            {
                "name": name,
                "class": spec.role,
                "shape": list(spec.shape),
                "fan_in": spec.fan_in,
                "base_fan_in": spec.base_fan_in,
                "m": spec.m,
                **merged[name],
            }
            for name, spec in sorted(described.items())
        ],
    }


def writing[Result](directory: str, step: Callable[[], Result]) -> Result:
    """Return what `step`, which begins files in the metrics folder, returns.

    Raises:
        ConfigError: the folder cannot be written to. At the start of a run that is a mistake, not bad luck.
    """
    try:
        return step()
    except OSError as error:
        raise ConfigError(
            "--metrics-dir",
            directory,
            f"a folder for the metrics that can be written to ({error.strerror or error})",
            "make room, correct its permissions, or give another folder",
        ) from None


def status_of(error: BaseException, last_losses: Mapping[str, float] | None) -> Status:
    """Return the status for run.json of a training that `error` ended.

    ``stopped``: Megatron left by itself, as it does at --exit-interval. ``diverged``: a loss or gradient was NaN or Inf
    and, where Megatron repeats the step to tell it from a broken machine, was so again. ``failed``: anything else.

    Megatron's own way out after such a step ends in an arbitrary exception: it saves a checkpoint first, which without
    --save is a TypeError (0.19.2). So its state is asked, not the exception.

    Args:
        error: what left Megatron's `train`.
        last_losses: the training losses last seen; None if there were none.
    """
    from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

    if isinstance(error, SystemExit) and not error.code:
        return Status.STOPPED
    reproduced = (RerunState.WILL_RERUN_FROM_CHECKPOINT, RerunState.RERUNNING_FROM_CHECKPOINT)
    rejected = get_rerun_state_machine().state in reproduced
    # With --rerun-mode disabled the check raises this at once.
    rejected |= isinstance(error, RuntimeError) and "Unexpected result" in str(error)
    rejected |= not all(math.isfinite(loss) for loss in (last_losses or {}).values())
    return Status.DIVERGED if rejected else Status.FAILED


def measured_folder() -> str | None:
    """Return the metrics folder of the training that this process has done.

    None if nothing was measured, on all ranks but the last, which keeps run.json, under --no-report, and if the script
    did not get as far as parsing its arguments.
    """
    from megatron.training.global_vars import get_args

    try:
        args = get_args()
    except AssertionError:  # Megatron's way to say that there are none
        return None
    metrics = Settings.of(vars(args)).metrics
    if not metrics.active or args.rank != args.world_size - 1 or not metrics.report:
        return None
    return metrics.directory
