"""The .wandb files that W&B writes in its folders ``offline-run-*`` and ``run-*``.

W&B keeps the last value of a step: at the last one the loss on the test set, if there is a test set. Nothing in the
file tells which it is.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import LOSS
from megatron_patch.runs.log import VALIDATION_LOSS, Log, damaged, read_bytes

WANDB_NOTE = (
    "W&B keeps one value a step, and Megatron logs the test loss under the key of the validation loss: with a "
    "test set, the losses are that set's; TensorBoard folders or run.json tell the two apart"
)


def read_wandb_log(path: str) -> Log:
    """Return what a .wandb file tells of a run.

    Raises:
        ConfigError: W&B is not installed, or the file is damaged.
    """
    try:
        from wandb.proto.wandb_internal_pb2 import Record
    except ImportError:
        raise ConfigError(
            path, "", "the package wandb, to read W&B's files", "pip install 'megatron-patch[wandb]'"
        ) from None

    arguments: dict[str, Any] = {}
    losses: dict[str, dict[int, float]] = {VALIDATION_LOSS: {}, LOSS: {}}
    for place, data in _records(path):
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
            raise damaged(path, place, str(error)) from None
    return Log(arguments, losses[VALIDATION_LOSS], losses[LOSS])


_BLOCK = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def _records(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, record) of a .wandb file: LevelDB's log format with zlib's CRC, after a header of 7 bytes.

    W&B has no public reader, and since 0.2x none in Python. An unfinished last record ends the file.
    """
    content = read_bytes(path)
    if content[:4] != b":W&B":
        raise damaged(path, 0, "no header of a .wandb file")
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
            raise damaged(path, place, "wrong checksum of the record")
        if kind in (_FULL, _FIRST):
            parts, start = b"", place
        parts += data
        if kind in (_FULL, _LAST):
            yield start, parts
        place += 7 + length
