"""TensorBoard event files: finding a run's, and reading what a report shows or what a log tells of a run.

Megatron logs the loss on the test set, which it measures after the last step, under the key of the validation loss. The
files keep both, in order: the first value of the last evaluated step is the validation set's.
"""

import ast
import glob
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.files.run_json import LOSS, METRICS_FOLDER
from megatron_patch.runs.log import VALIDATION_LOSS, DamagedLog, Log, damaged, read_bytes

TAGS = (LOSS, "learning-rate", "grad-norm")
"""Keys that are read, beside those of the parameter classes.

The validation loss is not among them: Megatron logs the loss on the test set under the same key. run.json has both.
"""
CLASS_TAGS = ("lr/", "weight_decay/")


@dataclass(frozen=True)
class Series:
    """A number over iterations, which only ever rise."""

    iterations: tuple[int, ...] = ()
    values: tuple[float, ...] = ()


def tensorboard_files(folder: str, arguments: Mapping[str, Any]) -> list[str]:
    """Return the event files of a run in the order in which they were begun.

    The paths in run.json are as the user typed them: relative to a folder that nothing records, or on the machine of
    the training. So the way from the metrics folder to the TensorBoard folder is tried first.

    Args:
        folder: the metrics folder, where it is now.
        arguments: Megatron's arguments in run.json.
    """
    recorded = arguments.get("tensorboard_dir")
    if not recorded:
        return []
    metrics = arguments.get("metrics_dir") or os.path.join(arguments.get("save") or recorded, METRICS_FOLDER)
    candidates = [recorded]
    if os.path.isabs(metrics) == os.path.isabs(recorded):
        candidates.insert(0, os.path.join(folder, os.path.relpath(recorded, metrics)))
    for candidate in candidates:
        files = _event_files(candidate)
        if files:
            return files
    return []


def read_events(paths: Sequence[str]) -> dict[str, Series]:
    """Return the scalars of TensorBoard event files, in the order of the files.

    A step that is not above the one before begins a resumed run: it replaces what an earlier start logged from there
    on. A file ends at its first unfinished or damaged record.

    Raises:
        ConfigError: a file cannot be opened.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for path in paths:
        for event in _events(path, strict=False):
            for value in event.summary.value:
                wanted = value.tag in TAGS or value.tag.startswith(CLASS_TAGS)
                # Megatron logs its flags as texts: --lr is lr/text_summary.
                if not wanted or value.WhichOneof("value") != "simple_value":
                    continue
                known = points.setdefault(value.tag, [])
                while known and known[-1][0] >= event.step:
                    known.pop()
                known.append((event.step, value.simple_value))
    return {
        tag: Series(tuple(step for step, _ in known), tuple(number for _, number in known))
        for tag, known in points.items()
    }


def read_tensorboard_log(folder: str) -> Log:
    """Return what the event files in `folder` tell of a run, restarts being further files.

    Raises:
        ConfigError: a damaged file.
    """
    arguments: dict[str, Any] = {}
    losses: dict[str, dict[int, float]] = {VALIDATION_LOSS: {}, LOSS: {}}
    for path in _event_files(folder):
        started = set()
        for event in _events(path, strict=True):
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
                        number = value.tensor.float_val[0] if value.tensor.float_val else math.nan
                    known.setdefault(event.step, number)  # the second at a step is the test set's
    return Log(arguments, losses[VALIDATION_LOSS], losses[LOSS])


def _literal(text: str) -> Any:
    """What `str` was made of: a number, None, a bool, a list; else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _event_files(folder: str) -> list[str]:
    """Return the event files in a folder, in the order in which they were begun.

    The name holds the time of making: events.out.tfevents.1795315071.host.24911.0
    """
    return sorted(glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*")))


def _events(path: str, strict: bool) -> Iterator[Any]:
    """Yield the events of a file up to an unfinished last record.

    Args:
        path: the file; it may be growing.
        strict: a damaged record is an error; otherwise it ends the file.

    Raises:
        ConfigError: the file cannot be opened; with `strict` also a damaged record.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        for place, data in _records(path):
            try:
                event = Event.FromString(data)
            except Exception as error:  # protobuf has its own class, without type information
                raise damaged(path, place, str(error)) from None
            yield event
    except DamagedLog:
        if strict:
            raise


def _records(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, record); an unfinished last record, as a killed run leaves it, ends the file."""
    from tensorboard.summary.writer.record_writer import masked_crc32c

    content = read_bytes(path)
    place = 0
    while place + 12 <= len(content):
        header = content[place : place + 8]
        (length,) = struct.unpack("<Q", header)
        if content[place + 8 : place + 12] != struct.pack("<I", masked_crc32c(header)):
            raise damaged(path, place, "wrong checksum of the record's length")
        data = content[place + 12 : place + 12 + length]
        checksum = content[place + 12 + length : place + 16 + length]
        if len(checksum) < 4:
            return
        if checksum != struct.pack("<I", masked_crc32c(data)):
            raise damaged(path, place, "wrong checksum of the record")
        yield place, data
        place += 16 + length
