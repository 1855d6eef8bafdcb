"""What all ranks say to each other, or do together, so that none waits for one that has stopped."""

import socket
from collections.abc import Callable
from typing import Any

import torch

from megatron_patch.errors import AuditError


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks; a collective call, where there are several."""
    if not torch.distributed.is_initialized():
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def collectively[Result](step: Callable[[], Result]) -> Result:
    """Return what `step` does; if it raises on any rank, raise on all.

    Raises:
        AuditError: of `step`, on this rank or another; as well for its ValueError, where there are several ranks.
    """
    result: list[Result] = []
    error = None
    try:
        result.append(step())
    except (AuditError, ValueError) as caught:
        error = caught
    agree_on_errors(error)
    return result[0]


def agree_on_errors(error: Exception | None) -> None:
    """Raise on every rank if the audit failed on any, so that no rank waits for a peer that has stopped.

    Raises:
        AuditError: with the first failing rank's message.
    """
    if not torch.distributed.is_initialized():
        if error is not None:
            raise error
        return
    for message in gather(None if error is None else f"{whereabouts()}: {error}"):
        if message is not None:
            raise AuditError(message)


def whereabouts() -> str:
    """Return ``"rank 3 on node2"`` for this process."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return f"rank {rank} on {socket.gethostname()}"
