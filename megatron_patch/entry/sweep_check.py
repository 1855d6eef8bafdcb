"""The flags of every trial of a sweep, through Megatron's parser and validation before anything starts.

In a process of its own: the sweep itself need not hold torch and Megatron, nor see what the CPU platform replaces.
"""

import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from megatron_patch.entry.explain import plain_errors
from megatron_patch.entry.run import DEFAULT_SCRIPT, asked_for, explain_unknown, split_command_line, yaml_arguments
from megatron_patch.errors import MegatronPatchError
from megatron_patch.sweep.axes import PlannedTrial
from megatron_patch.sweep.file import SweepFile
from megatron_patch.sweep.planned import Run, run_of


@dataclass(frozen=True)
class Checked:
    """One trial, checked."""

    name: str
    mistake: str = ""
    """Why a run would refuse its flags, in one line; empty if it would not."""
    flops: float | None = None
    """Of its training; None where they cannot be counted."""
    notes: tuple[str, ...] = ()


def check_flags(file: SweepFile, trials: Sequence[PlannedTrial]) -> tuple[Checked, ...] | str:
    """Return what a run would say of the flags of every trial; in one line why that cannot be known, if it cannot.

    Raises:
        ConfigError: flags that a run would refuse.
    """
    jobs = []
    for trial in trials:
        folder = file.folder(trial)
        values = {"python": sys.executable, "worker": "0", "port": "29500"}
        run = run_of(file.words(trial, values), os.path.join(folder, "config.yaml"))
        if run is None:
            return "the command is not `megatron_patch run --config {config}`"
        jobs.append((trial.name, file.trial_flags(trial, folder), run, file.variables(trial, values)))
    if not jobs:
        return ()
    print(f"checking the flags of {len(jobs)} trials ...", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            found = pool.submit(_check_all, jobs).result()
        except BrokenProcessPool:
            return "the process that checked them died"
    if isinstance(found, str):
        return found
    _refuse(file.path, found)
    return found


def _refuse(path: str, found: Sequence[Checked]) -> None:
    wrong = [checked for checked in found if checked.mistake]
    if not wrong:
        return
    kinds = {re.sub(r"\d[\d.]*(e[-+]?\d+)?", "#", checked.mistake) for checked in wrong}
    several = f" for {len(kinds)} different reasons, of which this is the first" if len(kinds) > 1 else ""
    raise MegatronPatchError(
        f"{path}: {len(wrong)} of {len(found)} trials would be refused{several}: trial {wrong[0].name}: "
        f"{wrong[0].mistake}"
    )


type _Job = tuple[str, dict[str, Any], Run, Mapping[str, str]]


def _check_all(jobs: Sequence[_Job]) -> tuple[Checked, ...] | str:
    """Check trials, in a process that has imported neither torch nor Megatron yet."""
    os.environ.update(jobs[0][3])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # of an allocation that the sweep itself runs in
    from megatron_patch.upstream.dry.machine import prepare_machine, quiet

    with quiet():
        try:
            gpu = prepare_machine(False)
            from megatron_patch.upstream.dry.checked import Checker
            from megatron_patch.upstream.hooks import check_version

            check_version(any(asked_for("allow-untested-megatron", flags, run.arguments) for _, flags, run, _ in jobs))
            checker = Checker()
        except (ImportError, MegatronPatchError) as error:
            return " ".join(str(error).split())
        return tuple(_check(checker, gpu, *job[:3]) for job in jobs)


def _check(checker: Any, gpu: bool, name: str, flags: dict[str, Any], run: Run) -> Checked:
    from megatron_patch.upstream.cpu.platform import activate, cpu_arguments
    from megatron_patch.upstream.dry.machine import assigned
    from megatron_patch.upstream.flags import refuse_yaml_cfg

    parser = checker.parser
    # Each trial wraps the one parser anew.
    with assigned(parser, parse_args=parser.parse_args, error=parser.error):
        try:
            _, script, arguments = split_command_line(run.arguments)
            own_script = script != DEFAULT_SCRIPT
            plain_errors(parser)
            if not own_script:
                explain_unknown("config.yaml", flags, parser)
            if gpu and asked_for("cpu", flags, arguments):
                activate()  # which refuses
            words = [*yaml_arguments(flags, parser, arguments), *arguments]
            refuse_yaml_cfg(words)
            if "--cpu" in words:
                words, _ = cpu_arguments(words)
            flops, notes = checker.check(words, run.ranks, own_script)
        except MegatronPatchError as error:
            return Checked(name, mistake=str(error))
    return Checked(name, flops=flops, notes=tuple(notes))
