"""FSDP on CPU ranks: Megatron's own wrappers over gloo, with one stand-in: they get a device mesh of CPUs.

They ask for one of GPUs by name. All else is theirs: torch's `fully_shard` and Megatron-FSDP's buffers and hooks, on
the CPU platform's streams.
"""

import os
from typing import Any

from tests.support.observed import Observed
from tests.support.param_groups import build_all
from tests.support.training import Patched

TORCH = "--use-torch-fsdp2"
# gloo has no reduction that scales, which is what the last flag leaves out.
MEGATRON = "--use-megatron-fsdp --ckpt-format fsdp_dtensor --no-gradient-reduce-div-fusion"
SHARDED = f"{MEGATRON} --data-parallel-sharding-strategy optim_grads_params"
# From 0.20 on; with MEGATRON_NEXT in the environment.
SECOND = f"{SHARDED} --megatron-fsdp-version 2 --no-gradient-accumulation-fusion"


def on_cpus() -> None:
    """Let FSDP run in this process."""
    from megatron.core.distributed import torch_fully_sharded_data_parallel
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter
    from torch.distributed import DeviceMesh

    from megatron_patch.upstream.cpu import platform
    from megatron_patch.upstream.refusals import refused

    class OfCpus:
        @staticmethod
        def from_group(group: Any, device_type: str, **more: Any) -> DeviceMesh:
            assert device_type == "cuda"
            return DeviceMesh.from_group(group, "cpu", **more)

    fsdp: set[str] = {"--use-torch-fsdp2", "--use-megatron-fsdp"}
    torch_fully_sharded_data_parallel.DeviceMesh = mcore_fsdp_adapter.DeviceMesh = OfCpus
    platform.refused = lambda *asked: [error for error in refused(*asked) if error.flag not in fsdp]
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)  # FSDP refuses what tensor parallelism needs


def build_sharded(runs: list[list[str]], directory: str = "") -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """As `build_all`."""
    on_cpus()
    return build_all(runs, directory)


class Sharded(Patched, Observed):
    """A run on FSDP with the patch, observed."""

    def before_arguments(self) -> None:
        on_cpus()
        super().before_arguments()


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
