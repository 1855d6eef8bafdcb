"""Trials of Megatron runs without this package: TensorBoard event folders and W&B offline runs.

Megatron writes all its arguments into both. It logs the loss on the test set, which it measures after the last step,
under the same key as the loss on the validation set. TensorBoard keeps both, W&B one of them.
"""

import math
import os

from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import RunJson, Status
from megatron_patch.runs.log import Log
from megatron_patch.runs.tensorboard import read_tensorboard_log
from megatron_patch.runs.trial import DIVERGED, Trial, trial_of_run
from megatron_patch.runs.wandb import read_wandb_log


def read_foreign_runs(path: str) -> tuple[Trial, ...]:
    """Return the trials of all runs in or below a folder, TensorBoard's or W&B's.

    Raises:
        ConfigError: no run, both kinds (which would count runs twice), or a file that is damaged or of an unfinished
            run.
    """
    logs, folders = _found(path)
    if logs and folders:
        raise ConfigError(
            path,
            f"with {len(folders)} TensorBoard folders and {len(logs)} W&B runs",
            "one kind, or a run would count twice",
            "give the folder of one kind; TensorBoard tells validation and test loss apart",
        )
    if not logs and not folders:
        raise ConfigError(
            path, "", "runs: folders with a run.json, TensorBoard event files or W&B's .wandb files", "check the path"
        )
    return tuple(map(read_tensorboard, folders)) + tuple(map(read_wandb, logs))


def has_foreign_runs(path: str) -> bool:
    """Return whether there are TensorBoard's or W&B's files in or below a folder."""
    return any(_found(path))


def _found(path: str) -> tuple[list[str], list[str]]:
    """Return W&B's files and the folders with TensorBoard's, in or below a folder."""
    logs: list[str] = []
    folders: list[str] = []
    for folder, below, files in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        logs += [os.path.join(folder, name) for name in sorted(files) if name.endswith(".wandb")]
        if any(name.startswith("events.out.tfevents.") for name in files):
            folders.append(folder)
    return logs, folders


def read_tensorboard(folder: str) -> Trial:
    """Return the trial whose TensorBoard event files are in `folder`, restarts being further files.

    Raises:
        ConfigError: a damaged file, or one without Megatron's arguments or a final validation loss.
    """
    return _trial(folder, read_tensorboard_log(folder))


def read_wandb(path: str) -> Trial:
    """Return the trial in a .wandb file.

    Raises:
        ConfigError: W&B is not installed, a damaged file, or one without Megatron's arguments or a final validation
            loss.
    """
    return _trial(path, read_wandb_log(path))


def _trial(source: str, log: Log) -> Trial:
    arguments, validation, training = log.arguments, log.validation, log.training
    if "hidden_size" not in arguments or "lr" not in arguments:
        raise ConfigError(
            source, "(no hidden_size and lr among its texts)", "the log of a Megatron training", "leave this run out"
        )
    steps = arguments.get("train_iters")
    last = max(training, default=max(validation, default=0))
    lost = bool(training) and not math.isfinite(training[last])
    final = max(validation, default=None)
    if not lost and (final is None or final < (steps if isinstance(steps, int) else last)):
        where = f"iteration {last}" + (f" of {steps}" if isinstance(steps, int) else "")
        what = "no validation loss" if final is None else f"last validation loss at iteration {final}"
        raise ConfigError(
            source,
            f"({what}; it ends at {where})",
            "a finished training that evaluates at its end",
            "let it finish, or leave it out (if it diverged, give the sweep as a CSV in which its loss is nan)",
        )
    loss = DIVERGED if lost or final is None else validation[final]
    content = {
        "arguments": arguments,
        "status": Status.FINISHED if math.isfinite(loss) else Status.DIVERGED,
        "final_loss": loss,
        "train_iterations": steps,
    }
    return trial_of_run(RunJson(source, content))
