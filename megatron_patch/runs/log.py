"""What Megatron's own loggers keep of a run, the same from every kind of log."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import LOSS

VALIDATION_LOSS = f"{LOSS} validation"
"""Key of the loss on the validation set, and of the one on the test set, which is measured after the last step."""


@dataclass(frozen=True)
class Log:
    """A run as its log tells it."""

    arguments: Mapping[str, Any]
    """Megatron's, by attribute name."""
    validation: Mapping[int, float]
    """Iteration -> validation loss in nats per token."""
    training: Mapping[int, float]
    """Iteration -> training loss in nats per token."""


class DamagedLog(ConfigError):
    """A record of a log cannot be read."""


def damaged(path: str, place: int, detail: str) -> DamagedLog:
    """Return the error for the record at byte `place`."""
    return DamagedLog(
        f"{path} at byte {place}",
        f"({' '.join(detail.split())})",
        "an undamaged record",
        "restore the file from where it was written, or leave this run out",
    )


def read_bytes(path: str) -> bytes:
    """Return the content of a log.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(path, "", "a readable file", f"check its permissions ({error.strerror})") from None
