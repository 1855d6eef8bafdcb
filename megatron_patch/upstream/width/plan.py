"""The width rule as Megatron's own `config_overrides`, and the initial weights by fan-in."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_patch.config import WidthConfig
from megatron_patch.config.optimizer import OptimizerChoice
from megatron_patch.errors import AuditError, ConfigError
from megatron_patch.theory.updates import Shapes, UpdateScale, scaled_multipliers
from megatron_patch.theory.width import Multipliers, ParamSpec, Rule, multipliers
from megatron_patch.upstream.width.optimizers import emerging_overrides, optimizer_of
from megatron_patch.upstream.width.parameters import NamedParameter, held_here, is_convolution

# The layers that Megatron initialises with a smaller std the deeper the model is.
_WRITES_RESIDUAL = re.compile(r"\.(linear_proj|linear_fc2|out_proj|fc2_latent_proj)\.")


@dataclass(frozen=True)
class Hyperparameters:
    """What one parameter is trained with, at the peak of the schedule."""

    lr: float
    min_lr: float
    weight_decay: float
    """At the end of the weight-decay schedule (it is constant unless asked otherwise)."""
    eps: float | None
    """Adam's; None for an optimizer without --adam-eps."""
    factors: Multipliers
    optimizer: str = "adam"
    """Megatron's name of what trains it."""


@dataclass(frozen=True)
class Plan:
    """Every parameter of this rank with its hyperparameters according to the rule."""

    width: WidthConfig
    rule: Rule
    weight_decay: float
    """lambda of the base model, at the end of the weight-decay schedule."""
    optimizer: OptimizerChoice
    parameters: tuple[NamedParameter, ...]
    hyperparameters: Mapping[str, Hyperparameters]
    """By global parameter name."""
    override_keys: Mapping[str, tuple[tuple[str, float], ...]]
    """By global parameter name: the sorted items of the param-group override the parameter needs."""


def make_plan(
    parameters: Sequence[NamedParameter],
    width: WidthConfig,
    config: Any,
    weight_decay: float,
    *,
    use_mup: bool = False,
    scope_key: bool = False,
) -> Plan:
    """Work out what the rule gives every parameter.

    Args:
        parameters: all trainable parameters of this rank.
        width: the rule.
        config: Megatron's OptimizerConfig: lr, min_lr, adam_eps, apply_wd_to_qk_layernorm, optimizer and Muon's scale.
        weight_decay: lambda of the base model, at the end of the weight-decay schedule.
        use_mup: Megatron's own --use-mup adds the overrides of LR and eps.
        scope_key: mark the groups that depend on width, for a warmup that applies to those alone.

    Raises:
        ConfigError: a weight decay of embeddings without one to be a multiple of; --use-mup for a model whose layers
            have several width multipliers.
    """
    rule = width.scaling
    choice, hand_over = OptimizerChoice.of(vars(config)), emerging_overrides(config)
    if use_mup and width.active:
        _check_single_multiplier(parameters)
    base_min_lr = config.min_lr or 0.0
    embedding_decay = width.embedding_weight_decay
    if embedding_decay is not None and not weight_decay:
        if embedding_decay:
            raise ConfigError(
                "--embedding-weight-decay",
                embedding_decay,
                "a --weight-decay above 0: Megatron keeps weight decays as multiples of it",
                "give --weight-decay, or drop this flag",
            )
        embedding_decay = 1.0
    elif embedding_decay is not None:
        embedding_decay /= weight_decay
    hyperparameters: dict[str, Hyperparameters] = {}
    keys: dict[str, tuple[tuple[str, float], ...]] = {}
    for p in parameters:
        optimizer = optimizer_of(p.spec.name, p.parameter, config, hand_over)
        scale = choice.scale_of(optimizer)
        factors, at_base_width = (
            _factors(rule, spec, scale)(
                vector_lr=1.0 if width.vector_lr is None else width.vector_lr / config.lr,
                embedding_weight_decay=embedding_decay,
                scale_output=width.scale_output_layer,
                scale_eps=width.scale_adam_eps and optimizer == "adam",
            )
            for spec in (p.spec, _at_base_width(p.spec))
        )
        width_dependent = scope_key and factors != at_base_width
        if p.spec.role == "vector" and config.apply_wd_to_qk_layernorm and _is_qk_layernorm(p.spec.name):
            factors = Multipliers(factors.lr, 1.0 if rule.decays else 0.0, factors.eps)
        hyperparameters[p.spec.name] = Hyperparameters(
            lr=config.lr * factors.lr,
            min_lr=base_min_lr * factors.lr,
            weight_decay=weight_decay * factors.weight_decay,
            eps=config.adam_eps * factors.eps if optimizer == "adam" else None,
            factors=factors,
            optimizer=optimizer,
        )
        shrink = hyperparameters[p.spec.name].lr * hyperparameters[p.spec.name].weight_decay
        if shrink >= 1:
            raise ConfigError(
                "--weight-decay",
                weight_decay,
                f"a product with the LR below 1: for {p.spec.name} it is {shrink:.3g} and one step would wipe it out",
                "lower --lr or --weight-decay",
            )
        megatrons_lr = use_mup and p.spec.role in ("matrix", "output") and optimizer != "muon"
        keys[p.spec.name] = tuple(sorted(_override(p, factors, config, megatrons_lr, width_dependent).items()))
    return Plan(width, rule, weight_decay, choice, tuple(parameters), hyperparameters, keys)


