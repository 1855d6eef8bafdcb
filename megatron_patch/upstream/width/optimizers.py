"""Which of Megatron's optimizers trains a parameter: Muon and its relatives leave some to a second one."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_patch.config.optimizer import EMERGING, OptimizerChoice
from megatron_patch.theory.updates import accumulated_update_rms, update_rms

Growth = Callable[[str, torch.nn.Parameter, Sequence[int], int], list[float | None]]
"""From name, weight, fan-outs of its parts, and fan-in to b of the norm model of each part; None where it
is not known."""


def emerging_overrides(config: Any) -> dict[Any, dict[str, Any]]:
    """Return the overrides by which Megatron hands parameters to a second optimizer; none for adam and sgd.

    They are what `_get_megatron_emerging_optimizer` merges into its caller's. That function has no part that says it
    without building the optimizer (and so without the package emerging-optimizers, which `explain` does not need).

    Args:
        config: Megatron's OptimizerConfig.
    """
    if getattr(config, "optimizer", "adam") not in EMERGING:
        return {}
    from megatron.core.optimizer import emerging_optimizers

    known = emerging_optimizers._EMERGING_OPTIMIZERS.get(config.optimizer)
    factory = emerging_optimizers._default_param_overrides_factory
    overrides: dict[Any, dict[str, Any]] = copy.deepcopy(known.default_param_overrides if known else factory())
    if config.optimizer == "muon":
        for override in overrides.values():
            override["optimizer"] = config.muon_scalar_optimizer
    return overrides


def optimizer_of(name: str, parameter: torch.nn.Parameter, config: Any, overrides: dict[Any, dict[str, Any]]) -> str:
    """Return the name of the optimizer that Megatron trains a parameter with, e.g. ``adam`` for a norm beside muon.

    Args:
        name: the parameter's.
        parameter: with the attributes that Megatron gives it.
        config: Megatron's OptimizerConfig.
        overrides: what `emerging_overrides` returned.
    """
    for key, override in overrides.items():
        if key.matches(parameter, name):
            return str(override["optimizer"])
    return str(getattr(config, "optimizer", "adam"))


def update_growth(args: Any) -> Growth:
    """Return what knows how fast the updates of a run's optimizers let a weight grow, see `accumulated_update_rms`.

    Args:
        args: Megatron's.
    """
    overrides, choice = emerging_overrides(args), OptimizerChoice.of(vars(args))

    def growth(name: str, parameter: torch.nn.Parameter, parts: Sequence[int], fan_in: int) -> list[float | None]:
        optimizer = optimizer_of(name, parameter, args, overrides)
        if optimizer != "muon":
            return [None if optimizer in EMERGING else 1.0] * len(parts)
        # It takes q, k and v apart, gates and ups together.
        apart = args.muon_split_qkv and getattr(parameter, "is_qkv", False)
        of_one_step = [update_rms(choice.muon_scale, part if apart else sum(parts), fan_in) for part in parts]
        return [args.muon_extra_scale_factor * accumulated_update_rms(args.muon_momentum) * b for b in of_one_step]

    return growth
