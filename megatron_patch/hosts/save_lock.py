"""The lock of a running job in its --save folder.

Standard library alone and nothing of ours, as everything that an agent is made of (`megatron_patch.hosts.agent`).
"""

import contextlib
import fcntl
import json
import os
import time
from typing import Any

LOCK = "launch.lock"
"""Its name, in --save."""
BEAT = 3.0
"""Seconds between two rewritings."""
BEATS_MISSED = 10
"""A lock that has not changed for so many beats is a dead job's."""
PRIVATE = 0o600
"""Its permissions where it holds a secret."""
SIZE = 1024
"""Bytes of the file: of several that write it at a time, the last one's text is there as a whole."""


class Lock:
    """The lock of a job in its --save folder, alive as long as it is rewritten; no clocks are compared.

    It is rewritten in place. A network file system shows another host the new content of a file when that is opened,
    but a file that has replaced it only when the folder's entries are read anew, up to a minute later.

    Args:
        folder: --save.
        record: what others may want to know of the job; has ``job``.
    """

    def __init__(self, folder: str, record: dict[str, Any]) -> None:
        self.path = os.path.join(folder, LOCK)
        self._record, self._count = record, 0
        self._mode = PRIVATE if "secret" in record else 0o644
        self.held = False
        """Whether it is ours."""

    def take(self, over: str | None = None) -> dict[str, Any]:
        """Try to take it.

        Args:
            over: the content of a dead job's lock, to be taken over; it takes a second to see who else did.

        Returns:
            ``held``; if it is not, ``other``, the record of the job that has it, and ``dead``, the file's content if it
            has not changed for so long that the job should be dead.

        Raises:
            OSError: the folder cannot be written to.
        """
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        if over is None:
            try:
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, self._mode))
            except FileExistsError:
                return self._watch()
            self._write()
        else:
            with open(self.path, "a") as file:
                with contextlib.suppress(OSError):  # a file system without such locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                if self._read() == over:
                    self._write()
            time.sleep(1)  # without such locks the last of several has it
        record = _parsed(self._read())
        self.held = record.get("job") == self._record["job"]
        return {"held": self.held, "other": record, "dead": None}

    def _watch(self) -> dict[str, Any]:
        """Watch another job's lock for a while."""
        seen = self._read()
        deadline = time.monotonic() + BEAT * BEATS_MISSED
        while time.monotonic() < deadline:
            time.sleep(BEAT / 10)
            if not os.path.exists(self.path):
                return self.take()  # the other has just ended
            if (now := self._read()) != seen:
                return {"held": False, "other": _parsed(now) or _parsed(seen), "dead": None}
        return {"held": False, "other": _parsed(seen), "dead": seen}

    def beat(self) -> None:
        """Show that the job lives. A disk that is full or away for a while stops nothing."""
        with contextlib.suppress(OSError):
            self.held = self.held and _parsed(self._read()).get("job", self._record["job"]) == self._record["job"]
            if self.held:
                self._write()

    def leave(self) -> None:
        """Give it back."""
        if self.held and _parsed(self._read()).get("job") == self._record["job"]:
            with contextlib.suppress(OSError):
                os.remove(self.path)
        self.held = False

    def _read(self) -> str:
        with contextlib.suppress(OSError), open(self.path, encoding="utf-8", errors="replace") as file:
            return file.read()
        return ""

    def _write(self) -> None:
        self._count += 1
        text = json.dumps({**self._record, "beat": self._count})
        file = os.open(self.path, os.O_CREAT | os.O_WRONLY, self._mode)
        try:
            if self._mode == PRIVATE and os.fstat(file).st_mode & 0o777 != PRIVATE:
                os.fchmod(file, PRIVATE)  # a dead job's
            os.pwrite(file, text.ljust(SIZE)[:SIZE].encode(), 0)
        finally:
            os.close(file)


def read(folder: str) -> dict[str, Any]:
    """Return what the lock in --save says; empty if there is none."""
    with contextlib.suppress(OSError), open(os.path.join(folder, LOCK), encoding="utf-8", errors="replace") as file:
        return _parsed(file.read())
    return {}


def _parsed(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        if isinstance(content, dict):
            return content
    return {}