def _factors(rule: Rule, spec: ParamSpec, scale: UpdateScale) -> Callable[..., Multipliers]:
    """Return what gives a parameter its factors from the options of `multipliers`."""

    def factors(**options: Any) -> Multipliers:
        adams = multipliers(rule, spec.role, spec.m, **options)
        if scale == "entrywise" or spec.role == "vector":
            return adams
        fan_out = float(spec.shape[0]) if spec.base_fan_out is None else spec.base_fan_out
        shapes = Shapes(spec.shape[0], spec.shape[-1], fan_out, spec.base_fan_in)
        return scaled_multipliers(rule, spec.role, scale, shapes, adams)

    return factors


def _at_base_width(spec: ParamSpec) -> ParamSpec:
    """Return a parameter as if the base model had its sizes."""
    return replace(spec, base_fan_in=float(spec.fan_in), base_fan_out=None)


def _check_single_multiplier(parameters: Sequence[NamedParameter]) -> None:
    by_m = {p.spec.m: p.spec.name for p in parameters if p.spec.role == "matrix"}
    if len(by_m) > 1:
        (m, name), (other_m, other) = sorted(by_m.items())[:2]
        raise ConfigError(
            "--use-mup",
            f"with m = {m:g} for {name} and m = {other_m:g} for {other}",
            "one width multiplier for all layers: Megatron divides every LR by the ratio of the hidden sizes",
            "drop the flags --base-... other than --base-hidden-size, or drop --use-mup",
        )


def _is_qk_layernorm(name: str) -> bool:
    """The names that Megatron's --apply-wd-to-qk-layernorm exempts from its "no decay" for vectors."""
    return "q_layernorm." in name or "k_layernorm." in name


def _override(
    p: NamedParameter, factors: Multipliers, config: Any, megatrons_lr: bool, width_dependent: bool
) -> dict[str, float]:
    """Return the keys in which a parameter's group must differ from Megatron's default group.

    `megatrons_lr`: Megatron's own muP sets LR and eps of this one.
    """
    override: dict[str, float] = {}
    if factors.lr != 1.0:
        # `lr_mult` is in the key by which groups are matched on resume and nothing reads it: it keeps groups that
        # differ in LR alone apart in every Megatron version.
        override["lr_mult"] = factors.lr
        if not megatrons_lr:
            override["max_lr"] = config.lr * factors.lr
            override["min_lr"] = (config.min_lr or 0.0) * factors.lr
    decayed_by_default = p.spec.role != "vector" or (config.apply_wd_to_qk_layernorm and _is_qk_layernorm(p.spec.name))
    if decayed_by_default and factors.weight_decay != 1.0:
        # Vectors are left to Megatron's own override, wd_mult=0: a second value for the same key is refused by it.
        override["wd_mult"] = factors.weight_decay
    if factors.eps != 1.0 and not megatrons_lr:
        override["eps"] = config.adam_eps * factors.eps
    if width_dependent:
        override["width_dependent"] = 1.0
    return override


