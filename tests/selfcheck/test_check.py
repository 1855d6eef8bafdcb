"""The whole command: its table, file, page and exit code; from a small selection to a broken machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.entry.selfcheck import main
from megatron_patch.files.selfcheck_json import PAGE, SELFCHECK_JSON, Judged, Line, Selfcheck
from megatron_patch.report.selfcheck_page import print_selfcheck, selfcheck_page
from megatron_patch.selfcheck import check, conduct
from tests.support.pool import ROOT

LINES = [
    Line("machine", "versions", Judged.PASS, why="x", seconds=1.0),
    Line("same/bf16", "losses: fp32, bf16", Judged.FAIL, 0.5, 0.02, "step 7 <b>", 12.0),
    Line("same/te", "losses", Judged.SKIPPED, why="needs a GPU"),
    Line("resume", "bits", Judged.WAITING),
]


def found(*lines: Line, complete: bool = True) -> Selfcheck:
    return Selfcheck(
        "1 x NVIDIA", complete, 12.3, {"versions": {"torch": "2.11"}, "gpus": []}, lines, {"fp32": [3.0, 2.0]}
    )


def test_the_file_is_read_back(tmp_path: Path) -> None:
    written = found(*LINES, Line("x", "y", Judged.FAIL, float("inf"), 1.0), complete=False)
    written.write(str(tmp_path))
    text = (tmp_path / SELFCHECK_JSON).read_text()
    content = json.loads(text, parse_constant=pytest.fail)
    assert content["counts"] == {"pass": 1, "fail": 2, "skipped": 1, "waiting": 1}
    assert content["passed"] is False
    read = Selfcheck.read(str(tmp_path / SELFCHECK_JSON))
    assert list(read.lines[:4]) == LINES
    assert read.series == {"fp32": [3.0, 2.0]}
    (tmp_path / "other.json").write_text('{"lines": [{"name": 1}]}')
    with pytest.raises(ValueError, match="judged"):
        Selfcheck.read(str(tmp_path / "other.json"))


def test_what_passes() -> None:
    assert found(LINES[0], LINES[2]).passed
    assert not found(LINES[0], LINES[1]).passed
    assert not found(LINES[0], complete=False).passed
    assert not found(LINES[2]).passed, "nothing was checked"


def test_the_page_shows_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    page = selfcheck_page(found(*LINES, complete=False))
    for text in ("same/bf16", "step 7 &lt;b&gt;", "needs a GPU", "has not ended", "<svg", "versions torch", "2.11"):
        assert text in page, text
    assert "http" not in page.replace("http://www.w3.org", "")
    print_selfcheck(found(*LINES))
    out = capsys.readouterr().out
    assert "1 passed, 1 failed, 1 left out, 1 not judged yet, in 12 s on 1 x NVIDIA" in out


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text("")
    assert main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --output {tmp_path}: expected a folder that is not there yet")
    assert main(["--output", str(tmp_path / "new"), "--seconds", "0"]) == 2
    assert not (tmp_path / "new").exists()


def asked(probe: tuple[str, str], text: tuple[str, str] = ("", "")) -> Any:
    """A stand-in for the processes before the runs."""
    return lambda module, *arguments, **more: probe if module.endswith("probe") else text


FACTS = {
    "gpus": [],
    "fp8": {},
    "transformer_engine": False,
    "processor": "P",
    "cores": 2,
    "versions": {},
    "driver": None,
}


@pytest.mark.parametrize(
    ("answers", "failed"),
    [
        (asked(("", "probe: signal 11")), "machine"),
        (asked(("no json", "")), "machine"),
        (asked((json.dumps(FACTS), ""), ("", "corpus: no room")), "text"),
    ],
)
def test_a_broken_machine_fails_every_line_and_leaves_a_whole_table(
    answers: Any, failed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "ask", answers)
    result = check.Check(check.Options(str(tmp_path / "out"), quick=True)).run()
    lines = {line.name: line for line in result.lines}
    assert lines[failed].judged is Judged.FAIL
    assert {line.judged for line in result.lines} <= {Judged.FAIL, Judged.SKIPPED, Judged.PASS}
    assert lines["resume"].judged is Judged.FAIL and lines["resume"].why == lines[failed].why
    assert not result.passed and result.complete
    assert (tmp_path / "out" / PAGE).exists()


def test_the_table_is_whole_though_every_run_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "ask", asked((json.dumps(FACTS), "")))
    program = (sys.executable, "-c", "raise SystemExit('error: no kernel image')")
    original = conduct.Conductor

    class Broken(original):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, program)

    monkeypatch.setattr(check, "Conductor", Broken)
    said: list[str] = []
    result = check.Check(check.Options(str(tmp_path / "out"), quick=True), lambda line: said.append(line.name)).run()
    judged = {line.name: line for line in result.lines if line.judged is not Judged.SKIPPED}
    assert result.complete and not result.passed
    assert set(said) == set(judged)
    for name in set(judged) - {"machine", "text"}:
        assert judged[name].judged is Judged.FAIL, name
    assert "no kernel image" in judged["rules/fp32/rates"].why
    assert judged["resume"].why.startswith("run fp32: exit code 1")
    on_disk = Selfcheck.read(str(tmp_path / "out" / SELFCHECK_JSON))
    assert [line.judged for line in on_disk.lines] == [line.judged for line in result.lines]


def test_an_interrupted_selfcheck_leaves_what_it_has_and_no_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools" / "gpu_selfcheck.py"), "--cpu", "--quick", "--output", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("runs/*/log.0.txt")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert err == f"interrupted: what was found by then is in {out}/selfcheck.json\n"
    left = Selfcheck.read(str(out / SELFCHECK_JSON))
    assert not left.complete and left.counts["waiting"] > 5
    assert str(out) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_one_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["--cpu", "--quick", "--only", "rules/fp32|metrics/fp32", "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert "pass    rules/fp32/decay: " in text and "left out by --only" in text
    content = Selfcheck.read(str(out / SELFCHECK_JSON))
    assert content.counts["pass"] == 2 + 3 and content.passed
    assert "<svg" in (out / PAGE).read_text()
    assert len(content.series["fp32"]) == 12
