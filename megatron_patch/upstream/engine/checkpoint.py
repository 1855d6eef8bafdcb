"""Checkpoints of a run on DeepSpeed's engine: Megatron's folder, with the engine's own files in a folder within it.

    SAVE/latest_checkpointed_iteration.txt      Megatron's
    SAVE/iter_0000100/common.pt, ...            Megatron's: arguments, iteration, scheduler, random states
    SAVE/iter_0000100/deepspeed/                the engine's: weights, fp32 weights, Adam's state
    SAVE/iter_0000100/universal/                what ds_to_universal makes of deepspeed/, for another number of ranks

So Megatron's own bookkeeping, --use-checkpoint-args and this package's check of the hyperparameters work as ever.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_patch.errors import ConfigError
from megatron_patch.upstream.engine.optimizer import EngineOptimizer

ENGINE = "deepspeed"
UNIVERSAL = "universal"

# How `ds_to_universal` puts the shards of tensor-parallel ranks together, by Megatron's names. What is in none of the
# lists is cut along its first dimension.
_TENSOR_PARALLEL: dict[str, list[str]] = {
    "vocabulary_parameter_patterns": [r".*word_embeddings\.weight", r".*output_layer\.weight"],
    "tp_replicated_parameter_patterns": [
        r".*layernorm.*",
        r".*position_embeddings.*",
        r".*linear_proj\.bias",
        r".*linear_fc2\.bias",
    ],
    "parameter_with_row_parallelism_patterns": [r".*linear_proj\.weight", r".*linear_fc2\.weight"],
}


class _WithoutWeights(torch.nn.Module):
    """What Megatron saves and loads in the place of the model, whose weights are in the engine's files."""

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Take nothing."""


def save(call: Callable[..., Any], iteration: int, optimizer: EngineOptimizer) -> Any:
    """Save the engine's files, and then Megatron's, whose tracker file makes the checkpoint count; a collective call.

    Args:
        call: Megatron's `save_checkpoint`.
        iteration: of the run.
        optimizer: the engine.
    """
    from megatron.core import parallel_state
    from megatron.training import get_args
    from megatron.training.checkpointing import get_checkpoint_name

    args = get_args()
    folder = get_checkpoint_name(args.save, iteration, return_base_dir=True)
    patterns = {
        "universal_checkpoint_version": 0.2,
        "original_vocab_size": args.padded_vocab_size,
        **_TENSOR_PARALLEL,
    }
    with _without_empty_entries(optimizer.engine):
        optimizer.engine.save_checkpoint(
            folder,
            tag=ENGINE,
            client_state={
                "iteration": iteration,
                "universal_checkpoint_info": patterns,
                "tensor_parallel_ranks": parallel_state.get_tensor_model_parallel_world_size(),
            },
        )
    with _expecting_the_engines_files():
        return call(model=[_WithoutWeights()], optimizer=None)


@contextlib.contextmanager
def _without_empty_entries(engine: Any) -> Iterator[None]:
    """Leave out of the engine's checkpoint the entries that hold nothing, at which `ds_to_universal` fails (0.19.8).

    Megatron's layers have one each, ``_extra_state``, which is None without fp8.
    """
    original = engine.module_state_dict

    def filtered(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        for key in [key for key, value in (found or {}).items() if value is None]:
            del found[key]
        return found

    engine.module_state_dict = filtered
    try:
        yield
    finally:
        del engine.module_state_dict


@contextlib.contextmanager
def _expecting_the_engines_files() -> Iterator[None]:
    """Keep Megatron from calling the folder that the engine has begun a corrupted checkpoint."""
    logger = logging.getLogger("megatron.core.dist_checkpointing.serialization")

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Overwriting old incomplete")

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def load(call: Callable[..., Any], load_dir: str | None, optimizer: EngineOptimizer) -> Any:
    """Load Megatron's files, and then the engine's; a collective call.

    The param groups keep this run's values, which `check_checkpoint` has found to be the checkpoint's.

    Args:
        call: Megatron's `load_checkpoint`.
        load_dir: --load.
        optimizer: the engine.

    Returns:
        What Megatron's function returns.

    Raises:
        ConfigError: no checkpoint of an engine, one of another number of ranks, or of another layout.
    """
    from megatron.training import get_args
    from megatron.training.checkpointing import get_checkpoint_name, get_loaded_iteration

    result = call(ddp_model=[_WithoutWeights()], optimizer=None)
    iteration = get_loaded_iteration()
    if iteration is None or iteration < 0:
        return result
    args = get_args()
    folder = get_checkpoint_name(load_dir, iteration, return_base_dir=True)
    weights_only = bool(args.finetune or args.no_load_optim)
    tag = UNIVERSAL if optimizer.plan.universal else ENGINE
    if not os.path.isdir(os.path.join(folder, tag)):
        raise ConfigError(
            "--load",
            load_dir,
            f"{os.path.join(folder, tag)}, the engine's part of the checkpoint",
            _how_to_convert(folder) if optimizer.plan.universal else "load it without --deepspeed",
        )
    live = [_hyperparameters(group) for group in optimizer.param_groups]
    _load_engine(optimizer, folder, tag, weights_only)
    groups = optimizer.param_groups
    assert len(groups) == len(live)
    for group, values in zip(groups, live, strict=True):
        group.update(values)
    _separate_steps(optimizer)
    return result


def _how_to_convert(folder: str) -> str:
    source, target = os.path.join(folder, ENGINE), os.path.join(folder, UNIVERSAL)
    return (
        f"make it: python -m deepspeed.checkpoint.ds_to_universal --input_folder {source} --output_folder {target}, "
        'and have "checkpoint": {"load_universal": true} in the JSON file for the first start'
    )


def _load_engine(optimizer: EngineOptimizer, folder: str, tag: str, weights_only: bool) -> None:
    from deepspeed.runtime.zero.utils import ZeRORuntimeException
    from megatron.core import parallel_state
    from megatron.training import get_args

    engine = optimizer.engine
    try:
        path, client = engine.load_checkpoint(
            folder,
            tag=tag,
            load_module_strict=False,  # entries that hold nothing were not saved
            load_optimizer_states=not weights_only,
            load_lr_scheduler_states=False,
            load_module_only=weights_only,
        )
    except ZeRORuntimeException as error:
        if "world size" not in str(error):
            raise
        raise ConfigError(
            "--load",
            folder,
            f"as many data-parallel ranks as saved it ({engine.loaded_checkpoint_dp_world_size}), or a universal "
            "checkpoint",
            _how_to_convert(folder),
        ) from None
    if path is None:
        raise ConfigError("--load", os.path.join(folder, tag), "a checkpoint that DeepSpeed can read", "give another")
    then, now = client.get("tensor_parallel_ranks"), parallel_state.get_tensor_model_parallel_world_size()
    if optimizer.plan.universal and then != now and get_args().swiglu:
        raise ConfigError(
            "--tensor-model-parallel-size",
            now,
            f"{then}, as the checkpoint: with --swiglu every rank's linear_fc1 holds rows of gate and up, which"
            " DeepSpeed would put together in the wrong order",
            "give the checkpoint's",
        )


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _separate_steps(optimizer: EngineOptimizer) -> None:
    """Give every tensor a step counter of its own: DeepSpeed's universal loader shares one, which then counts each."""
    states = list(optimizer.engine.basic_optimizer.state.values())
    for state in states:
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
