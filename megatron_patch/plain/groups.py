"""The width rule as param groups of any torch optimizer, and the plan that the audit compares them with."""

import math
import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_patch.errors import ConfigError
from megatron_patch.plain.bases import base_fan_ins
from megatron_patch.plain.modules import Class, Classified, classify
from megatron_patch.theory.width import RULES, Multipliers, ParamSpec, Rule, multipliers
from megatron_patch.theory.width import rule as rule_by_name

Group = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """What one parameter is trained with, at the peak of the schedule."""

    spec: ParamSpec
    lr: float
    weight_decay: float
    eps: float | None
    """None: the optimizer's own."""
    factors: Multipliers
    width_dependent: bool
    """Whether the rule would give it other factors at the base width."""


@dataclass(frozen=True)
class WidthPlan:
    """What `width_groups` has planned for the trainable parameters of one model."""

    rule: Rule
    lr: float
    """Of the base model."""
    weight_decay: float
    """Of the base model."""
    parameters: Mapping[str, Planned]
    """By parameter name."""
    model: weakref.ref[nn.Module] = field(repr=False, compare=False)


# By parameter: optimizers copy their groups, DeepSpeed flattens them, a checkpoint replaces their values, and the
# parameters stay the same objects.
_plans: MutableMapping[Tensor, tuple[WidthPlan, Planned]] = WeakTensorKeyDictionary()


def planned(parameter: Tensor) -> tuple[WidthPlan, Planned] | None:
    """Return what the last call of `width_groups` planned for a parameter; None if no call had it."""
    return _plans.get(parameter)


def width_groups(
    model: nn.Module,
    *,
    rule: str,
    lr: float,
    weight_decay: float,
    base: nn.Module | Mapping[str, float] | None = None,
    vector_lr: float | None = None,
    embedding_weight_decay: float | None = None,
    output: str | None = "auto",
    scale_output: bool = True,
    scale_eps: float | None = None,
    lr_exponent: float | None = None,
    wd_exponent: float | None = None,
    classes: Mapping[str, Class] | None = None,
) -> list[Group]:
    """Return the param groups of a model, each parameter with the LR and weight decay that a width rule gives it.

        lr = base lr * m^-a,  weight decay = base weight decay * m^b,  m = own fan-in / fan-in in the base model

    for weights of linear layers and convolutions (fan-in C k k / groups); embeddings and vectors keep the base LR, and
    vectors have no weight decay. For AdamW, whose weight decay is decoupled, or an optimizer of its kind. Nothing is
    initialised and nothing of the forward pass is changed.

    Args:
        model: any module, before or after DDP, `fully_shard` or `deepspeed.zero.Init`.
        rule: none, standard, independent, sqrt, sqrt-decay, no-decay or custom.
        lr, weight_decay: the peak LR and the weight decay of the base model, in AdamW's convention.
        base: the proxy, as a module (``with torch.device("meta")`` it costs nothing), or its fan-ins by parameter name
            or pattern, the first that matches: ``{"*.down_proj": 512, "*": 128}``. Required by any rule but none.
        vector_lr: peak LR of embeddings, gains and biases; None: `lr`.
        embedding_weight_decay: weight decay of embeddings; None: what the rule says.
        output: name of the output layer; "auto" recognises it (Hugging Face's, a tied one, the usual names); None:
            the model has none. A tied one is an embedding.
        scale_output: whether an untied output layer follows the matrices; if not it keeps base LR and weight decay.
        scale_eps: Adam's eps at the base width, to be scaled like the LR; None: eps is left to the optimizer.
        lr_exponent, wd_exponent: a and b of the rule custom, and of no other.
        classes: of parameters in modules that are not known: ``{"*.experts.up": ("matrix", 1)}``, the number being the
            dimension, or dimensions, of the fan-in; or ``"vector"``.

    Returns:
        Dicts with params, lr, weight_decay, eps if scaled, and, to be read: name, class, m, lr_mult, wd_mult (factors
        on the base values), width_dependent, names of the parameters in the order of params, and tied, those of them
        that are the output layer's weight too.

    Raises:
        ConfigError: naming the argument, or the parameter of a module that is not known.

    Source: arXiv 2510.19093, eqs. 7, 8, B.1, G.2; arXiv 2510.15262.

    >>> import torch
    >>> wide, narrow = torch.nn.Linear(64, 8, bias=False), torch.nn.Linear(16, 8, bias=False)
    >>> (group,) = width_groups(wide, rule="independent", lr=0.01, weight_decay=0.1, base=narrow, output=None)
    >>> group["lr"], group["weight_decay"], group["name"], group["names"]
    (0.0025, 0.4, 'matrix_m4', ['weight'])
    """
    scaling = _rule(rule, lr_exponent, wd_exponent)
    _check(lr, weight_decay, vector_lr, embedding_weight_decay, scale_eps)
    if base is None and rule != "none":
        raise ConfigError(
            "base", None, f"the proxy that rule={rule!r} compares with", "give a module of its width, or its fan-ins"
        )
    parameters = classify(model, output, classes)
    bases = {} if base is None else base_fan_ins(parameters, base, classes)
    embedding = embedding_weight_decay
    if embedding is not None and weight_decay == 0 and embedding != 0:
        raise ConfigError(
            "embedding_weight_decay",
            embedding,
            "a weight_decay above 0, of which it is a multiple",
            "give weight_decay",
        )
    plan: dict[str, Planned] = {}
    for p in parameters:
        spec = ParamSpec(p.name, p.shape, p.role, p.fan_in, bases.get(p.name, float(p.fan_in)))
        factors, at_base = (
            multipliers(
                scaling,
                p.role,
                m,
                vector_lr=1.0 if vector_lr is None else vector_lr / lr,
                embedding_weight_decay=None if embedding is None else (embedding / weight_decay if embedding else 0.0),
                scale_output=scale_output,
                scale_eps=scale_eps is not None,
            )
            for m in (spec.m, 1.0)
        )
        plan[p.name] = Planned(
            spec,
            lr * factors.lr,
            weight_decay * factors.weight_decay,
            None if scale_eps is None else scale_eps * factors.eps,
            factors,
            factors != at_base,
        )
        shrink = plan[p.name].lr * plan[p.name].weight_decay
        if shrink >= 1:
            raise ConfigError(
                "weight_decay",
                weight_decay,
                f"a product with the LR below 1: for {p.name} it is {shrink:.3g} and one step would wipe it out",
                "lower lr or weight_decay",
            )
    whole = WidthPlan(scaling, lr, weight_decay, plan, weakref.ref(model))
    for p in parameters:
        _plans[p.parameter] = (whole, plan[p.name])
    return _groups(parameters, plan)


