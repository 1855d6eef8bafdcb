"""The JSON lines survive crashes, resumes and full disks, and the writers get the interface's keys."""

import contextlib
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.files import json_lines as sinks
from megatron_patch.files.json_lines import JsonLines
from megatron_patch.metrics.writers import log_scalars, scalars


def lines(iteration: int) -> list[dict[str, Any]]:
    return [{"iteration": iteration, "layer": name, "value": 1 / iteration} for name in ("a", "b")]


def test_a_killed_and_resumed_run_ends_with_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, killed = str(tmp_path / "whole.jsonl"), str(tmp_path / "sub" / "killed.jsonl")
    file = JsonLines(whole, 0)
    for iteration in (10, 20, 30, 40):
        file.write(lines(iteration))
    file = JsonLines(killed, 0)
    for iteration in (10, 20, 30):
        file.write(lines(iteration))
    with open(killed, "a", encoding="utf-8") as torn:
        torn.write('{"iteration": 40, "lay')  # the crash
    file = JsonLines(killed, 25)  # resumed from the checkpoint of iteration 25
    for iteration in (30, 40):
        file.write(lines(iteration))
    assert Path(killed).read_bytes() == Path(whole).read_bytes()


@pytest.mark.parametrize("last", [0, 5, 10, 15, 20, 100])
def test_cut_back_keeps_exactly_what_the_checkpoint_has_seen(tmp_path: Path, last: int) -> None:
    path = str(tmp_path / "file.jsonl")
    file = JsonLines(path, 0)
    for iteration in (10, 20):
        file.write(lines(iteration))
    JsonLines(path, last)
    kept = [json.loads(line)["iteration"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    assert kept == [iteration for iteration in (10, 10, 20, 20) if iteration <= last]


def test_a_number_that_json_lacks_is_an_error_and_not_written(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    file = JsonLines(str(path), 0)
    with pytest.raises(ValueError, match="nan"):
        file.write([{"iteration": 1, "value": float("nan")}])
    assert path.read_bytes() == b""


def test_writers_get_metric_and_layer_as_the_key() -> None:
    class Board:
        def __init__(self) -> None:
            self.seen: list[tuple[str, float, int]] = []

        def add_scalar(self, key: str, value: float, iteration: int) -> None:
            self.seen.append((key, value, iteration))

    class Wandb:
        def log(self, values: dict[str, float], iteration: int) -> None:
            self.seen = (values, iteration)

    values = scalars([{"layer": "a/q", "ratio": 2.0, "norm": None}], ("ratio", "norm"))
    board, wandb = Board(), Wandb()
    log_scalars(values, 7, board, wandb)
    assert board.seen == [("ratio/a/q", 2.0, 7)]
    assert wandb.seen == ({"ratio/a/q": 2.0}, 7)
    log_scalars(values, 7, None, None)


# --- a disk that is full ---------------------------------------------------------------------------------------------


def numbered(path: Path) -> list[int]:
    """The iterations in a file whose lines must all be whole."""
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


@contextlib.contextmanager
def no_room(path: Path, more: int) -> Iterator[None]:
    """The operating system lets this process write `more` bytes behind the end of the file, and then refuses."""
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, old)


@pytest.mark.parametrize("more", [0, 1, 40, 60])
def test_what_does_not_fit_waits_and_nothing_is_torn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: int
) -> None:
    path, whole = tmp_path / "file.jsonl", tmp_path / "whole.jsonl"
    file = JsonLines(str(path), 0)
    file.write(lines(1))
    with no_room(path, more):
        for iteration in (2, 3, 4):
            file.write(lines(iteration))
            assert numbered(path) == [1, 1]
    assert capsys.readouterr().err == (
        f"WARNING: {path}: File too large; training goes on and the lines wait until the file can be written\n"
    )
    file.write([])  # an iteration without lines of this file is an occasion too
    assert numbered(path) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert capsys.readouterr().err == f"> {path}: written again; the iterations that had to wait are in it\n"
    file.write(lines(5))
    assert capsys.readouterr().err == ""
    undisturbed = JsonLines(str(whole), 0)
    for iteration in range(1, 6):
        undisturbed.write(lines(iteration))
    assert path.read_bytes() == whole.read_bytes()


def test_a_full_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel's own full device, put in the place of the file for a while; whose length cannot be changed either."""
    path, kept = tmp_path / "file.jsonl", tmp_path / "kept"
    file = JsonLines(str(path), 0)
    file.write(lines(1))
    path.rename(kept)
    path.symlink_to("/dev/full")
    file.write(lines(2))
    assert "No space left on device" in capsys.readouterr().err
    path.unlink()
    kept.rename(path)
    file.write(lines(3))
    # What could not be cut off is cut off now, at the length the device had.
    assert numbered(path)[-4:] == [2, 2, 3, 3]


@pytest.mark.parametrize("how", ["emptied", "removed"])
def test_whoever_makes_room_may_take_the_file_itself(tmp_path: Path, how: str) -> None:
    path = tmp_path / "file.jsonl"
    file = JsonLines(str(path), 0)
    file.write(lines(1))
    with no_room(path, 10):
        file.write(lines(2))
    path.write_text("") if how == "emptied" else path.unlink()
    file.write(lines(3))
    assert numbered(path) == [2, 2, 3, 3]


def test_what_waits_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sinks, "WAITING_BYTES", 300)
    path = tmp_path / "file.jsonl"
    file = JsonLines(str(path), 0)
    file.write(lines(1))
    with no_room(path, 0):
        for iteration in range(2, 20):
            file.write(lines(iteration))
    file.write(lines(20))
    found = numbered(path)
    assert found == sorted(found)
    assert (found[:2], found[-4:]) == ([1, 1], [19, 19, 20, 20])
    assert len(found) < 12
    dropped = 19 - 1 - (len(found) // 2 - 2)
    assert f"{dropped} were dropped, since too many had to wait" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["half", "nul", "no iteration"])
def test_a_damaged_line_ends_the_file_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    path = tmp_path / "file.jsonl"
    first = "".join(json.dumps(line) + "\n" for line in lines(10))
    damaged = {"half": first[:-20], "nul": first + "\0" * 50, "no iteration": first + '{"layer": 1}\n' + first}
    path.write_text(damaged[broken])
    JsonLines(str(path), 20)
    kept = first.splitlines(keepends=True)[:1] if broken == "half" else [first]
    assert path.read_text() == "".join(kept)
    number = 2 if broken == "half" else 3
    assert capsys.readouterr().err == (
        f"WARNING: {path}: line {number} is unfinished or damaged; the file is cut off before it\n"
    )
