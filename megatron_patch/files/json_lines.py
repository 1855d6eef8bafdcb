"""Where results go: JSON lines that survive a crash, a resume and a full disk, TensorBoard, Weights & Biases."""

import contextlib
import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_patch.files.whole import WriteTrouble, parse_json, say

WAITING_BYTES = 64 * 2**20
"""How much is kept in memory while the file cannot be written; beyond it the oldest iterations are dropped."""


class JsonLines:
    """A file of one JSON object a line, in the order of iterations.

    Opening cuts it back to what a resumed run has not yet repeated; a line that a crash left unfinished goes too. Each
    `write` appends the lines of one iteration by one system call, so a reader sees whole iterations.

    A file that cannot be written, on a full disk say, does not stop the run: one warning is printed, what was written
    by half is cut off again, and the lines wait for the next `write` that succeeds.

    Args:
        path: the file; its folder is made.
        last_iteration: iteration of the checkpoint that the run continues from; 0 for a new run.

    Raises:
        OSError: the file cannot be opened for writing, now.
    """

    def __init__(self, path: str, last_iteration: int) -> None:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self._path = path
        self._trouble = WriteTrouble(path)
        self._waiting: deque[bytes] = deque()  # an entry per iteration
        self._dropped = 0
        self._torn: int | None = None  # length without what a failed write left behind, while that is still there
        if os.path.exists(path):
            kept, broken = _kept(path, last_iteration)
            if broken:
                say(f"WARNING: {path}: line {broken} is unfinished or damaged; the file is cut off before it")
            os.truncate(path, kept)
        else:
            open(path, "xb").close()

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append the lines of one iteration and hand them to the operating system, or keep them until it takes them.

        Raises:
            ValueError: a number that JSON does not have (nan, infinity).
        """
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        if text:
            self._waiting.append(text.encode())
        if not self._waiting:
            return
        try:
            self._append(b"".join(self._waiting))
        except OSError as error:
            self._trouble.begins(error, "training goes on and the lines wait until the file can be written")
            with contextlib.suppress(OSError):
                self._cut()
            self._drop()
        else:
            lost = f"; {self._dropped} were dropped, since too many had to wait" if self._dropped else ""
            self._trouble.ends(f"the iterations that had to wait are in it{lost}")
            self._waiting.clear()
            self._dropped = 0

    def _append(self, data: bytes) -> None:
        self._cut()
        with open(self._path, "ab", buffering=0) as file:
            self._torn = file.tell()
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
        self._torn = None  # only now: over a network a full disk may show when the file is closed

    def _cut(self) -> None:
        """Take away what a failed write has left."""
        if self._torn is not None and os.path.exists(self._path):
            # Not longer than it is: whoever made room may have emptied this file.
            os.truncate(self._path, min(self._torn, os.path.getsize(self._path)))
        self._torn = None

    def _drop(self) -> None:
        while len(self._waiting) > 1 and sum(map(len, self._waiting)) > WAITING_BYTES:
            self._waiting.popleft()
            self._dropped += 1


def _kept(path: str, last_iteration: int) -> tuple[int, int | None]:
    """Return the length of the file before its first line that is broken or of a later iteration.

    And, if that line is a broken one, its number, from 1.
    """
    kept = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if not line.endswith(b"\n"):
                    return kept, number
                if parse_json(line)["iteration"] > last_iteration:
                    return kept, None
            except (ValueError, KeyError, TypeError):
                return kept, number
            kept += len(line)
    return kept, None
