"""Each line of the selfcheck finds what it is there for: real runs with a fault planted in each."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.selfcheck import corpus
from megatron_patch.selfcheck.conduct import Conductor, ask
from megatron_patch.selfcheck.runs import Machine, Spec, cpu_runs
from megatron_patch.selfcheck.table import judge, rows_of
from megatron_patch.selfcheck.verdicts import Verdict
from tests.support.pool import ROOT

MACHINE = Machine(0, False, {}, quick=True)
SCRIPT = str(ROOT / "tests" / "support" / "plants.py")
HEALTHY = str(ROOT / "launch" / "pretrain.py")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The dataset that the runs train on."""
    prefix = str(tmp_path_factory.mktemp("text") / "corpus")
    _, trouble = ask(corpus.__name__, prefix, limit=1800)
    assert not trouble
    return prefix


def conducted(folder: Path, text: str, specs: list[Spec]) -> dict[str, Any]:
    conductor = Conductor(str(folder), specs, HEALTHY, text, 1, time.monotonic() + 3000)
    conductor.run(lambda: None)
    return conductor.results


def planted(name: str, faults: str) -> Spec:
    """A run of the selfcheck, with faults."""
    spec = next(spec for spec in cpu_runs(MACHINE) if spec.name == name)
    environment = {"PLANT": faults, "PYTHONPATH": str(ROOT)}
    return replace(spec, script=SCRIPT, environment=environment, limit=1800.0)


def verdict(line: str, results: dict[str, Any]) -> Verdict:
    row = next(row for row in rows_of(MACHINE) if row.name == line)
    found = judge(row, results)
    assert found is not None
    return found


def failing(results: dict[str, Any]) -> set[str]:
    """The lines that fail among those whose runs were made."""
    assert not [result for result in results.values() if "error" in result], results
    judged = {row.name: judge(row, results) for row in rows_of(MACHINE) if not row.skip}
    return {name for name, found in judged.items() if found is not None and not found.passed}


def test_a_wrong_lr_and_a_wrong_metric_are_found(tmp_path: Path, text: str) -> None:
    results = conducted(tmp_path, text, [planted("fp32", "wrong_lr_in_the_step wrong_lr_in_the_schedule wrong_metric")])
    assert failing(results) == {"rules/fp32/rates", "rules/fp32/decay", "metrics/fp32"}, results
    rates = verdict("rules/fp32/rates", results)
    assert rates.figure == pytest.approx(1e-3, rel=1e-6)
    assert "LR" in rates.why
    decay = verdict("rules/fp32/decay", results)
    assert decay.figure is not None and 5 < decay.figure < 25  # 2%, in units of 0.1% and of what fp32 adds
    metric = verdict("metrics/fp32", results)
    assert metric.figure == pytest.approx(5.0, rel=0.2)  # half of 1e-4, in units of 1e-5


def test_a_slow_path_and_syncs_are_found(tmp_path: Path, text: str) -> None:
    results = conducted(tmp_path, text, [planted("cost", "slow_metrics slow_patch syncs")])
    assert {"cost/on", "cost/metrics", "cost/syncs"} <= failing(results), results
    assert verdict("cost/syncs", results).figure == 1 + 3
    assert os.path.getsize(tmp_path / "trace.json.gz") > 1000


def test_a_resume_that_is_off_by_one_bit_is_found(tmp_path: Path, text: str) -> None:
    healthy = planted("fp32", "")
    spoilt = planted("resumed", "other_weights_after_a_load")
    results = conducted(tmp_path, text, [healthy, spoilt])
    assert failing(results) == {"resume"}, results
    figure = verdict("resume", results).figure
    assert figure is not None and figure > 15
