"""The commands by name: which there are, how each says how it was started, and that its help costs nothing."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch.config import OPTIONS
from megatron_patch.entry.exits import exit_code
from megatron_patch.entry.main import COMMANDS, main
from megatron_patch.errors import ConfigError, Refused
from megatron_patch.version import __version__

ROOT = Path(__file__).parents[2]
DOORS = {
    "train_tokenizer": "tokenizer",
    "preprocess_data": "preprocess",
    "sweep": "sweep",
    "transfer_config": "transfer",
    "report": "report",
    "gpu_selfcheck": "selfcheck",
}
HEAVY = {"torch", "megatron", "numpy", "matplotlib", "optuna", "datasets", "sentencepiece", "transformers", "rich"}
MODULES = 350
"""A help page needs argparse, yaml and what a Python with an editable install loads at its start."""


def command(monkeypatch: pytest.MonkeyPatch, *argv: str, program: str = "/bin/megatron-patch") -> int:
    monkeypatch.setattr(sys, "argv", [program, *argv])
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: megatron-patch COMMAND")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS) == "run explain sweep transfer report tokenizer preprocess doctor selfcheck".split()


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"megatron-patch {__version__}\n"


def test_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "swep") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: COMMAND swep: expected one of run, ")
    assert err.endswith("did you mean sweep?\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize("module", [True, False], ids=["module", "script"])
def test_every_help_is_cheap_and_says_how_it_was_started(name: str, module: bool) -> None:
    """Bounded in modules, not in time: those do not depend on the machine."""
    program = "__main__.py" if module else "megatron-patch"
    script = f"""
import atexit, json, sys
sys.argv = ["/x/{program}", "{name}", "--help"]
atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))
from megatron_patch.entry.main import main
main()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    started = "python -m megatron_patch" if module else "megatron-patch"
    assert done.stdout.startswith(f"usage: {started} {name} ")
    if name == "run":  # ours; Megatron's follow with a script
        assert {option.flag for option in OPTIONS} == set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE))
    modules = json.loads(done.stderr)
    assert not HEAVY & {module.partition(".")[0] for module in modules}
    assert len(modules) < MODULES


@pytest.mark.parametrize(("door", "name"), DOORS.items())
def test_the_doors_of_a_checkout(
    door: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "tools" / f"{door}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(path))["main"]()
    door_says = capsys.readouterr().out
    assert door_says.startswith(f"usage: python tools/{door}.py ")
    assert f"\n  python tools/{door}.py " in door_says
    assert command(monkeypatch, name, "--help") == 0
    command_says = capsys.readouterr().out
    assert f"\n  megatron-patch {name} " in command_says
    assert "tools/" not in command_says
    options = [{word for word in text.split() if word.startswith("--")} for text in (door_says, command_says)]
    assert options[0] == options[1]


def _raise(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("--x", 1, "2", "give 2"), 2, "error: --x 1: expected 2; give 2\n"),
        (Refused("too few"), 3, "refused: too few\n"),
        (KeyboardInterrupt(), 130, "interrupted: nothing written\n"),
    ],
)
def test_exit_codes(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: _raise(error), interrupted="nothing written") == code
    assert capsys.readouterr().err == line
    assert exit_code(lambda: _raise(error), interrupted="nothing written", speaks=False) == code
    assert capsys.readouterr().err == ""


def test_other_ends() -> None:
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 1) == 1
    with pytest.raises(KeyboardInterrupt):
        exit_code(lambda: _raise(KeyboardInterrupt()))
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: _raise(ZeroDivisionError()), interrupted="")
