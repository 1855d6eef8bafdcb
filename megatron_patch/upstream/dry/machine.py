"""Running parts of Megatron on a machine that is not the one they are meant for, alone, for a while, and quietly."""

import ast
import contextlib
import copy
import io
import linecache
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_patch.config import flag
from megatron_patch.errors import ConfigError, MegatronPatchError, MegatronRefuses
from megatron_patch.upstream.dry.coverage import Position
from megatron_patch.upstream.patch import megatron_parser

TRANSFORMER_ENGINE = "2.20.0"
"""The version that is taken to be on the machine meant, where this one has none."""

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
"""Megatron wants it to be 1 for tensor and context parallelism, and not to be 1 for FSDP."""


def prepare_machine(cpu: bool) -> bool:
    """Bring up the CPU platform unless there is a CUDA device, and return whether there is one.

    To be called before Megatron is imported.

    Raises:
        ConfigError: there is one although `cpu` was asked for.
    """
    from megatron_patch.upstream.cpu.platform import activate

    try:
        activate()
    except ConfigError:
        if cpu:
            raise
        return True
    return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what Megatron prints, logs and warns of on its way: libraries it misses, defaults it sets."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def megatrons_checks() -> Iterator[None]:
    """Turn an assertion of Megatron's, most of which have no class and some no text, into one line for the user.

    Raises:
        MegatronRefuses: in Megatron's words, with the values of the flags that its words and its condition name.
    """
    try:
        yield
    except MegatronPatchError:
        raise
    except Exception as error:
        raise MegatronRefuses(*_condition(error)) from error


def _condition(error: Exception) -> tuple[str, dict[str, Any]]:
    """Return what Megatron said, or else its condition, and the flags in both, with their values."""
    frame, line = [*traceback.walk_tb(error.__traceback__)][-1]
    condition, said = "", " ".join(str(error).split())
    for node in ast.walk(ast.parse("".join(linecache.getlines(frame.f_code.co_filename)))):
        if isinstance(node, (ast.Assert, ast.If)) and node.lineno <= line <= (node.end_lineno or 0):
            condition = ast.unparse(node.test)  # the innermost comes last
    names = re.findall(r"--([a-z][a-z0-9-]+)", said) + re.findall(r"\b(?:args|self)\.(\w+)", condition)
    known = {action.dest for action in megatron_parser()._actions}
    values = {
        name: getattr(owner, name)
        for name in (name.replace("-", "_") for name in names)
        for owner in (frame.f_locals.get("args"), frame.f_locals.get("self"))
        if name in known and hasattr(owner, name)
    }
    return said or f"it wants {condition}", {flag(name): value for name, value in values.items()}


@contextlib.contextmanager
def assigned(owner: Any, **values: Any) -> Iterator[None]:
    """Give attributes of `owner` other values for a while."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def machine_meant() -> Iterator[None]:
    """Answer what Megatron asks of the machine while it validates: a GPU has Transformer Engine and its kernels."""
    from megatron.core import utils
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils
    from packaging.version import Version

    before = os.environ.get(CONNECTIONS)
    os.environ[CONNECTIONS] = "1"  # launchers set it
    try:
        with contextlib.ExitStack() as stack:
            if utils.get_te_version() == Version("0.0.0"):  # not installed
                stack.enter_context(assigned(utils, _te_version=Version(TRANSFORMER_ENGINE)))
                for module in (rope_utils, moe_utils):
                    missing = [n for n, value in vars(module).items() if n.startswith("fused_") and value is None]
                    stack.enter_context(assigned(module, **dict.fromkeys(missing, object())))
            yield
    finally:
        os.environ.pop(CONNECTIONS, None)
        if before is not None:
            os.environ[CONNECTIONS] = before


def suit(args: Any) -> None:
    """Inside `machine_meant`: be the machine that `args` want, where Megatron wants different ones."""
    if args.use_megatron_fsdp or args.use_torch_fsdp2:
        os.environ.pop(CONNECTIONS, None)


@contextlib.contextmanager
def process_groups(args: Any, rank: int) -> Iterator[Any]:
    """Make Megatron's process groups as `rank` of ``args.world_size`` would, over torch's fake backend.

    Nobody else takes part: each collective answers at once with what this rank gave. Gives Megatron's `parallel_state`.
    """
    from megatron.core import parallel_state
    from megatron.training import global_vars, initialize

    args = copy.copy(args)
    args.rank, args.local_rank, args.fake_process_group = rank, 0, True
    # Settings of real communication libraries.
    args.use_gloo_process_groups = args.use_sharp = False
    args.nccl_communicator_config_path, args.high_priority_stream_groups = None, []
    environment = dict(os.environ)  # which says, once a model is built, what attention it has
    # Each init_process_group puts another "[rank0]:" in front of tracebacks.
    with assigned(global_vars, _GLOBAL_ARGS=args), assigned(sys, excepthook=sys.excepthook):
        try:
            with megatrons_checks():
                initialize._initialize_distributed(None, None, None)
            yield parallel_state
        finally:
            parallel_state.destroy_model_parallel()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            os.environ.clear()
            os.environ.update(environment)


def all_positions(args: Any) -> list[Position]:
    """Return the place of every rank, by Megatron's own numbering."""
    from megatron.core.parallel_state import RankGenerator

    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size
    order = "tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=tp, ep=1, dp=args.world_size // (tp * pp * cp), pp=pp, cp=cp, order=order)
    experts = RankGenerator(tp=etp, ep=ep, dp=args.world_size // (etp * ep * pp), pp=pp, cp=1, order=order)

    def places(generator: Any, axis: str) -> dict[int, int]:
        return {rank: place for group in generator.get_ranks(axis) for place, rank in enumerate(group)}

    axes = [places(dense, "tp"), places(dense, "pp"), places(experts, "ep"), places(experts, "tp")]
    return [Position(rank, *(axis[rank] for axis in axes)) for rank in range(args.world_size)]


def distinct(positions: Sequence[Position]) -> list[Position]:
    """Return the first rank of every distinct place."""
    first: dict[Position, Position] = {}
    for position in positions:
        first.setdefault(replace(position, rank=0), position)
    return list(first.values())
