"""The lock of a running job in its --save folder.

Standard library alone and nothing of ours, as everything that an agent is made of (`megatron_patch.hosts.agent`).
"""

import contextlib
import json
import os
import time
from typing import Any

LOCK = "launch.lock"
"""Its name, in --save."""
BEAT = 3.0
"""Seconds between two rewritings."""
BEATS_MISSED = 5
"""A lock that has not changed for so many beats is a dead job's."""


class Lock:
    """The lock of a job in its --save folder, alive as long as it is rewritten; no clocks are compared.

    Args:
        folder: --save.
        record: what others may want to know of the job; has ``job``.
    """

    def __init__(self, folder: str, record: dict[str, Any]) -> None:
        self.path = os.path.join(folder, LOCK)
        self._record, self._count = record, 0
        self.held = False
        """Whether it is ours."""

    def take(self) -> dict[str, Any]:
        """Try to take it; return ``{"held": ..., "other": record of the job that has it or had it, or None}``.

        Raises:
            OSError: the folder cannot be written to.
        """
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        other = None
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            seen = self._read()
            for _ in range(int(BEAT * BEATS_MISSED / 0.25)):
                time.sleep(0.25)
                if not os.path.exists(self.path):
                    break  # the other has just ended
                if (now := self._read()) != seen:
                    return {"held": False, "other": _parsed(now or seen)}
            other = _parsed(seen)
        self._write()
        if other is not None:
            time.sleep(1)  # of several who took it over at a time, the last has it
        if (_parsed(self._read()) or {}).get("job") != self._record["job"]:
            return {"held": False, "other": _parsed(self._read())}
        self.held = True
        return {"held": True, "other": other}

    def beat(self) -> None:
        """Show that the job lives. A disk that is full or away for a while stops nothing."""
        with contextlib.suppress(OSError):
            self._write()

    def leave(self) -> None:
        """Give it back."""
        if self.held and (_parsed(self._read()) or {}).get("job") == self._record["job"]:
            with contextlib.suppress(OSError):
                os.remove(self.path)
        self.held = False

    def _read(self) -> str:
        with contextlib.suppress(OSError), open(self.path, encoding="utf-8", errors="replace") as file:
            return file.read()
        return ""

    def _write(self) -> None:
        self._count += 1
        temporary = f"{self.path}.{self._record['job']}"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({**self._record, "beat": self._count}, file)
        os.replace(temporary, self.path)


def _parsed(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        if isinstance(content, dict):
            return content
    return {}
