"""The classes of parameters that share LR, weight decay and eps, read from the live param groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.theory.updates import rule_under
from megatron_patch.theory.width import Multipliers
from megatron_patch.upstream.ranks import gather
from megatron_patch.upstream.width.audit import live_groups
from megatron_patch.upstream.width.groups import trains_with
from megatron_patch.upstream.width.plan import Hyperparameters, Plan


@dataclass(frozen=True)
class ParameterClass:
    """Parameters that share every hyperparameter, under the name by which they are logged."""

    label: str
    """The class, e.g. ``matrix``; with the multiplier, e.g. ``matrix_m4``, where a class has several."""
    hyperparameters: Hyperparameters


def parameter_classes(plan: Plan, optimizer: Any) -> tuple[ParameterClass, ...]:
    """Return the classes of the whole model, the same on every rank; a collective call.

    What each is trained with is read from the group that holds it: without a rule that is Megatron's or the script's
    own doing, --decoupled-lr for example, of which the plan knows nothing.

    Args:
        plan: who is what.
        optimizer: the live one, after a load.
    """
    specs = {id(p.parameter): p.spec for p in plan.parameters}
    local = {
        (spec.role, spec.m, _peak(plan, group, plan.hyperparameters[spec.name]))
        for group, parameters in live_groups(optimizer)
        for spec in (specs[id(parameter)] for parameter in parameters)
    }
    by_role: dict[str, dict[Hyperparameters, float]] = {}
    for role, m, hyperparameters in {entry for entries in gather(local) for entry in entries}:
        by_role.setdefault(role, {})[hyperparameters] = m
    classes = []
    for role, variants in sorted(by_role.items()):
        ordered = sorted(variants.items(), key=lambda item: (item[1], item[0].weight_decay, item[0].lr))
        labels = [role] if len(variants) == 1 else _labels(role, ordered)
        classes += [ParameterClass(label, h) for label, (h, _) in zip(labels, ordered, strict=True)]
    return tuple(classes)


def _peak(plan: Plan, group: Mapping[str, Any], planned: Hyperparameters) -> Hyperparameters:
    wd_mult = float(group["wd_mult"])
    return Hyperparameters(
        lr=float(group["max_lr"]),
        min_lr=float(group["min_lr"] or 0.0),
        weight_decay=wd_mult * plan.weight_decay,
        eps=group.get("eps", planned.eps),
        factors=Multipliers(1.0, wd_mult),
        optimizer=group.get("optimizer", plan.optimizer.name),
    )


def _labels(role: str, variants: Sequence[tuple[Hyperparameters, float]]) -> list[str]:
    """Tell the variants of a role apart by what differs: the multiplier, else the weight decay, else the LR, or all."""
    tellers = (
        [f"m{m:g}" for _, m in variants],
        [f"wd{h.weight_decay:g}" for h, _ in variants],
        [f"lr{h.lr:g}" for h, _ in variants],
    )
    whole = ["_".join(parts) for parts in zip(*tellers, strict=True)]
    numbered = [f"{text}_{i}" for i, text in enumerate(whole)]
    chosen = next((t for t in (*tellers, whole) if len(set(t)) == len(t)), numbered)
    return [f"{role}_{text}" for text in chosen]


def live_values(classes: Sequence[ParameterClass], optimizer: Any) -> dict[str, tuple[float, float]]:
    """Return ``{label: (lr, weight decay)}`` that the coming step will use, from the live param groups.

    Every rank holds every group, also those whose parameters live on other ranks; under Megatron-FSDP v2 only those of
    which it has a part.
    """
    values = {}
    for c in classes:
        for group in optimizer.param_groups:
            if trains_with(group, c.hyperparameters):
                values[c.label] = (float(group["lr"]), float(group["weight_decay"]))
                break
    return values


def summary(plan: Plan, classes: Sequence[ParameterClass]) -> list[str]:
    """Return the lines that tell a user at start what each class is trained with."""
    lines = [f"> width scaling: {plan.rule.name} ({plan.rule.source}); peak LR, weight decay, eps per class:"]
    several = plan.optimizer.name != "adam"
    if several and plan.rule.follows_updates:
        under = rule_under(plan.rule, plan.optimizer.of_matrices)
        how = f" ({plan.optimizer.muon_scale})" if plan.optimizer.name == "muon" else ""
        decay = f"weight decay with m^{under.wd_exponent:g}" if under.decays else "no weight decay"
        lines.append(
            f">   under {plan.optimizer.name}{how}, where a matrix grows both ways: lr with m^{-under.lr_exponent:g}, "
            f"{decay}; derived for this optimizer, see docs/width-scaling.md"
        )
    for c in classes:
        h = c.hyperparameters
        eps = "" if h.eps is None else f"  eps {h.eps:.3g}"
        by = f"  {h.optimizer}" if several else ""
        lines.append(f">   {c.label:12s} lr {h.lr:.6g}  weight decay {h.weight_decay:.6g}{eps}{by}")
    return lines
