"""Bridge's ConfigContainer and our settings as the one namespace that the rules, the audit and the metrics read."""

import difflib
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from megatron_patch.config import OPTIONS, EngineConfig, Settings, options_of
from megatron_patch.errors import ConfigError, ConfigErrors
from megatron_patch.upstream import flags as upstream_flags
from megatron_patch.upstream.refusals import Feature, refused

_NOT_HERE: dict[str, str] = {
    **{one.name: "drop it: Bridge trains with Megatron's own optimizers" for one in options_of(EngineConfig)},
    "cpu": "drop it: the device is Bridge's to choose",
    "no_report": "drop it: a Bridge run writes no report by itself, `megatron-patch report` does",
}
"""Flags of ours that say nothing to Bridge, and what to do."""

KNOWN = {one.name: one for one in OPTIONS if one.name not in _NOT_HERE}
"""What `apply` takes, by name."""

_SECTIONS = ("optimizer", "scheduler", "train", "model", "ddp", "dist", "checkpoint", "logger")
"""Of the ConfigContainer: their fields are Megatron's arguments. The first that gives a name more than None or False
has it."""


def namespace(cfg: Any, flags: Mapping[str, Any]) -> Namespace:
    """Return Megatron's arguments as a ConfigContainer says them, with our flags beside them.

    Args:
        cfg: Bridge's ConfigContainer, validated or not yet: what Bridge has not worked out yet is None.
        flags: ours, by name; the others have their defaults.
    """
    found: dict[str, Any] = {}
    for name in _SECTIONS:
        section = getattr(cfg, name)
        for part in (getattr(section, "transformer", None), section):  # a GPTModelConfig keeps its sizes one deeper
            for key, value in (vars(part) if part is not None else {}).items():
                if _plain(value) and not key.startswith("_") and found.get(key) in (None, False):
                    found[key] = value
    found.update(
        rank=torch.distributed.get_rank() if torch.distributed.is_initialized() else int(os.environ.get("RANK", 0)),
        world_size=_world_size(),
        seq_length=getattr(cfg.dataset, "seq_length", None) or found.get("seq_length"),
        num_experts=found.get("num_moe_experts"),
        untie_embeddings_and_output_weights=not found.get("share_embeddings_and_output_weights"),
        no_load_optim=not found.get("load_optim", True),
        use_layer_wise_distributed_optimizer="dist" in str(found.get("optimizer")),
        bf16=bool(found.get("bf16")) or "bf16" in _precision(cfg),
        iteration=0,
        curr_iteration=0,
    )
    return Namespace(**found, **{name: flags.get(name, one.default) for name, one in KNOWN.items()})


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _world_size() -> int:
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def _precision(cfg: Any) -> str:
    """Return the name of Bridge's mixed-precision recipe, which sets bf16 in model and optimizer later on."""
    recipe = cfg.mixed_precision
    if recipe is None or isinstance(recipe, str):
        return recipe or ""
    return "bf16" if recipe.bf16 else ""


def mistakes(cfg: Any, flags: Mapping[str, Any]) -> list[ConfigError]:
    """Return everything that is wrong with our settings, by themselves and beside a ConfigContainer."""
    errors = list(_unknown(flags))
    known = {name: value for name, value in flags.items() if name in KNOWN}
    for name, value in known.items():
        errors += _raised(partial(KNOWN[name].read, {name: value}))
    if errors:
        return errors  # nothing can be compared with a value that is none
    args = namespace(cfg, known)
    if getattr(args, "hidden_size", None) is None:
        return [
            ConfigError(
                "cfg.model", type(cfg.model).__name__, "a GPT or hybrid model with a hidden_size", "use such a recipe"
            )
        ]
    if cfg.peft is not None:
        errors.append(
            ConfigError(
                "cfg.peft",
                type(cfg.peft).__name__,
                "None with the width-transfer settings: the rules are for weights that are trained whole, not for "
                "adapters beside frozen ones",
                "set cfg.peft to None, or do not call megatron_patch.bridge.apply",
            )
        )
    for name in ("start_weight_decay", "end_weight_decay"):
        if getattr(cfg.scheduler, name) is None:
            errors.append(
                ConfigError(
                    f"cfg.scheduler.{name}",
                    None,
                    "the weight decay of the schedule, from which Bridge sets that of every param group",
                    f"set it, to cfg.optimizer.weight_decay = {cfg.optimizer.weight_decay} for example",
                )
            )
    settings = Settings.of(vars(args))
    for check in (
        lambda: settings.width.validate(warmup=settings.warmup.active),
        lambda: settings.warmup.validate(settings.width, args.hidden_size),
        settings.metrics.validate,
    ):
        errors += _raised(check)
    for feature, on in (
        (Feature.ANY, settings.active),
        (Feature.RULE, settings.width.rule != "none"),
        (Feature.METRICS, settings.metrics.active),
    ):
        errors += refused(feature, vars(args)) if on else []
    errors += _raised(lambda: upstream_flags.validate(args))
    return list({str(error): error for error in errors}.values())


def _unknown(flags: Iterable[str]) -> Iterable[ConfigError]:
    for name in flags:
        if name in _NOT_HERE:
            yield ConfigError(name, "given", "no such setting with Megatron-Bridge", _NOT_HERE[name])
        elif name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, n=1)
            yield ConfigError(
                name,
                "given",
                "a setting of this package: the flags of `megatron-patch run --help`, with underscores",
                f"did you mean {near[0]}?" if near else "correct or remove it",
            )


def _raised(check: Callable[[], Any]) -> list[ConfigError]:
    try:
        check()
    except ConfigErrors as several:
        return list(several.errors)
    except ConfigError as error:
        return [error]
    return []
