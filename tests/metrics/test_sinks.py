"""The JSON lines survive crashes and resumes, and the writers get the interface's keys."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.metrics.sinks import JsonLines, log_scalars, scalars


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
