"""Builds a model and its optimizer through Megatron's own `setup_model_and_optimizer`, for jobs of the pool.

`live` reads back what the optimizer trains every parameter with, by ways of its own: names from `tests.training`,
parameters paired with param groups through the tensors that the optimizer really steps.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.training import global_names

# What every model here has; a repeated flag wins. No warmup: the first LR is the peak.
COMMON: tuple[str, ...] = tuple(
    "--num-layers 1 --hidden-size 64 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --global-batch-size 2 --train-iters 100 --lr 0.01 --min-lr 0.001 --lr-decay-style linear "
    "--weight-decay 0.1 --adam-eps 1e-8 --tokenizer-type NullTokenizer --vocab-size 63 "
    "--make-vocab-size-divisible-by 32 --attention-dropout 0 --hidden-dropout 0".split()
)


@dataclass
class Built:
    """The live objects of a run that has not made a step."""

    args: Any
    model: list[Any]
    optimizer: Any
    scheduler: Any


@dataclass
class Builder:
    """Builds one run after another in one process, all with the same parallel layout."""

    installed: list[Any] = field(default_factory=list)

    def parse(self, argv: Sequence[str]) -> Any:
        """Return Megatron's arguments, parsed and checked by it and by us; our hooks for them are installed."""
        from megatron.core.datasets import utils as dataset_utils
        from megatron.training import global_vars
        from megatron.training.arguments import parse_and_validate_args

        from megatron_patch.upstream.cpu_platform import cpu_arguments
        from megatron_patch.upstream.hooks import install
        from megatron_patch.upstream.patch import entry_hooks

        dataset_utils.compile_helpers = lambda: None
        if not self.installed:
            self.installed.append(install(tuple(h for h in entry_hooks(self.installed) if "compile" not in h.target)))
        while len(self.installed) > 1:
            self.installed.pop().remove()
        global_vars.unset_global_variables()
        sys.argv = ["train", *cpu_arguments([*COMMON, *argv])[0]]
        return parse_and_validate_args()

    def build(self, argv: Sequence[str]) -> Built:
        """Parse and set up."""
        from megatron.core.enums import ModelType
        from megatron.core.rerun_state_machine import destroy_rerun_state_machine
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training import training
        from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
        from megatron.training.initialize import initialize_megatron

        args = self.parse(argv)
        destroy_rerun_state_machine()
        initialize_megatron()
        config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        model, optimizer, scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=config,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        return Built(args, model, optimizer, scheduler)


def groups_of(optimizer: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield every (param group, model parameter) of this rank, found through the tensors in the group."""
    for child in optimizer.chained_optimizers:
        if getattr(child, "is_stub_optimizer", False):
            continue
        model_parameter = {}
        for of_model, stepped in (
            ("model_float16_groups", "shard_fp32_from_float16_groups"),
            ("model_fp32_groups", "shard_fp32_groups"),
            ("float16_groups", "fp32_from_float16_groups"),
            ("fp32_from_fp32_groups", "fp32_from_fp32_groups"),
        ):
            for ours, theirs in zip(getattr(child, of_model, []), getattr(child, stepped, []), strict=True):
                model_parameter.update(
                    {id(tensor): parameter for parameter, tensor in zip(ours, theirs, strict=True) if tensor is not None}
                )
        for group in child.optimizer.param_groups:
            for tensor in group["params"]:
                yield group, model_parameter.get(id(tensor), tensor)


def live(built: Built) -> dict[str, dict[str, float]]:
    """Return what this rank's optimizer trains each of its parameters with, by global name."""
    names = {id(parameter): name for name, parameter in global_names(built.model).items()}
    found: dict[str, dict[str, float]] = {}
    for group, parameter in groups_of(built.optimizer):
        name = names[id(parameter)]
        assert name not in found, f"{name} is in two groups"
        found[name] = {
            "max_lr": group["max_lr"],
            "min_lr": group["min_lr"],
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
            "eps": group["eps"],
        }
    return found
