"""The audit: what every live parameter is trained with, read back from the optimizer, against what the rule says."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatron_patch.config import WarmupConfig, WidthConfig, options_of
from megatron_patch.errors import AuditError, ConfigError
from megatron_patch.upstream.hooks import after, before
from megatron_patch.upstream.ranks import gather
from megatron_patch.upstream.width.groups import TOLERANCE, identifier
from megatron_patch.upstream.width.parameters import is_empty_shard
from megatron_patch.upstream.width.plan import Plan

# Initial weights are over when there is a checkpoint; the length of a warmup the scheduler compares, in steps.
_NOT_COMPARED = ("init_scaling", "extra_warmup_iters", "extra_warmup_fraction")


def _compared(settings: type) -> tuple[tuple[str, Any], ...]:
    return tuple((one.name, one.default) for one in options_of(settings) if one.name not in _NOT_COMPARED)


META = "param_to_group_meta"
"""Where a checkpoint of Megatron-FSDP keeps the group of every parameter, by its name."""

CHECKPOINT_KEYS: tuple[tuple[str, Any], ...] = (
    *_compared(WidthConfig),
    ("use_mup", False),
    *_compared(WarmupConfig),
    ("lr", None),
    ("min_lr", None),
    ("start_weight_decay", None),
    ("end_weight_decay", None),
    ("adam_eps", None),
    ("optimizer", "adam"),
    ("muon_scale_mode", "spectral"),
    ("muon_extra_scale_factor", 1.0),
    ("muon_scalar_optimizer", "adam"),
)
"""What a checkpoint must agree in, with the default where it has no such argument."""
_MEGATRONS_FLAGS = (
    *("--lr", "--min-lr", "--start-weight-decay", "--end-weight-decay", "--adam-eps", "--use-mup", "--optimizer"),
    *("--muon-scale-mode", "--muon-extra-scale-factor", "--muon-scalar-optimizer"),
)


def child_optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizers inside Megatron's ChainedOptimizer that hold parameters on this rank."""
    if not hasattr(optimizer, "chained_optimizers"):
        return [] if getattr(optimizer, "is_stub_optimizer", False) else [optimizer]
    # Megatron's layer-wise distributed optimizer is a chain within the chain.
    return [child for one in optimizer.chained_optimizers for child in child_optimizers(one)]


def by_megatron_fsdp(child: Any) -> bool:
    """Return whether an optimizer steps what Megatron-FSDP (v1, v2) has put in the place of the model's parameters."""
    return bool(getattr(getattr(child, "ddp_config", None), "use_megatron_fsdp", False))


