"""What of Bridge has no public door: its scheduler class, and the moment before a checkpoint is loaded.

Both are replaced while one run is set up, from the call of our provider to the start of its training, and by the same
means, checks included, as Megatron's own functions. Can go when Bridge lets a config choose the scheduler.
"""

import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_patch.errors import UpstreamChanged
from megatron_patch.upstream.hooks import Hook, after
from megatron_patch.upstream.patch import Session

_session = Session()


def open_doors(scheduler: Callable[..., Any], loaded: Callable[[Any], None]) -> None:
    """Let the run that is being set up have another scheduler and look at its checkpoint; closes those of the last one.

    Args:
        scheduler: called in the place of `OptimizerParamScheduler`, with its arguments.
        loaded: called with what Bridge's `_load_base_checkpoint` returns, each time it reads.

    Raises:
        UpstreamChanged: this Bridge has not, or has otherwise, what is replaced; nothing is replaced then.
    """
    close_doors()
    try:
        _session.add(
            (
                Hook(
                    "megatron.bridge.training.optim:OptimizerParamScheduler",
                    ("optimizer", "init_lr", "max_lr"),
                    lambda original: partial(scheduler),
                    "multiply the LR schedule",
                    # They name the class in signatures; Megatron's own trainer is not the one that runs.
                    also_bound_in=(
                        "megatron.bridge.training.setup",
                        "megatron.bridge.training.train",
                        "megatron.core.optimizer_param_scheduler",
                        "megatron.training.checkpointing",
                        "megatron.training.training",
                    ),
                ),
                Hook(
                    "megatron.bridge.training.checkpointing:_load_base_checkpoint",
                    ("load_dir", "ckpt_cfg", "rank0"),
                    after(loaded),
                    "refuse a checkpoint with other hyperparameters",
                ),
            )
        )
    except UpstreamChanged as error:
        version = importlib.metadata.version("megatron-bridge")
        raise UpstreamChanged(f"megatron-bridge {version}: {error}") from None


def close_doors() -> None:
    """Restore what `open_doors` replaced; twice is harmless."""
    _session.remove()


def check_doors() -> None:
    """Make sure, before anything is set up, that `open_doors` will find what it needs.

    Raises:
        UpstreamChanged: it will not.
    """
    open_doors(lambda: None, lambda loaded: None)
    close_doors()
