"""The tables of docs/evidence.md are those of the committed runs, so that they cannot lie."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/evidence.md"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    return importlib.import_module("evidence_figures")


def test_every_table_is_that_of_the_runs(figures: ModuleType) -> None:
    """`make figures-draw` writes them anew."""
    blocks = figures.BLOCK.findall(PAGE.read_text())
    assert blocks
    for _, name, written, _ in blocks:
        assert written.splitlines() == figures.block(name), name


def test_every_table_of_runs_is_shown(figures: ModuleType) -> None:
    shown = {name for _, name, _, _ in figures.BLOCK.findall(PAGE.read_text())}
    for name in (path.parent.name for path in (ROOT / "docs/evidence").glob("*/trials.csv")):
        assert figures.SHOWN_WITH.get(name, name) in shown


def test_what_was_trained_is_not_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    evidence = importlib.import_module("evidence")
    for name in evidence.names():
        file = evidence.sweep_file(name)
        left = {planned.name for planned in evidence.left(name, file)}
        assert len(file.plan) - len(left) == len(evidence.known(name)), name
        assert left < {planned.name for planned in file.plan} or not evidence.known(name)
