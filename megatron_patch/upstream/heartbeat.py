"""The heartbeat of a rank at Megatron's own places for one: the calls of its fault-tolerance integration."""

from collections.abc import Callable
from typing import Any

from megatron_patch.hosts.heartbeat import BETWEEN, CHECKPOINT, ENDING, EVALUATING, STARTING, STEP, Heart
from megatron_patch.upstream.hooks import Hook, after, before

_FT = "megatron.training.ft_integration"
_BEGINS = {
    "setup": STARTING,
    "on_training_step_start": STEP,
    "on_eval_step_start": EVALUATING,
    "on_checkpointing_start": CHECKPOINT,
    "shutdown": ENDING,
}
_ENDS = ("on_training_step_end", "on_eval_step_end", "on_checkpointing_end")


def heartbeat_hooks(heart: Heart) -> tuple[Hook, ...]:
    """Return the hooks that let a rank of a watched launch tell how far it is; they change nothing else."""

    def beat(phase: str) -> Callable[..., None]:
        return lambda *_: heart.beat(phase, _iteration())

    why = "tell how far a rank is"
    begins = [Hook(f"{_FT}:{name}", (), before(beat(phase)), why) for name, phase in _BEGINS.items()]
    return (*begins, *(Hook(f"{_FT}:{name}", (), after(beat(BETWEEN)), why) for name in _ENDS))


def _iteration() -> int | None:
    """Return the iteration that Megatron is in, from 1; None before the first."""
    from megatron.training.global_vars import get_args

    try:
        done: Any = getattr(get_args(), "curr_iteration", None)
    except AssertionError:  # Megatron's way to say that there are none
        return None
    return None if done is None else int(done) + 1
