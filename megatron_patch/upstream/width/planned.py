"""A run whose parameters are planned: who gets which LR, weight decay and eps, and the live optimizer held to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_patch.config import Settings
from megatron_patch.errors import AuditError, ConfigError
from megatron_patch.upstream.ranks import collectively, gather
from megatron_patch.upstream.width.audit import (
    adopt_live_groups,
    audit_build,
    audit_graph,
    audit_groups,
    audit_schedule,
    check_checkpoint,
    restore_peaks,
)
from megatron_patch.upstream.width.bases import cautions, check_bases_used
from megatron_patch.upstream.width.parameters import describe, dimensions_read
from megatron_patch.upstream.width.plan import (
    Plan,
    config_overrides,
    initialise_by_fan_in,
    make_plan,
)


@dataclass(frozen=True)
class PlannedRun:
    """The plan, and the optimizer that was built by it and audited."""

    plan: Plan
    optimizer: Any

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
            AuditError: on all ranks, if the optimizer of one does not hold the plan; and what `plan_run` raises.
        """
        from megatron.training import get_args

        plan = plan_run(settings, get_args(), config, model)
        if overrides is None:
            from megatron.core.optimizer import get_standard_config_overrides

            overrides = get_standard_config_overrides(config=config)
        optimizer = call(config_overrides={**overrides, **config_overrides(plan)})
        collectively(lambda: audit_build(plan, optimizer))
        if settings.override:
            adopt_live_groups(optimizer)
        return cls(plan, optimizer)

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
        _check_back_end(state_dict["args"], ours)
        weights_only = bool(release or ours.finetune or ours.no_load_optim)
        legacy = kind == CheckpointType.LEGACY
        return check_checkpoint(state_dict["args"], ours, self.plan, weights_only, in_groups=legacy)

    def audit(self, optimizer: Any, scheduler: Any, args: Any) -> None:
        """Hold the live optimizer and scheduler to the plan once more, after a checkpoint was loaded; a collective.

        Args:
            optimizer: the live one.
            scheduler: the live one.
            args: Megatron's namespace.
        """
        if self.plan.width.active and args.override_opt_param_scheduler:
            restore_peaks(optimizer, scheduler, args)

        def both() -> None:
            audit_groups(self.plan, optimizer)
            audit_schedule(self.plan, optimizer, scheduler)
            if getattr(args, "optimizer_cuda_graph", False):
                audit_graph(optimizer)

        collectively(both)


def plan_run(settings: Settings, args: Any, config: Any, model: Any) -> Plan:
    """Plan every parameter, and say aloud what a user should know of it; a collective call.

    Args:
        settings: ours.
        args: Megatron's namespace, of which the end of the weight-decay schedule and --use-mup are read.
        config: its OptimizerConfig.
        model: its model chunks.

    Raises:
        AuditError: on all ranks, if the rule scales nothing.
        ConfigError: a ``--base-...`` flag that no layer of the model uses.
        ValueError: on all ranks, if a parameter of one has no known fan-in.
    """
    from megatron.training import print_rank_0

    plan = collectively(lambda: _make_plan(settings, args, config, model))
    specs = [p.spec for p in plan.parameters]
    ranks = gather((dimensions_read(model), {s.role for s in specs}, cautions(plan.width, plan.parameters)))
    # One rank may well have nothing to scale: a pipeline stage of embeddings alone.
    roles = set().union(*(roles for _, roles, _ in ranks))
    if plan.width.rule != "none" and not roles & {"matrix", "output"}:
        raise AuditError(
            f"--width-scaling {plan.rule.name} scales no parameter: the model has {', '.join(sorted(roles))} only"
        )
    check_bases_used(plan.width, set().union(*(used for used, _, _ in ranks)))
    for line in dict.fromkeys(line for _, _, lines in ranks for line in lines):
        print_rank_0(f"WARNING: --width-scaling: {line}")
    return plan


def _check_back_end(saved: Any, ours: Any) -> None:
    """Raise ConfigError where one of the two runs is on DeepSpeed's engine, whose checkpoints are its own."""
    then, now = bool(getattr(saved, "deepspeed", False)), bool(getattr(ours, "deepspeed", False))
    if then != now:
        raise ConfigError(
            "--load",
            ours.load,
            f"a checkpoint of a run {'with' if now else 'without'} --deepspeed: weights and optimizer state are kept in"
            " another way",
            f"{'drop' if now else 'add'} --deepspeed, or give another checkpoint",
        )


def _make_plan(settings: Settings, args: Any, config: Any, model: Any) -> Plan:
    from megatron.core import parallel_state
    from megatron.core.utils import get_model_config
    from megatron.training import print_rank_0

    model_config = get_model_config(model[0])
    width = settings.width
    parameters = list(describe(model, model_config, width, parallel_state))
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