def config_overrides(plan: Plan) -> dict[Any, Any]:
    """Return the plan in Megatron's public form: a dict of ParamKey -> ParamGroupOverride.

    Matching is by identity of the parameter, so that a rule matches exactly the parameters it was computed for.
    """
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    members: dict[tuple[tuple[str, float], ...], set[int]] = {}
    for p in plan.parameters:
        key = plan.override_keys[p.spec.name]
        if key:
            members.setdefault(key, set()).add(id(p.parameter))
    return {
        # Predicates are compared by name alone: the name says everything the override says.
        ParamKey(
            with_name_predicate=ParamWithNamePredicate(
                name="megatron_patch " + " ".join(f"{k}={v!r}" for k, v in key),
                fn=lambda parameter, name, ids=frozenset(ids): id(parameter) in ids,
            )
        ): dict(key)
        for key, ids in members.items()
    }


@torch.no_grad()
def initialise_by_fan_in(parameters: Sequence[NamedParameter], config: Any) -> None:
    """Rescale freshly built weights in place to std 1/sqrt(own global fan-in), embeddings to 1/sqrt(hidden).

    Megatron drew every weight as N(0, s^2) with one of three known s, the same global matrix at any tensor-parallel
    size under its own random-number discipline; multiplying by std/s keeps both properties.

    Args:
        parameters: all trainable parameters of this rank, before any optimizer copied them.
        config: the model's TransformerConfig (init_method_std, embedding_init_method_std, num_layers, ...).

    Raises:
        AuditError: a weight whose RMS is none of the stds that Megatron uses, so that its factor is unknown.

    Source: arXiv 2510.19093, G.3.
    """
    depth = 2.0 if not getattr(config, "is_hybrid_model", False) else 1.0
    std = config.init_method_std
    std_into_residual = std / math.sqrt(depth * config.num_layers)
    embedding_std = getattr(config, "embedding_init_method_std", None) or std
    for p in parameters:
        if p.spec.role == "vector" or is_convolution(p.spec.name):
            continue
        weight = p.parameter.data
        rms = _rms(weight)
        # Six standard errors of the RMS of a Gaussian sample of this size, and bf16's rounding.
        tolerance = 6 / math.sqrt(2 * weight.numel()) + 0.01
        if p.spec.role == "embedding":
            usual = embedding_std
        else:
            usual = std_into_residual if _WRITES_RESIDUAL.search(f".{p.spec.name}") else std
        # What this layer has by its name comes first: the RMS of a tiny one may fit two stds, another one on each rank.
        stds = dict.fromkeys((usual, std, std_into_residual, embedding_std))
        drawn = next((s for s in stds if abs(rms / s - 1) <= tolerance), None)
        if drawn is None:
            raise AuditError(
                f"--init-scaling fan-in: {p.spec.name} has RMS {rms:.4g}, which is none of Megatron's initial stds "
                f"{', '.join(f'{s:.4g}' for s in stds)}; drop --init-scaling or initialise this layer in the model"
            )
        held_here(weight).mul_(1 / math.sqrt(p.spec.fan_in) / drawn)
    _compute_with([p.parameter for p in parameters])


def _compute_with(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Bring Megatron-FSDP's parameters to the weights that it computes with, which are others."""
    for model in dict.fromkeys(getattr(parameter, "_megatron_fsdp_model", None) for parameter in parameters):
        if model is not None:
            model.install_optimized_model_weights()
            model.start_param_sync(force_sync=True)
            model.synchronize_param_gather()  # an optimizer is built from what it puts into the model
    if any(hasattr(parameter, "_mfsdp_parameter_group") for parameter in parameters):  # v2
        from megatron.core.distributed.fsdp.src.megatron_fsdp.experimental import parameter_group

        parameter_group.sync_model_weights_from_main_weights(parameters)


def _rms(weight: torch.Tensor) -> float:
    """Return the RMS of a weight; under FSDP, where each rank has a shard of its own, a collective call."""
    square = held_here(weight).float().square().sum()
    for axis, placement in enumerate(getattr(weight, "placements", ())):
        if not placement.is_replicate():
            torch.distributed.all_reduce(square, group=weight.device_mesh.get_group(axis))  # type: ignore[attr-defined]
    return math.sqrt(square.item() / weight.numel())
