"""FSDP on CPU ranks: Megatron's own wrappers over gloo, with one stand-in: they get a device mesh of CPUs.

They ask for one of GPUs by name. All else is theirs: torch's `fully_shard` and Megatron-FSDP's buffers and hooks, on
the CPU platform's streams. For checkpoints torch's Adam is given what Transformer Engine's has.
"""

import os
from typing import Any

from tests.support.observed import Observed
from tests.support.param_groups import build_all
from tests.support.training import Patched

TORCH = "--use-torch-fsdp2 --no-gradient-accumulation-fusion"
# gloo has no reduction that scales, which is what the last flag leaves out.
MEGATRON = "--use-megatron-fsdp --ckpt-format fsdp_dtensor --no-gradient-reduce-div-fusion"
SHARDED = f"{MEGATRON} --data-parallel-sharding-strategy optim_grads_params"
# From 0.20 on; with MEGATRON_NEXT in the environment.
SECOND = f"{SHARDED} --megatron-fsdp-version 2 --no-gradient-accumulation-fusion"


def on_cpus() -> None:
    """Let FSDP run in this process."""
    import torch
    from megatron.core.distributed import torch_fully_sharded_data_parallel
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter
    from megatron.core.distributed.fsdp.src.megatron_fsdp.experimental.dbuffer import DBuffer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from torch.distributed import DeviceMesh

    from megatron_patch.upstream.cpu import platform
    from megatron_patch.upstream.refusals import refused

    class OfCpus:
        @staticmethod
        def from_group(group: Any, device_type: str, **more: Any) -> DeviceMesh:
            assert device_type == "cuda"
            return DeviceMesh.from_group(group, "cpu", **more)

    if "allocation_stream" in DBuffer.__annotations__:  # v2, which asks its buffers and streams what a CPU's do not say
        DBuffer.allocation_stream = property(lambda self: torch.cuda.current_stream(), lambda self, stream: None)
    torch.cuda.Stream.device = "cpu"
    fsdp: set[str] = {"--use-torch-fsdp2", "--use-megatron-fsdp"}
    torch_fully_sharded_data_parallel.DeviceMesh = mcore_fsdp_adapter.DeviceMesh = OfCpus
    DistributedOptimizer.sharded_param_state_fsdp_dtensor = _with_all_states(
        DistributedOptimizer.sharded_param_state_fsdp_dtensor
    )
    platform.refused = lambda *asked: [error for error in refused(*asked) if error.flag not in fsdp]
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)  # FSDP refuses what tensor parallelism needs


def _with_all_states(state_dict: Any) -> Any:
    """Megatron-FSDP's `sharded_param_state_fsdp_dtensor`, in which every parameter must have a state, on every rank.

    Transformer Engine's Adam has one for each. Torch's has none for a parameter without a gradient, as an empty shard
    is, and ranks with different entries wait for each other.
    """

    def complete(self: Any, is_loading: bool = False) -> Any:
        import torch

        if is_loading:
            self._init_optimizer_states_with_dummy_values()
        state = self.optimizer.state
        steps = max(float(one["step"]) for one in state.values())
        for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
            if not state[parameter]:
                moments = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
                state[parameter] = {"step": torch.tensor(steps), **moments}
        return state_dict(self)

    return complete


def build_sharded(runs: list[list[str]], directory: str = "") -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """As `build_all`."""
    on_cpus()
    return build_all(runs, directory)


class Sharded(Patched, Observed):
    """A run on FSDP with the patch, observed."""

    def before_arguments(self) -> None:
        on_cpus()
        super().before_arguments()


class ShardedAlone(Observed):
    """A run on FSDP by Megatron as it is."""

    def before_arguments(self) -> None:
        on_cpus()


class ByHand(Observed):
    """Megatron as it is, with param groups that are set by hand, by patterns of names: a door that it has for that."""

    def __init__(self, overrides: dict[str, dict[str, float]]) -> None:
        self.overrides = overrides

    def before_arguments(self) -> None:
        from megatron.core.optimizer.optimizer_config import ParamKey
        from megatron.training import training

        original = training.get_megatron_optimizer_config

        def with_ours(args: Any) -> Any:
            config, standard = original(args)
            return config, {**standard, **{ParamKey(name=name): values for name, values in self.overrides.items()}}

        training.get_megatron_optimizer_config = with_ours
