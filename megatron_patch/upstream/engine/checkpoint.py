"""Checkpoints of a run on DeepSpeed's engine: Megatron's folder, with the engine's own files in a folder within it.

    SAVE/latest_checkpointed_iteration.txt      Megatron's
    SAVE/iter_0000100/*.distcp, metadata.json   Megatron's: arguments, iteration, scheduler, random states
    SAVE/iter_0000100/deepspeed/                the engine's: weights, fp32 weights, Adam's state
    SAVE/iter_0000100/universal/                what ds_to_universal makes of deepspeed/, for another number of ranks

So Megatron's own bookkeeping, --use-checkpoint-args and this package's check of the hyperparameters work as ever.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_patch.errors import ConfigError
from megatron_patch.upstream.engine.optimizer import EngineOptimizer

ENGINE = "deepspeed"
UNIVERSAL = "universal"


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
    from megatron.training import get_args
    from megatron.training.checkpointing import get_checkpoint_name

    args = get_args()
    folder = get_checkpoint_name(args.save, iteration, return_base_dir=True)
    with _without_empty_entries(optimizer.engine):
        optimizer.engine.save_checkpoint(
            folder,
            tag=ENGINE,
            client_state={
                "iteration": iteration,
                "universal_checkpoint_info": _how_shards_fit(optimizer.engine.module, args),
            },
        )
    with _expecting_the_engines_files():
        return call(model=[_WithoutWeights()], optimizer=None)


def _how_shards_fit(model: torch.nn.Module, args: Any) -> dict[str, Any]:
    """Return what `ds_to_universal` must know to put the shards of tensor-parallel ranks together.

    Every list holds names of parameters, as regular expressions of which each must match (0.19.8 wants all used). What
    is in none is cut along its first dimension.
    """
    fits: dict[str, list[str]] = {
        "vocabulary_parameter_patterns": [],
        "tp_replicated_parameter_patterns": [],
        "parameter_with_row_parallelism_patterns": [],
        "parameter_with_2_sub_params_cat_dim_0": [],
    }
    for name, parameter in model.named_parameters():
        exactly = f"{re.escape(name)}$"
        if not getattr(parameter, "tensor_model_parallel", False):
            fits["tp_replicated_parameter_patterns"].append(exactly)
        elif parameter.partition_dim == 1:  # type: ignore[attr-defined]
            fits["parameter_with_row_parallelism_patterns"].append(exactly)
        elif ".word_embeddings." in name or "output_layer." in name:
            fits["vocabulary_parameter_patterns"].append(exactly)
        elif ".linear_fc1." in name and args.swiglu:  # each shard has rows of gate, then rows of up
            fits["parameter_with_2_sub_params_cat_dim_0"].append(exactly)
    return {"universal_checkpoint_version": 0.2, "original_vocab_size": args.padded_vocab_size, **fits}


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

    The param groups keep this run's values, which `check_checkpoint` has found to be the checkpoint's; gradients are
    clipped as this run says, where DeepSpeed takes what was saved (0.19.8, stages 1 and 2).

    Args:
        call: Megatron's `load_checkpoint`.
        load_dir: --load.
        optimizer: the engine.

    Returns:
        What Megatron's function returns.

    Raises:
        ConfigError: no checkpoint of an engine, or one of another stage or number of ranks.
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
    _check_stage(os.path.join(folder, tag), optimizer.plan.stage)
    live = [_hyperparameters(group) for group in optimizer.param_groups]
    _load_engine(optimizer, folder, tag, weights_only)
    groups = optimizer.param_groups
    assert len(groups) == len(live)
    for group, values in zip(groups, live, strict=True):
        group.update(values)
    if optimizer.plan.stage:
        optimizer.engine.optimizer.clip_grad = optimizer.plan.clip
    _separate_steps(optimizer)
    return result


def _check_stage(folder: str, stage: int) -> None:
    """Refuse a checkpoint of another way to shard.

    DeepSpeed (0.19.8) would take the weights of some of them and silently begin with a new optimizer.
    """
    files = os.listdir(folder)
    if any(name.startswith("zero_pp_rank_") and name.endswith("_model_states.pt") for name in files):
        saved: tuple[int, ...] = (3,)
    elif any(name.endswith("_optim_states.pt") for name in files) or "zero" in files:
        saved = (1, 2)
    else:
        saved = (0,)
    if stage not in saved:
        stages = " or ".join(map(str, saved))
        raise ConfigError(
            "--load", folder, f"a checkpoint of ZeRO stage {stage}", f"go on at stage {stages}, at which it was saved"
        )


def _how_to_convert(folder: str) -> str:
    source, target = os.path.join(folder, ENGINE), os.path.join(folder, UNIVERSAL)
    return (
        f"make it: python -m deepspeed.checkpoint.ds_to_universal --input_folder {source} --output_folder {target}, "
        'and have "checkpoint": {"load_universal": true} in the JSON file for the first start'
    )


def _load_engine(optimizer: EngineOptimizer, folder: str, tag: str, weights_only: bool) -> None:
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    engine = optimizer.engine
    try:
        path, _ = engine.load_checkpoint(
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


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _separate_steps(optimizer: EngineOptimizer) -> None:
    """Give every tensor a step counter of its own: DeepSpeed's universal loader shares one, which then counts each."""
    states = list(optimizer.engine.basic_optimizer.state.values())
    for state in states:
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
