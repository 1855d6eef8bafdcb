"""Trials of Megatron runs without this package: TensorBoard event folders and W&B offline runs.

Megatron writes all its arguments into both. It logs the loss on the test set, which it measures after the last step,
under the same key as the loss on the validation set, "lm loss validation":

- TensorBoard keeps both, in order: the first value of the last evaluated step is the validation set's.
- W&B keeps the last value of a step, the test set's if there is a test set. Nothing in the file tells which it is.
"""

import ast
import glob
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import LOSS, RunJson, Status
from megatron_patch.runs.trial import DIVERGED, Trial, trial_of_run

VALIDATION = f"{LOSS} validation"
WANDB_NOTE = (
    "W&B keeps one value a step, and Megatron logs the test loss under the key of the validation loss: with a "
    "test set, the losses are that set's; TensorBoard folders or run.json tell the two apart"
)


def read_foreign_runs(path: str) -> tuple[Trial, ...]:
    """Return the trials of all runs in or below a folder, TensorBoard's or W&B's.

    Raises:
        ConfigError: no run, both kinds (which would count runs twice), or a file that is damaged or of an unfinished
            run.
    """
    logs: list[str] = []
    folders: list[str] = []
    for folder, below, files in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        logs += [os.path.join(folder, name) for name in sorted(files) if name.endswith(".wandb")]
        if any(name.startswith("events.out.tfevents.") for name in files):
            folders.append(folder)
    if logs and folders:
        raise ConfigError(
            path,
            f"with {len(folders)} TensorBoard folders and {len(logs)} W&B runs",
            "one kind, or a training would count twice",
            "give the folder of one kind; TensorBoard tells validation and test loss apart",
        )
    if not logs and not folders:
        raise ConfigError(
            path, "", "runs: folders with a run.json, TensorBoard event files or W&B's .wandb files", "check the path"
        )
    return tuple(map(read_tensorboard, folders)) + tuple(map(read_wandb, logs))


def read_tensorboard(folder: str) -> Trial:
    """Return the trial whose TensorBoard event files are in `folder`, restarts being further files.

    Raises:
        ConfigError: a damaged file, or one without Megatron's arguments or a final validation loss.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    arguments: dict[str, Any] = {}
    losses: dict[str, dict[int, float]] = {VALIDATION: {}, LOSS: {}}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*"))):
        started = set()
        for place, data in _tensorboard_records(path):
            try:
                event = Event.FromString(data)
            except Exception as error:  # protobuf has its own class, without type information
                raise _damaged(path, place, str(error)) from None
            for value in event.summary.value:
                name = value.tag.removesuffix("/text_summary")
                if name != value.tag:
                    arguments[name] = _literal(value.tensor.string_val[0].decode("utf-8", "replace"))
                elif value.tag in losses:
                    known = losses[value.tag]
                    if value.tag not in started:  # a restart replaces what an earlier start logged from there on
                        started.add(value.tag)
                        for step in [s for s in known if s >= event.step]:
                            del known[step]
                    number = value.simple_value
                    if value.WhichOneof("value") == "tensor":
                        number = value.tensor.float_val[0] if value.tensor.float_val else DIVERGED
                    known.setdefault(event.step, number)  # the second at a step is the test set's
    return _trial(folder, arguments, losses[VALIDATION], losses[LOSS])


def read_wandb(path: str) -> Trial:
    """Return the trial in a .wandb file, which W&B writes in its folders ``offline-run-*`` and ``run-*``.

    Raises:
        ConfigError: W&B is not installed, a damaged file, or one without Megatron's arguments or a final validation
            loss.
    """
    try:
        from wandb.proto.wandb_internal_pb2 import Record
    except ImportError:
        raise ConfigError(
            path, "", "the package wandb, to read W&B's files", "pip install 'megatron-patch[wandb]'"
        ) from None

    arguments: dict[str, Any] = {}
    losses: dict[str, dict[int, float]] = {VALIDATION: {}, LOSS: {}}
    for place, data in _wandb_records(path):
        try:
            record = Record.FromString(data)
            for config in (record.run.config, record.config):
                for item in config.update:
                    arguments[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            step = record.history.step.num
            if "_step" in row:
                step = int(json.loads(row["_step"]))
            for tag in losses.keys() & row.keys():
                losses[tag][step] = float(json.loads(row[tag]))
        except Exception as error:  # protobuf has its own class, without type information
            raise _damaged(path, place, str(error)) from None
    return _trial(path, arguments, losses[VALIDATION], losses[LOSS])


def _trial(
    source: str, arguments: Mapping[str, Any], validation: Mapping[int, float], training: Mapping[int, float]
) -> Trial:
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


def _literal(text: str) -> Any:
    """What `str` was made of: a number, None, a bool, a list; else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _damaged(path: str, place: int, detail: str) -> ConfigError:
    return ConfigError(
        f"{path} at byte {place}",
        f"({' '.join(detail.split())})",
        "an undamaged record",
        "restore the file from where it was written, or leave this run out",
    )


def _tensorboard_records(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, record) of an event file; an unfinished last record, as a killed run leaves it, ends it."""
    from tensorboard.summary.writer.record_writer import masked_crc32c

    content = _bytes(path)
    place = 0
    while place + 12 <= len(content):
        header = content[place : place + 8]
        (length,) = struct.unpack("<Q", header)
        if content[place + 8 : place + 12] != struct.pack("<I", masked_crc32c(header)):
            raise _damaged(path, place, "wrong checksum of the record's length")
        data = content[place + 12 : place + 12 + length]
        checksum = content[place + 12 + length : place + 16 + length]
        if len(checksum) < 4:
            return
        if checksum != struct.pack("<I", masked_crc32c(data)):
            raise _damaged(path, place, "wrong checksum of the record")
        yield place, data
        place += 16 + length


_BLOCK = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def _wandb_records(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, record) of a .wandb file: LevelDB's log format with zlib's CRC, after a header of 7 bytes.

    W&B has no public reader, and since 0.2x none in Python. An unfinished last record ends the file.
    """
    content = _bytes(path)
    if content[:4] != b":W&B":
        raise _damaged(path, 0, "no header of a .wandb file")
    place, parts, start = 7, b"", 7
    while place + 7 <= len(content):
        room = _BLOCK - place % _BLOCK
        if room < 7:
            place += room
            continue
        checksum, length, kind = struct.unpack("<IHB", content[place : place + 7])
        data = content[place + 7 : place + 7 + length]
        if (checksum, length, kind) == (0, 0, 0):  # filler
            place += room
            continue
        if len(data) < length:
            return
        if not _FULL <= kind <= _LAST or zlib.crc32(bytes([kind]) + data) != checksum:
            raise _damaged(path, place, "wrong checksum of the record")
        if kind in (_FULL, _FIRST):
            parts, start = b"", place
        parts += data
        if kind in (_FULL, _LAST):
            yield start, parts
        place += 7 + length


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(path, "", "a readable file", f"check its permissions ({error.strerror})") from None
