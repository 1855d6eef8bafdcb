"""A disk that is full while metrics are written: training goes on, one warning, nothing torn, and metrics resume."""

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.faulty import LAST, SAVED, Killed, assert_same_end, iterations, start
from tests.support.pool import Pool, RankFailure
from tests.support.training import Outcome, Patched, Run

FULL = 4  # the iteration from which there is no room, and
ROOM = 6  # from which there is again


@dataclass
class Full(Patched):
    """The operating system refuses to let the files of metrics grow by more than some bytes.

    It is the limit on the size of files, set while they are written: unlike a full disk it needs no rights to set up,
    and what the rank prints is spared. To a writer they look alike: what fits is written, the next call is an OSError.
    """

    folder: Path

    def before_arguments(self) -> None:
        from megatron_patch.files import run_json
        from megatron_patch.files.json_lines import JsonLines

        super().before_arguments()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        append, write_json = JsonLines._append, run_json.write_json

        def full_append(file: JsonLines, data: bytes) -> None:
            with no_room(os.path.getsize(file._path) + 100):
                append(file, data)

        def full_write_json(path: str, content: Any) -> None:
            with no_room(100):
                write_json(path, content)

        JsonLines._append, run_json.write_json = full_append, full_write_json  # type: ignore[method-assign]

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        if FULL <= iteration < ROOM and os.environ["RANK"] == "1":
            assert iterations(self.folder)[-1] == FULL - 1  # a reader sees whole lines all the time


@contextlib.contextmanager
def no_room(limit: int) -> Iterator[None]:
    """No file grows beyond `limit` bytes, from iteration `FULL` until there is room again."""
    from megatron.training import get_args

    full = FULL <= (getattr(get_args(), "curr_iteration", None) or 0) + 1 < ROOM
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_full_for_a_while(pool: Pool, tmp_path: Path, whole: tuple[Path, Outcome]) -> None:
    """Nothing is lost: what could not be written comes with the first step that can."""
    outcome = start(pool, tmp_path, hooks=Full(tmp_path))
    assert_same_end(outcome, tmp_path, whole, LAST)
    shown = pool.printed[1].splitlines()
    names = ["alignment.jsonl", "equilibrium.jsonl", "run.json", "sublayers.jsonl"]
    warnings = [line for line in shown if line.startswith("WARNING: ") and "File too large; training goes on" in line]
    assert sorted(Path(line.split(": ")[1]).name for line in warnings) == names, "a warning each, not one a step"
    ends = [line for line in shown if ": written again; " in line]
    assert sorted(Path(line[2:].split(": ")[0]).name for line in ends) == names


@dataclass
class FullUntilKilled(Full, Killed):
    """And then the rank is killed, with what waits in its memory."""


def test_full_until_the_run_dies(pool: Pool, tmp_path: Path, whole: tuple[Path, Outcome]) -> None:
    """The restart repeats the iterations that are missing, since they are after the checkpoint."""
    with pytest.raises(RankFailure, match="exit code -9"):
        start(pool, tmp_path, hooks=FullUntilKilled("step", 1, ROOM - 1, tmp_path))
    assert iterations(tmp_path)[-1] == FULL - 1 == SAVED
    assert_same_end(start(pool, tmp_path), tmp_path, whole, LAST - SAVED)
