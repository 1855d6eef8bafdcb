"""The tables of docs/evidence.md are those of the committed runs, so that they cannot lie."""

import importlib
import re
from pathlib import Path

import pytest

from megatron_patch.fit.curves import study

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/evidence.md"
BLOCK = re.compile(r"<!-- (\w+)( forecast)? -->\n(.*?)<!-- end -->", re.DOTALL)
BLOCKS = BLOCK.findall(PAGE.read_text())


@pytest.mark.parametrize(("name", "kind", "written"), BLOCKS, ids=[f"{name}{kind}" for name, kind, _ in BLOCKS])
def test_a_table_is_that_of_the_runs(name: str, kind: str, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make figures-draw` writes them anew."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    figures = importlib.import_module("evidence_figures")
    found = study(figures.known(name))
    if kind:
        proxy = next(curve.optimum for curve in map(found.proxy, found.labels) if curve and curve.optimum)
        measured = figures.Measured(figures.tables(name) / "layers.csv", 2**proxy.log2_lr)
        lines = figures.forecast_table(name, found, measured)
    else:
        lines = figures.table(found)
    assert written.splitlines() == lines


def test_every_table_of_runs_is_shown() -> None:
    tables = {path.parent.name for path in (ROOT / "docs/evidence").glob("*/trials.csv")}
    assert {name for name, kind, _ in BLOCKS if not kind} == tables


def test_what_was_trained_is_not_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    evidence = importlib.import_module("evidence")
    for name in evidence.names():
        file = evidence.sweep_file(name)
        left = {planned.name for planned in evidence.left(name, file)}
        assert len(file.plan) - len(left) == len(evidence.known(name)), name
        assert left < {planned.name for planned in file.plan} or not evidence.known(name)
