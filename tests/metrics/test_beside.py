"""The stream beside the training's: what waits for what, recorded by stand-ins, since there is no GPU here."""

from typing import Any

import pytest
import torch

from megatron_patch.metrics import beside
from megatron_patch.metrics.beside import TO_HOST, Beside, OnItsWay


class Streams:
    """Stands in for what `beside` uses of torch.cuda, and notes what is asked of it."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def Stream(self, device: Any) -> Any:
        outer = self

        class Made:
            def wait_stream(self, other: str) -> None:
                outer.said.append(f"side waits for {other}")

        return Made()

    def current_stream(self, device: Any) -> str:
        return "main"

    def stream(self, stream: Any) -> Any:
        outer = self

        class Entered:
            def __enter__(self) -> None:
                outer.said.append("in side")

            def __exit__(self, *_: object) -> None:
                outer.said.append("in main")

        return Entered()


class Kept:
    """A tensor of the main stream."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def record_stream(self, stream: Any) -> None:
        self.said.append("kept for side")


def test_the_side_waits_for_the_main_stream_and_nobody_for_the_side(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams()
    monkeypatch.setattr(beside.torch, "cuda", streams)
    work = Beside(torch.device("cuda"))
    for _ in range(2):
        with work.work([Kept(streams.said)]):  # type: ignore[list-item]
            streams.said.append("work")
    once = ["side waits for main", "kept for side", "in side", "work", "in main"]
    assert streams.said == once * 2


def test_on_a_cpu_nothing_is_moved_and_no_one_looks_at_what_is_read() -> None:
    def unwanted() -> Any:
        raise AssertionError("looked at")
        yield

    with Beside(torch.device("cpu")).work(unwanted()):
        pass
    tensor = torch.ones(3)
    assert OnItsWay(tensor).arrived() is tensor


def test_the_wait_has_a_name_in_a_profile() -> None:
    with torch.profiler.profile() as profile:
        OnItsWay(torch.ones(1)).arrived()
    assert [event.name for event in profile.events()].count(TO_HOST) == 1
