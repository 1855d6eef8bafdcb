"""Whatever happens in one run happens to its own lines: crashes, hangs, lost ranks, no time left."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.selfcheck.conduct import Conductor, last_words
from megatron_patch.selfcheck.runs import Machine, Spec
from megatron_patch.selfcheck.sizes import QUICK
from megatron_patch.selfcheck.table import Row, judge
from megatron_patch.selfcheck.verdicts import Verdict, refused, same_losses

RUN = """
import json, os, signal, sys, time
spec = json.load(open(os.environ["MEGATRON_PATCH_SELFCHECK"]))
rank = os.environ["RANK"]
do = sys.argv[1]
if do == "hang" or (do == "lose" and rank == "0"):
    time.sleep(3600)
if do == "crash":
    raise RuntimeError("no kernel image is available")
if do == "kill":
    os.kill(os.getpid(), signal.SIGSEGV)
if do == "mistake" or do == "lose":
    print("error: --cuda-graph-impl local: expected none; drop it")
    sys.exit(2)
if do != "silent":
    json.dump({"losses": {"1": 2.0 + int(rank), "2": 1.0}}, open(spec["result"] + f".{rank}.json", "w"))
"""


def spec(name: str, do: str = "write", **more: Any) -> Spec:
    return Spec(name, (do,), QUICK, **{"limit": 600.0, **more})


def conducted(folder: Path, *specs: Spec, slots: int = 2, seconds: float = 900.0) -> dict[str, Any]:
    program = (sys.executable, "-c", RUN)
    calls: list[int] = []
    conductor = Conductor(str(folder), specs, "", "", slots, time.monotonic() + seconds, program)
    conductor.run(lambda: calls.append(len(conductor.results)))
    assert set(conductor.results) == {spec.name for spec in specs}
    assert not specs or calls
    return conductor.results


@pytest.mark.parametrize(
    ("do", "words"),
    [
        ("crash", "exit code 1: RuntimeError: no kernel image is available"),
        ("kill", "signal 11"),
        ("silent", "ended without its results"),
        ("mistake", "exit code 2: error: --cuda-graph-impl"),
    ],
)
def test_a_run_that_fails_leaves_the_others(tmp_path: Path, do: str, words: str) -> None:
    results = conducted(tmp_path, spec("bad", do), spec("after", after="bad"), spec("good"))
    assert words in results["bad"]["error"]
    assert results["after"]["error"] == "not started: it goes on from bad, which failed"
    assert results["good"]["losses"] == {"1": 2.0, "2": 1.0}


def test_a_run_that_hangs_is_ended_at_its_limit(tmp_path: Path) -> None:
    results = conducted(tmp_path, spec("bad", "hang", limit=1.0, ranks=2), spec("good"))
    assert results["bad"]["error"].startswith("not done within 1 s")
    assert "error" not in results["good"]
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in left


def test_ranks_that_wait_for_a_lost_one_are_ended(tmp_path: Path) -> None:
    results = conducted(tmp_path, spec("bad", "lose", ranks=2))
    assert results["bad"]["error"].startswith("exit code 2: error: --cuda-graph-impl")


def test_two_ranks_are_seen_as_one(tmp_path: Path) -> None:
    assert conducted(tmp_path, spec("both", ranks=2))["both"]["losses"] == {"1": 2.0, "2": 1.0}


def test_nothing_is_started_when_time_is_up(tmp_path: Path) -> None:
    results = conducted(tmp_path, spec("late"), spec("later", alone=True), seconds=-1.0)
    assert {result["error"] for result in results.values()} == {"not started: the time for the whole was used up"}


def test_what_needs_the_machine_alone_waits_for_the_others(tmp_path: Path) -> None:
    conducted(tmp_path, spec("alone", alone=True), spec("a"), spec("b"), slots=4)
    written = {name: os.path.getmtime(tmp_path / "runs" / name / "seen.0.json") for name in ("a", "b")}
    began = os.path.getmtime(tmp_path / "runs" / "alone" / "spec.json")
    assert began >= max(written.values())


def test_a_refusal_is_a_result(tmp_path: Path) -> None:
    results = conducted(tmp_path, spec("refused", "mistake", mode="refusal"), spec("accepted", mode="refusal"))
    assert refused(results["refused"], "--cuda-graph-impl").passed
    assert not refused(results["refused"], "--other").passed
    assert not refused(results["accepted"], "--cuda-graph-impl").passed


def test_a_line_fails_with_its_run_and_with_its_own_mistakes() -> None:
    def broken(run: Any) -> Verdict:
        raise ZeroDivisionError("no step")

    row = Row("x", "y", ("a", "b"), lambda a, b: same_losses(a, b, 1.0))
    good = {"losses": {"1": 1.0}}
    assert judge(row, {"a": good}) is None
    assert judge(row, {"a": good, "b": {"error": "signal 9"}}) == Verdict(None, 0.0, "run b: signal 9")
    assert judge(row, {"a": good, "b": {}}) == Verdict(None, 0.0, "KeyError: 'losses'")
    assert judge(Row("x", "y", ("a",), broken), {"a": good}) == Verdict(None, 0.0, "ZeroDivisionError: no step")
    assert not any(judge(row, {"a": good, "b": bad}).passed for bad in ({}, {"error": ""}))  # type: ignore[union-attr]


def test_last_words(tmp_path: Path) -> None:
    text = """
        loading
        ValueError: the one that matters
        sys:1: a warning at exit
    """
    (tmp_path / "log.1.txt").write_text(textwrap.dedent(text))
    assert last_words(str(tmp_path), [0, 1]) == "exit code 1: ValueError: the one that matters"
    assert last_words(str(tmp_path), [-9, 0]) == "signal 9"
    assert json.dumps(last_words(str(tmp_path), [None]))


def test_machine_of_a_probe() -> None:
    facts = {"gpus": [{"name": "x"}] * 2, "transformer_engine": True, "fp8": {"delayed": ""}}
    assert Machine.of(facts, cpu=False, quick=False) == Machine(2, True, {"delayed": ""}, False)
    assert Machine.of(facts, cpu=True, quick=True).gpus == 0