def _groups(parameters: Sequence[Classified], plan: Mapping[str, Planned]) -> list[Group]:
    """One group for the parameters that share class, m and every number, in the order of their first parameter."""
    members: dict[tuple[Any, ...], list[Classified]] = {}
    for p in parameters:
        one = plan[p.name]
        key = (p.role, one.spec.m, one.lr, one.weight_decay, one.eps)
        members.setdefault(key, []).append(p)
    several = [role for role, *_ in members]
    groups = []
    for (role, m, lr, weight_decay, eps), which in members.items():
        one = plan[which[0].name]
        group: Group = {
            "params": [p.parameter for p in which],
            "lr": lr,
            "weight_decay": weight_decay,
            "name": f"{role}_m{m:g}" if several.count(role) > 1 or m != 1 else role,
            "class": role,
            "m": m,
            "lr_mult": one.factors.lr,
            "wd_mult": one.factors.weight_decay,
            "width_dependent": one.width_dependent,
            "names": [p.name for p in which],
            "tied": [p.name for p in which if p.tied],
        }
        groups.append(group if eps is None else group | {"eps": eps})
    return groups


def summary(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each group, and what a user should know of it.

    Args:
        groups: what `width_groups` returned, or an optimizer's live ones.
    """
    lines = []
    for group in groups:
        eps = f"  eps {group['eps']:.3g}" if "eps" in group else ""
        more = f" and {len(group['names']) - 1} more" if len(group["names"]) > 1 else ""
        lines.append(
            f"{group['name']:14s} lr {group['lr']:.6g}  weight decay {group['weight_decay']:.6g}{eps}  "
            f"{group['names'][0]}{more}"
        )
        lines += [f"{name} is also the output layer's weight, and of the class embedding" for name in group["tied"]]
        if group["m"] < 1:
            lines.append(
                f"{group['name']}: m = {group['m']:g}, narrower than the base, and the rule scales down in width; were "
                "proxy and target swapped?"
            )
    return lines


def _rule(name: str, lr_exponent: float | None, wd_exponent: float | None) -> Rule:
    if name not in (*RULES, "custom"):
        raise ConfigError("rule", repr(name), f"one of {', '.join(RULES)}, custom", "choose one of them")
    for argument, exponent in (("lr_exponent", lr_exponent), ("wd_exponent", wd_exponent)):
        if name == "custom" and exponent is None:
            raise ConfigError(argument, None, "a number with rule='custom'", "give the exponent")
        if name != "custom" and exponent is not None:
            raise ConfigError(
                argument, exponent, f"no exponent, since rule={name!r} fixes it", "use rule='custom' or drop it"
            )
        if exponent is not None and not abs(exponent) <= 4:
            raise ConfigError(argument, exponent, "a number between -4 and 4", "check the exponent")
    return rule_by_name(name, lr_exponent, wd_exponent)


def _check(
    lr: float,
    weight_decay: float,
    vector_lr: float | None,
    embedding_weight_decay: float | None,
    scale_eps: float | None,
) -> None:
    if not 0 < lr < math.inf:
        raise ConfigError("lr", lr, "a positive number, the base model's peak LR", "correct it")
    for argument, value in (
        ("weight_decay", weight_decay),
        ("vector_lr", vector_lr),
        ("embedding_weight_decay", embedding_weight_decay),
        ("scale_eps", scale_eps),
    ):
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(argument, value, "a finite number >= 0", "correct it")
