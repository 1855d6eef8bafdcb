"""Where results go: JSON lines that survive a crash and a resume, TensorBoard, Weights & Biases."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any


class JsonLines:
    """A file of one JSON object a line, in the order of iterations.

    Opening cuts it back to what a resumed run has not yet repeated; a line that a crash left unfinished goes too. Each
    `write` appends the lines of one iteration by one system call, so a reader sees whole iterations.

    Args:
        path: the file; its folder is made.
        last_iteration: iteration of the checkpoint that the run continues from; 0 for a new run.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str, last_iteration: int) -> None:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self._path = path
        if os.path.exists(path):
            os.truncate(path, _kept_bytes(path, last_iteration))
        else:
            open(path, "xb").close()

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append the lines of one iteration and hand them to the operating system.

        Raises:
            OSError: the file cannot be written, or the disk is full.
            ValueError: a number that JSON does not have (nan, infinity).
        """
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        with open(self._path, "ab", buffering=0) as file:
            data = memoryview(text.encode())
            while data:
                data = data[file.write(data) :]


def _kept_bytes(path: str, last_iteration: int) -> int:
    """Return the length of the file up to its first line that is broken or of a later iteration."""
    kept = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                known = line.endswith(b"\n") and json.loads(line)["iteration"] <= last_iteration
            except (ValueError, KeyError, TypeError):
                known = False
            if not known:
                break
            kept += len(line)
    return kept


def scalars(lines: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, float]:
    """Return the measured values under the keys of the writers, ``<metric>/<layer>``."""
    return {
        f"{metric}/{line['layer']}": line[metric] for line in lines for metric in metrics if line[metric] is not None
    }


def log_scalars(values: Mapping[str, float], iteration: int, tensorboard: Any, wandb: Any) -> None:
    """Give values to Megatron's writers.

    Args:
        values: by key.
        iteration: 1-based; W&B refuses a smaller one than the last.
        tensorboard: a SummaryWriter or None.
        wandb: the module `wandb` or None.
    """
    if tensorboard is not None:
        for key, value in values.items():
            tensorboard.add_scalar(key, value, iteration)
    if wandb is not None:
        wandb.log(dict(values), iteration)
