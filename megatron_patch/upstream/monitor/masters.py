"""Where Megatron's optimizers keep the fp32 weights they update, and which slice of each this rank holds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_patch.errors import ConfigError
from megatron_patch.metrics.views import MasterSlice
from megatron_patch.upstream.width.audit import child_optimizers, layer_wise_groups
from megatron_patch.upstream.width.groups import schedule_key


@dataclass(frozen=True)
class Master:
    """The fp32 copy of one model parameter."""

    piece: MasterSlice
    slice_group: dist.ProcessGroup | None
    """The ranks among which a distributed optimizer has cut it up; None if every rank holds the whole."""
    param_group: str
    """Key of the param group, see `schedule_key`; empty where this rank owns nothing of the parameter."""
    replica: int = 0
    """Which instance of the distributed optimizer this rank is in; every instance has the whole parameter."""


def live_hyperparameters(optimizer: Any) -> dict[str, tuple[float, float]]:
    """Return learning rate and weight decay of the coming step by `schedule_key`; every rank has every group."""
    return {schedule_key(group): (float(group["lr"]), float(group["weight_decay"])) for group in optimizer.param_groups}


def find_masters(optimizer: Any) -> Callable[[torch.nn.Parameter], Master]:
    """Return what finds the fp32 weights of a model parameter.

    Nothing but list positions is remembered: Megatron replaces group dicts and may replace tensors when it loads.

    Raises:
        ConfigError: an optimizer that keeps no fp32 weights this package can read.
    """
    if hasattr(optimizer, "find_master"):  # one of this package's own
        finder: Callable[[torch.nn.Parameter], Master] = optimizer.find_master
        return finder
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    found: dict[torch.nn.Parameter, Master] = {}
    sharding: list[Any] = []
    # By parameter: the ranks among which whole parameters are handed out.
    handed_out = dict(layer_wise_groups(optimizer))
    for child in child_optimizers(optimizer):
        if isinstance(child, DistributedOptimizer):
            sharding.append(child)
            for attribute, models in (
                ("shard_fp32_from_float16_groups", child.model_float16_groups),
                ("shard_fp32_groups", child.model_fp32_groups),
            ):
                for g, parameters in enumerate(models):
                    for i, parameter in enumerate(parameters):
                        own = child._get_model_param_range_map(parameter)["param"]
                        if attribute == "shard_fp32_from_float16_groups" and _in_optimizer_state(child):
                            read = _state_reader(child, parameter)
                        else:
                            _require_fp32(getattr(child, attribute)[g][i])
                            read = _reader(child, attribute, g, i)
                        piece = MasterSlice(read, own.start, own.end, True, _hyper(child, g))
                        instance = child.distributed_optimizer_instance_id
                        found[parameter] = Master(piece, child.data_parallel_group, _key(child, g), instance)
        elif isinstance(child, Float16OptimizerWithFloat16Params):
            for attribute, models in (
                ("fp32_from_float16_groups", child.float16_groups),
                ("fp32_from_fp32_groups", child.fp32_from_fp32_groups),
            ):
                for g, parameters in enumerate(models):
                    for i, parameter in enumerate(parameters):
                        _require_fp32(getattr(child, attribute)[g][i])
                        found[parameter] = _whole(parameter, _reader(child, attribute, g, i), child, g)
        elif isinstance(child, FP32Optimizer):
            for g, group in enumerate(child.optimizer.param_groups):
                for parameter in group["params"]:
                    found[parameter] = _whole(parameter, _own_data(parameter), child, g)
        else:
            raise ConfigError(
                "--optimizer",
                type(child).__qualname__,
                "adam, muon, soap or lion, with or without --use-distributed-optimizer, while metrics are on",
                "change the optimizer or set --alignment-interval and --spectral-interval to 0",
            )

    def master(parameter: torch.nn.Parameter) -> Master:
        if parameter in found:
            one = found[parameter]
            if parameter in handed_out:
                return replace(one, piece=replace(one.piece, sharded=True), slice_group=handed_out[parameter])
            return one
        if parameter in handed_out:
            return _owned_elsewhere(parameter, handed_out[parameter])
        for child in sharding:
            if any(parameter in buffer.param_index_map for buffer in child.buffers):
                instance = child.distributed_optimizer_instance_id
                return _owned_elsewhere(parameter, child.data_parallel_group, instance)
        raise RuntimeError("a monitored weight is in no optimizer of this rank")

    return master


def _owned_elsewhere(parameter: torch.nn.Parameter, group: dist.ProcessGroup, instance: int = 0) -> Master:
    nothing = MasterSlice(lambda: torch.empty(0, device=parameter.device), 0, 0, True, lambda: (0.0, 0.0))
    return Master(nothing, group, "", instance)


def _whole(parameter: torch.nn.Parameter, read: Callable[[], Tensor], child: Any, group: int) -> Master:
    return Master(MasterSlice(read, 0, parameter.numel(), False, _hyper(child, group)), None, _key(child, group))


def _key(child: Any, group: int) -> str:
    return schedule_key(child.optimizer.param_groups[group])


def _own_data(parameter: torch.nn.Parameter) -> Callable[[], Tensor]:
    return lambda: parameter.detach().reshape(-1)


def _reader(child: Any, attribute: str, group: int, index: int) -> Callable[[], Tensor]:
    return lambda: getattr(child, attribute)[group][index].detach().reshape(-1)


def _in_optimizer_state(child: Any) -> bool:
    """Whether the fp32 weights are Transformer Engine's FusedAdam's own, under --use-precision-aware-optimizer."""
    return bool(getattr(child.config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", False))


def _state_reader(child: Any, parameter: torch.nn.Parameter) -> Callable[[], Tensor]:
    """Return what reads this rank's slice from the state of FusedAdam, by Megatron's accessor for it."""

    def read() -> Tensor:
        group, order = child.model_param_group_index_map[parameter]
        shard = child.optimizer.param_groups[group]["params"][order]
        state = child.optimizer.state.get(shard, {})
        if "master_param" not in state:  # before the first step the fp32 weights are the model's own
            first: Tensor = shard.detach().float().reshape(-1)
            return first
        if state["master_param"].dtype == torch.int16:
            return with_remainder(shard.detach(), state["master_param"]).reshape(-1)
        master: Tensor = child._get_main_param_and_optimizer_states(parameter)["param"]
        _require_fp32(master)
        return master.detach().reshape(-1)

    return read


def with_remainder(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the fp32 weights that Transformer Engine keeps as a bf16 weight and the 16 bits that are missing in it.

    The weight is the upper half of the fp32 number, rounded to the nearest: plus one where the lower half, read as a
    signed number, is negative.

    Args:
        weight: bf16.
        remainder: int16, of the same shape.

    Source: Transformer Engine, `store_param_remainders` of its FusedAdam (adam.cu).
    """
    upper = weight.view(torch.int16).to(torch.int32) - (remainder < 0).to(torch.int32)
    return ((upper << 16) | (remainder.to(torch.int32) & 0xFFFF)).view(torch.float32)


def _hyper(child: Any, group: int) -> Callable[[], tuple[float, float]]:
    def read() -> tuple[float, float]:
        live = child.optimizer.param_groups[group]
        return float(live["lr"]), float(live["weight_decay"])

    return read


def _require_fp32(master: Tensor | None) -> None:
    if master is None or master.dtype != torch.float32:
        raise ConfigError(
            "--use-precision-aware-optimizer",
            "keeps no fp32 weights" if master is None else f"keeps weights in {master.dtype}",
            "fp32 master weights, from which the update is measured, while metrics are on",
            "drop the flag, or set --alignment-interval and --spectral-interval to 0",
        )
