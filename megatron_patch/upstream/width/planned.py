"""A run whose parameters are planned: who gets which LR, weight decay and eps, and the live optimizer held to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_patch.config import Settings
from megatron_patch.errors import AuditError
from megatron_patch.upstream.width.audit import (
    adopt_live_groups,
    agree_on_errors,
    audit_build,
    audit_groups,
    audit_schedule,
    check_checkpoint,
)
from megatron_patch.upstream.width.groups import trains_with
from megatron_patch.upstream.width.parameters import describe
from megatron_patch.upstream.width.plan import (
    Hyperparameters,
    Plan,
    config_overrides,
    initialise_by_fan_in,
    make_plan,
)


@dataclass(frozen=True)
class ParameterClass:
    """Parameters that share every hyperparameter, under the name by which they are logged."""

    label: str
    """The class, e.g. ``matrix``; with the multiplier, e.g. ``matrix_m4``, where a class has several."""
    hyperparameters: Hyperparameters


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks; a collective call, where there are several."""
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
    distinct = {entry for entries in gather(local) for entry in entries}
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
        for group in optimizer.param_groups:
            if trains_with(group, c.hyperparameters):
                values[c.label] = (float(group["lr"]), float(group["weight_decay"]))
                break
    return values


@dataclass(frozen=True)
class PlannedRun:
    """The plan, and the optimizer that was built by it and audited."""

    plan: Plan
    optimizer: Any
    classes: tuple[ParameterClass, ...]

    @classmethod
    def build(
        cls, settings: Settings, call: Callable[..., Any], config: Any, model: Any, overrides: Any
    ) -> "PlannedRun":
        """Plan every parameter, let Megatron build the optimizer with the plan's overrides, and audit it; a collective.

        Args:
            settings: ours.
            call: Megatron's `get_megatron_optimizer` with its caller's arguments, but for ``config_overrides``.
            config: its OptimizerConfig.
            model: its model chunks.
            overrides: what the caller gave; None for Megatron's own.

        Raises:
            AuditError: on all ranks, if the optimizer of one does not hold the plan.
            ValueError: on all ranks, if a parameter of one has no known fan-in.
        """
        plan = collectively(lambda: _make_plan(settings, config, model))
        if overrides is None:
            from megatron.core.optimizer import get_standard_config_overrides

            overrides = get_standard_config_overrides(config=config)
        optimizer = call(config_overrides={**overrides, **config_overrides(plan)})
        collectively(lambda: audit_build(plan, optimizer))
        if settings.override:
            adopt_live_groups(optimizer)
        return cls(plan, optimizer, parameter_classes(plan))

    def check_checkpoint(self, loaded: Any) -> str | None:
        """Compare the arguments in what Megatron's `_load_base_checkpoint` returned with this run's.

        That is before Megatron fits what it read into this run's param groups, where it would find but a misfit.

        Returns:
            A note for the user, or None.

        Raises:
            ConfigError: other hyperparameters.
        """
        from megatron.training import get_args
        from megatron.training.checkpointing import CheckpointType

        state_dict, _, release, kind = loaded
        if not state_dict or "args" not in state_dict:
            return None
        ours = get_args()
        weights_only = bool(release or ours.finetune or ours.no_load_optim)
        legacy = kind == CheckpointType.LEGACY
        return check_checkpoint(state_dict["args"], ours, self.plan, weights_only, in_groups=legacy)

    def audit(self, optimizer: Any, scheduler: Any) -> None:
        """Hold the live optimizer and scheduler to the plan once more, after a checkpoint was loaded; a collective."""

        def both() -> None:
            audit_groups(self.plan, optimizer)
            audit_schedule(self.plan, optimizer, scheduler)

        collectively(both)

    def summary(self) -> list[str]:
        """Return the lines that tell a user at start what each class is trained with."""
        rule = self.plan.rule
        lines = [f"> width scaling: {rule.name} ({rule.source}); peak LR, weight decay, eps per class:"]
        for c in self.classes:
            h = c.hyperparameters
            lines.append(f">   {c.label:12s} lr {h.lr:.6g}  weight decay {h.weight_decay:.6g}  eps {h.eps:.3g}")
        return lines


def collectively[Result](step: Callable[[], Result]) -> Result:
    """Return what `step` does; if it raises on any rank, raise on all.

    Raises:
        AuditError: of `step`, on this rank or another; as well for its ValueError, where there are several ranks.
    """
    result: list[Result] = []
    error = None
    try:
        result.append(step())
    except (AuditError, ValueError) as caught:
        error = caught
    agree_on_errors(error)
    return result[0]


def _make_plan(settings: Settings, config: Any, model: Any) -> Plan:
    from megatron.core import parallel_state
    from megatron.core.utils import get_model_config
    from megatron.training import get_args, print_rank_0

    args = get_args()
    model_config = get_model_config(model[0])
    width = settings.width
    parameters = list(describe(model, model_config, width, parallel_state))
    for p in parameters:
        if p.assumed and width.rule != "none":
            print_rank_0(
                f"WARNING: --width-scaling: {p.spec.name} is no layer megatron_patch knows; m = {p.spec.m:g}, "
                "the ratio of the hidden sizes, is assumed"
            )
    if width.init_scaling == "fan-in":
        initialise_by_fan_in(parameters, model_config)
    if width.active and not args.untie_embeddings_and_output_weights:
        print_rank_0("> the LM head is tied to the word embedding: it belongs to the class embedding and is not scaled")
    return make_plan(
        parameters,
        width,
        config,
        args.end_weight_decay,
        use_mup=bool(getattr(args, "use_mup", False)),
        scope_key=settings.warmup.scope == "width-dependent",
    )