def live_groups(optimizer: Any) -> Iterator[tuple[dict[str, Any], list[torch.nn.Parameter]]]:
    """Yield every live param group with the model parameters it trains on this rank.

    Under the distributed optimizer these are the parameters of which this rank owns a slice.

    Raises:
        AuditError: an optimizer class whose parameters this package cannot trace.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    for child in child_optimizers(optimizer):
        groups = child.optimizer.param_groups
        members: list[list[torch.nn.Parameter]] = [[] for _ in groups]
        if hasattr(child, "group_members"):  # one of this package's own
            members = child.group_members()
        elif by_megatron_fsdp(child):
            members = [list(group["params"]) for group in groups]
        elif isinstance(child, DistributedOptimizer):
            for parameter, (index, _) in child.model_param_group_index_map.items():
                members[index].append(parameter)
        elif isinstance(child, Float16OptimizerWithFloat16Params):
            members = [a + b for a, b in zip(child.float16_groups, child.fp32_from_fp32_groups, strict=True)]
        elif isinstance(child, FP32Optimizer):
            members = [list(group["params"]) for group in groups]
        else:
            raise AuditError(
                f"the optimizer {type(child).__module__}.{type(child).__qualname__} keeps its parameters in a way "
                "megatron_patch cannot audit; use adam, muon, soap or lion, with or without --use-distributed-optimizer"
            )
        yield from zip(groups, members, strict=True)


def audit_build(plan: Plan, optimizer: Any) -> None:
    """Prove that no two param groups can be confused on resume, and that every group holds what the rule says.

    Without a rule the groups are Megatron's or the script's own, and only that every parameter is in one is checked.

    Raises:
        AuditError: naming the parameter or the groups.
    """
    for child in child_optimizers(optimizer) if plan.width.active else ():
        seen: dict[tuple[Any, ...], dict[str, Any]] = {}
        for group in child.optimizer.param_groups:
            key = identifier(group)
            if key in seen:
                raise AuditError(
                    f"two param groups share lr_mult={group['lr_mult']}, wd_mult={group['wd_mult']} and Megatron would "
                    "mix them up on resume (they differ only in keys it does not compare); for a layer with m = 1 use "
                    "--extra-warmup-scope all"
                )
            seen[key] = group
    audit_groups(plan, optimizer)


def audit_groups(plan: Plan, optimizer: Any) -> None:
    """Compare every parameter's live group with the plan: peak and minimum LR, weight decay, their product, eps.

    Raises:
        AuditError: naming the first parameter of this rank that differs, the field, the live and the planned value.
    """
    names = {id(p.parameter): p.spec.name for p in plan.parameters}
    found: set[str] = set()
    for group, parameters in live_groups(optimizer):
        for parameter in parameters:
            name = names.get(id(parameter))
            if name is None:
                raise AuditError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} unknown to the model"
                )
            if name in found:
                raise AuditError(f"{name} is in two param groups")
            found.add(name)
            if not plan.width.active:
                continue
            planned = plan.hyperparameters[name]
            live = {
                "max_lr": group["max_lr"],
                "min_lr": group["min_lr"] or 0.0,
                "wd_mult": group["wd_mult"],
                "lr*weight_decay": group["max_lr"] * group["wd_mult"],
            }
            expected = {
                "max_lr": planned.lr,
                "min_lr": planned.min_lr,
                "wd_mult": planned.factors.weight_decay,
                "lr*weight_decay": planned.lr * planned.factors.weight_decay,
            }
            if planned.eps is not None and group.get("eps") is not None:
                live["eps"], expected["eps"] = group["eps"], planned.eps
            _compare(name, plan.rule.name, live, expected)
            trainer = group.get("optimizer", plan.optimizer.name)
            if trainer != planned.optimizer:
                raise AuditError(
                    f"{name} is trained by {trainer}, but its LR and weight decay were planned for "
                    f"{planned.optimizer}; let --optimizer alone decide which parameter is trained by what"
                )
    elsewhere = {id(parameter) for parameter, _ in layer_wise_groups(optimizer)}
    # Megatron-FSDP v2 leaves out what a rank has no part of; that some rank trains it, `hyperparameter_table` proves.
    elsewhere |= {id(p.parameter) for p in plan.parameters if is_empty_shard(p.parameter)}
    missing = sorted(name for key, name in names.items() if name not in found and key not in elsewhere)
    sharded = any(hasattr(child, "model_param_group_index_map") for child in child_optimizers(optimizer))
    if missing and not sharded:
        raise AuditError(f"{missing[0]} is in no param group: the optimizer does not train it")


def layer_wise_groups(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """Yield every parameter that Megatron's layer-wise distributed optimizer hands to one of a group, and the group.

    It hands out whole parameters, and every rank has the lists of all; where a parameter has one rank it is not there.
    """
    if hasattr(optimizer, "dp_cp_params_list"):
        for lists, group in (
            (optimizer.dp_cp_params_list, optimizer.dp_cp),
            (optimizer.expt_dp_params_list, optimizer.expt_dp),
        ):
            for parameters in lists or ():
                yield from ((parameter, group) for parameter in parameters)
    else:
        for one in getattr(optimizer, "chained_optimizers", ()):
            yield from layer_wise_groups(one)


def audit_schedule(plan: Plan, optimizer: Any, scheduler: Any) -> None:
    """Compare the LR and weight decay that the coming step will really use with the schedule times the plan's factors.

    Raises:
        AuditError: naming the parameter.
    """
    if not plan.width.active:
        return
    names = {id(p.parameter): p.spec.name for p in plan.parameters}
    base_decay = scheduler.get_wd()
    for group, parameters in live_groups(optimizer):
        for parameter in parameters:
            name = names[id(parameter)]
            planned = plan.hyperparameters[name]
            base_lr = scheduler.base_lr({"max_lr": planned.lr, "min_lr": planned.min_lr, "lr_mult": planned.factors.lr})
            scoped = scheduler.warmup.scope == "all" or "width_dependent" in dict(plan.override_keys[name])
            lr = base_lr * (scheduler.factor() if scoped else 1.0)
            decay = base_decay * planned.factors.weight_decay
            if isinstance(group["lr"], torch.Tensor):  # for a CUDA graph it is in the device's memory, in fp32
                lr = float(torch.tensor(lr, dtype=group["lr"].dtype))
            live_lr, live_decay = float(group["lr"]), float(group["weight_decay"])
            _compare(
                name,
                plan.rule.name,
                {"lr": live_lr, "weight_decay": live_decay, "lr*weight_decay": live_lr * live_decay},
                {"lr": lr, "weight_decay": decay, "lr*weight_decay": lr * decay},
            )


def audit_graph(optimizer: Any) -> None:
    """Make sure that a captured optimizer step would follow the schedule.

    Raises:
        ConfigError: an LR that is a number would be kept as it was when the step was captured.
    """
    if not all(isinstance(group["lr"], torch.Tensor) for group, parameters in live_groups(optimizer) if parameters):
        raise ConfigError(
            "--optimizer-cuda-graph",
            "given",
            "an optimizer with its LRs in tensors, as Transformer Engine's FusedAdam: this one's would stay as they "
            "are when the step is captured",
            "drop the flag, or install Transformer Engine",
        )


def _compare(name: str, rule: str, live: Mapping[str, float], expected: Mapping[str, float]) -> None:
    for field, value in expected.items():
        if not math.isclose(live[field], value, rel_tol=TOLERANCE, abs_tol=0.0):
            raise AuditError(
                f"{name}: the optimizer has {field} = {live[field]:.12g}, but --width-scaling {rule} gives {value:.12g}"
            )


def check_checkpoint(saved: Any, args: Any, plan: Plan, weights_only: bool, in_groups: bool = False) -> str | None:
    """Compare the checkpoint's arguments with this run's before anything of it is loaded; a collective call.

    Args:
        saved: the namespace stored in the checkpoint; flags it lacks had their defaults.
        args: this run's.
        plan: this run's.
        weights_only: the optimizer starts anew, as with --finetune and --no-load-optim.
        in_groups: the checkpoint keeps the optimizer state by place in the param groups, as --ckpt-format torch does,
            and not by parameter.

    Returns:
        What a user should know of a checkpoint from before this package; None for others.

    Raises:
        ConfigError: a diff of both, unless --override-width-scaling; or that flag where it cannot be honoured.
    """
    before_us = not hasattr(saved, "width_scaling")
    differences = [
        f"--{key.replace('_', '-')}: {then} -> {now}"
        for key, then, now in (
            (key, getattr(saved, key, default), getattr(args, key, default)) for key, default in CHECKPOINT_KEYS
        )
        if then != now
    ]
    changed = [d for d in differences if not before_us or d.partition(":")[0] in _MEGATRONS_FLAGS]
    if weights_only:
        consequence = "only its weights are used, and the optimizer starts anew"
    elif not differences:
        consequence = "it was trained with the same hyperparameters"
    elif before_us and not changed and changes_nothing(plan, args):
        consequence = "at this width the rule gives every parameter what it was trained with"
    else:
        _refuse_or_override(args, f"(checkpoint -> this run: {'; '.join(differences)})", in_groups)
        consequence = f"its optimizer goes on with other hyperparameters ({'; '.join(differences)})"
    if not before_us:
        return None
    return (
        f"> --load {args.load}: a checkpoint from before megatron_patch; {consequence}; predicted weight norms and an "
        "extra warmup begin here"
    )


def changes_nothing(plan: Plan, args: Any) -> bool:
    """Return whether every LR and weight decay of the whole model is Megatron's own; a collective call.

    An extra warmup has the factor 1 at the width of the base model.
    """
    warmed = args.extra_warmup != "none" and args.base_hidden_size != args.hidden_size
    ours = not warmed and not any(plan.override_keys.values())
    return all(gather(ours))


def _refuse_or_override(args: Any, changes: str, in_groups: bool) -> None:
    if not args.override_width_scaling:
        raise ConfigError(
            "--load",
            args.load,
            f"the hyperparameters of the checkpoint {changes}",
            "give the checkpoint's values, or add --override-width-scaling to go on with the new ones",
        )
    if in_groups:
        raise ConfigError(
            "--override-width-scaling",
            f"with {args.load}",
            "a checkpoint of --ckpt-format torch_dist: in this one the optimizer state belongs to places in the old "
            f"param groups, not to parameters {changes}",
            "save it again as torch_dist with the old values, or add --no-load-optim to start with a new optimizer",
        )


def adopt_live_groups(optimizer: Any) -> None:
    """Make loading keep this run's param-group values and take only the optimizer state from the checkpoint.

    For --override-width-scaling: Megatron matches groups by their LR and weight decay and would find no counterpart,
    and where their number differs it cannot even put what it has read into its place. The state of every parameter is
    keyed by the parameter itself in Megatron's distributed checkpoints, so all that is needed is to keep the list of
    groups out of its way.
    """
    for child in child_optimizers(optimizer):

        def keep_groups(state_dict: dict[str, Any], child: Any = child) -> None:
            inner = state_dict.get("optimizer", state_dict)
            if META in inner:
                live_meta = child.sharded_param_state_fsdp_dtensor()[META]
                inner[META] = {name: {**live_meta[name], **meta} for name, meta in inner[META].items()}
                return
            saved = inner["param_groups"]
            step = {key: saved[0][key] for key in ("step",) if saved and key in saved[0]}
            live = child.optimizer.state_dict()["param_groups"]
            inner["param_groups"] = [{**group, **step} for group in live]

        child.sharded_state_dict = after(_leave_groups_out, "is_loading")(child.sharded_state_dict)
        child.load_state_dict = before(keep_groups, "state_dict")(child.load_state_dict)


def restore_peaks(optimizer: Any, scheduler: Any, args: Any) -> None:
    """Give every param group its own peak and minimum LR again, which is `lr_mult` times the base LR.

    From 0.20 on --override-opt-param-scheduler sets them to --lr and --min-lr in all groups, after a load.
    """
    for group in optimizer.param_groups:
        if not group.get("is_decoupled_lr"):
            factor = group.get("lr_mult", 1.0)
            group["max_lr"] = args.lr * factor
            group["min_lr"] = (args.min_lr or 0.0) * factor
    scheduler.step(0)


def _leave_groups_out(state_dict: dict[str, Any], is_loading: bool) -> None:
    if is_loading:
        inner = state_dict.get("optimizer", state_dict)
        if not isinstance(inner, dict):  # one object of the whole, read as it was saved
            return
        inner.pop("param_groups", None)
        if META in inner:  # Transformer Engine's Adam counts its steps in its groups
            inner[META] = {name: {k: meta[k] for k in ("step",) if k in meta} for name, meta in inner[META].items()}
