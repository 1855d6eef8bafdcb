"""Writing small files so that a reader never sees half of one, and a run that goes on when one cannot be written."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any


def write_text(path: str, text: str, shared: bool = False, durable: bool = False) -> None:
    """Write `text` as it is under `path`, replacing an older file in one step; makes the folder.

    What a killed process leaves beside it, ``<path>.tmp``, the next write replaces.

    Args:
        path: the file.
        text: its content; line ends are not changed.
        shared: several processes may write `path` at a time; a killed one then leaves a file of its own.
        durable: wait until the disk has it. For what a user made by one command, not for what a run rewrites.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp" if shared else f"{path}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_json(path: str, content: Any) -> None:
    """Write `content` as indented JSON, as `write_text` does; one process at a time may write a path.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    write_text(path, json.dumps(content, indent=1) + "\n")


class NotAsWritten(ValueError):
    """JSON of a file that this package writes has another form; the text says what is wrong with it."""


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Take parsed JSON apart within: what goes wrong because it has another form is raised as `NotAsWritten`."""
    try:
        yield
    except NotAsWritten:
        raise
    except KeyError as error:
        raise NotAsWritten(f"no {error}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise NotAsWritten(str(error)) from None


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: it is not JSON, or nested beyond all reason.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    with open(path, "rb") as file:
        return parse_json(file.read())


class WriteTrouble:
    """Tells on stderr, once each, that a file cannot be written and that it can be again: a full disk stops no run.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.active = False
        """Whether the last attempt failed."""

    def begins(self, error: OSError, consequence: str) -> None:
        """Note a failed attempt; the first one in a row is told."""
        if not self.active:
            say(f"WARNING: {self._path}: {error.strerror or error}; {consequence}")
        self.active = True

    def ends(self, outcome: str) -> None:
        """Note a successful attempt; the first one after failures is told."""
        if self.active:
            say(f"> {self._path}: written again; {outcome}")
        self.active = False


def say(text: str) -> None:
    """Print a line for the user on stderr, which may itself be a file on a full disk."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
