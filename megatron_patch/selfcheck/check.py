"""The whole: find out what machine this is, make the runs, judge the lines, keep table and page up to date."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.files.selfcheck_json import PAGE, Judged, Line, Selfcheck
from megatron_patch.files.whole import write_text
from megatron_patch.report.selfcheck_page import selfcheck_page
from megatron_patch.selfcheck.conduct import Conductor, Result, ask
from megatron_patch.selfcheck.runs import Machine, Spec, runs_of
from megatron_patch.selfcheck.table import Row, chosen, judge, needed, rows_of

PREPARE = 120.0
"""Seconds that the probe and the corpus may take each."""
GPU_SECONDS, CPU_SECONDS = 570.0, 3600.0
"""A machine with a GPU may be lent for ten minutes; one without may be busy with anything."""
CPU = {"CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Options:
    """What is asked for."""

    output: str
    """Folder; must not exist, or be empty."""
    cpu: bool = False
    quick: bool = False
    only: str | None = None
    """Regular expression over names of lines."""
    seconds: float | None = None
    """For everything; by default `GPU_SECONDS` on a GPU and `CPU_SECONDS` without one."""
    script: str = ""
    """The Megatron script that runs are made with."""
    change: Callable[[Spec], Spec] = lambda spec: spec
    """What to change of every run; for tests."""


class Check:
    """One selfcheck.

    Args:
        options: what is asked for.
        say: takes each line that has been judged.

    Raises:
        ConfigError: the folder is in use.
        OSError: it cannot be written to.
    """

    def __init__(self, options: Options, say: Callable[[Line], None] = lambda line: None) -> None:
        self._options, self._say = options, say
        self._folder = os.path.abspath(options.output)
        if os.path.isdir(self._folder) and os.listdir(self._folder):
            raise ConfigError("--output", options.output, "a folder that is not there yet, or empty", "give another")
        os.makedirs(self._folder, exist_ok=True)
        self._began = time.monotonic()
        self._facts: dict[str, Any] = {}
        self._rows: list[Row] = []
        self._lines: dict[str, Line] = {}
        self._conductor: Conductor | None = None
        self._failed: dict[str, Result] = {}

    def run(self) -> Selfcheck:
        """Do it, and return what was found; that is on disk from the first moment on."""
        specs = self._prepare()
        self._keep()
        if specs:
            slots = self._slots()
            corpus = os.path.join(self._folder, "corpus")
            seconds = self._options.seconds or (GPU_SECONDS if self._machine.gpus else CPU_SECONDS)
            ends = self._began + seconds
            self._conductor = Conductor(self._folder, specs, self._options.script, corpus, slots, ends)
            try:
                self._conductor.run(self._judge)
            finally:
                self._judge()
                self._keep(pictures=True)
        return self._found()

    def _slots(self) -> int:
        """How many ranks are busy at a time: on a GPU as many as wait for their imports, on a CPU half of its cores."""
        cores = int(self._facts["cores"])
        return min(6, max(1, cores // 2)) if self._facts["gpus"] and not self._options.cpu else max(1, cores // 2)

    def _prepare(self) -> list[Spec]:
        """Find out what there is, write the text, and return the runs to be made; none if that failed."""
        hidden = CPU if self._options.cpu else {}
        began = time.monotonic()
        out, trouble = ask("megatron_patch.selfcheck.probe", limit=PREPARE, environment=hidden)
        if not trouble:
            try:
                self._facts = json.loads(out.splitlines()[-1])
            except (ValueError, IndexError) as error:
                trouble = f"the probe printed no facts: {error}"
        unknown = {"gpus": [], "fp8": {}, "transformer_engine": False}
        cpu = self._options.cpu or not self._facts
        machine = self._machine = Machine.of(self._facts or unknown, cpu, self._options.quick)
        self._rows = chosen(rows_of(machine), self._options.only)
        self._note("machine", "versions, GPU, driver, NCCL, Transformer Engine", trouble, self._describe(), began)
        if not trouble:
            began = time.monotonic()
            _, trouble = ask(
                "megatron_patch.selfcheck.corpus", os.path.join(self._folder, "corpus"), limit=PREPARE, environment=CPU
            )
            self._note("text", "bytes of the standard library as a Megatron dataset", trouble, "written", began)
        for row in self._rows:
            if row.skip:
                self._lines[row.name] = Line(row.name, row.compared, Judged.SKIPPED, why=row.skip)
            elif trouble:
                self._lines[row.name] = Line(row.name, row.compared, Judged.FAIL, why=trouble)
            else:
                self._lines[row.name] = Line(row.name, row.compared, Judged.WAITING)
        return [] if trouble else [self._options.change(spec) for spec in needed(runs_of(machine), self._rows)]

    def _note(self, name: str, compared: str, trouble: str, why: str, began: float) -> None:
        judged = Judged.FAIL if trouble else Judged.PASS
        line = Line(name, compared, judged, why=trouble or why, seconds=round(time.monotonic() - began, 1))
        self._lines[name] = line
        self._say(line)

    def _device(self) -> str:
        gpus = [] if self._options.cpu else self._facts.get("gpus", [])
        return f"{len(gpus)} x {gpus[0]['name']}" if gpus else str(self._facts.get("processor", "unknown"))

    def _describe(self) -> str:
        versions = self._facts.get("versions", {})
        shown = [
            f"{name} {versions[name]}" for name in ("megatron-core", "torch", "transformer-engine") if name in versions
        ]
        shown += (
            [f"CUDA {self._facts['torch_cuda']}", f"driver {self._facts['driver']}"] if self._facts.get("gpus") else []
        )
        return ", ".join([self._device(), *shown])

    def _judge(self) -> None:
        """Judge what can be judged by now, and keep it."""
        results = self._conductor.results if self._conductor else {}
        for row in self._rows:
            if self._lines[row.name].judged is not Judged.WAITING:
                continue
            verdict = judge(row, results)
            if verdict is None:
                continue
            judged = Judged.PASS if verdict.passed else Judged.FAIL
            seconds = round(max(results[name].get("seconds", 0.0) for name in row.needs), 1)
            line = Line(row.name, row.compared, judged, verdict.figure, verdict.bound, verdict.why, seconds)
            self._lines[row.name] = line
            self._say(line)
        self._keep()

    def _found(self) -> Selfcheck:
        results = self._conductor.results if self._conductor else {}
        series = {
            name: [result["losses"][step] for step in sorted(result["losses"], key=int)]
            for name, result in results.items()
            if result.get("losses")
        }
        lines = list(self._lines.values())
        complete = all(line.judged is not Judged.WAITING for line in lines)
        seconds = round(time.monotonic() - self._began, 1)
        return Selfcheck(self._device(), complete, seconds, self._facts, lines, series)

    def _keep(self, pictures: bool = False) -> None:
        found = self._found()
        found.write(self._folder)
        page = selfcheck_page(found if pictures else replace(found, series={}))
        write_text(os.path.join(self._folder, PAGE), page)
