"""How a training ended that did not reach its last iteration: stopped, diverged or failed."""

import math
from collections.abc import Mapping


def status_of(error: BaseException, last_losses: Mapping[str, float] | None) -> str:
    """Return the status for run.json of a training that `error` ended.

    ``stopped``: Megatron left by itself, as it does at --exit-interval. ``diverged``: a loss or gradient was NaN or Inf
    and, where Megatron repeats the step to tell it from a broken machine, was so again. ``failed``: anything else.

    Megatron's own way out after such a step ends in an arbitrary exception: it saves a checkpoint first, which without
    --save is a TypeError (0.19.2). So its state is asked, not the exception.

    Args:
        error: what left Megatron's `train`.
        last_losses: the training losses last seen; None if there were none.
    """
    from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

    if isinstance(error, SystemExit) and not error.code:
        return "stopped"
    reproduced = (RerunState.WILL_RERUN_FROM_CHECKPOINT, RerunState.RERUNNING_FROM_CHECKPOINT)
    rejected = get_rerun_state_machine().state in reproduced
    # With --rerun-mode disabled the check raises this at once.
    rejected |= isinstance(error, RuntimeError) and "Unexpected result" in str(error)
    rejected |= not all(math.isfinite(loss) for loss in (last_losses or {}).values())
    return "diverged" if rejected else "failed"
