"""What a sweep is going to start, for those who check it before: its trials, and what their command runs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.sweep.attempt import DIVERGED, FINISHED, settled
from megatron_patch.sweep.axes import Axis, PlannedTrial
from megatron_patch.sweep.file import Search, SweepFile, TwoPhase
from megatron_patch.sweep.sources import with_vector_lr

_OURS = ("megatron_patch", "megatron-patch")
_SCRIPTS = ("pretrain.sh", "pretrain_multinode.sh", "slurm.sbatch")
_SCRIPT_OPTIONS = (
    *("config", "num-gpus", "gpus", "slots", "hostfile", "master-addr", "master-port", "ssh-port", "env", "node-rank"),
    "log-dir",
)
_LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run", "srun", "mpirun", "accelerate", "sbatch")
_RANKS = ("num_gpus", "num_accelerators", "num-gpus", "nproc_per_node", "nproc-per-node", "ntasks")
_MANY_NODES = ("hostfile", "nnodes", "num_nodes", "nodes", "rdzv_endpoint", "rdzv-endpoint")


@dataclass(frozen=True)
class Run:
    """What `megatron_patch run` is given by the command of a trial."""

    arguments: tuple[str, ...]
    """Behind the config: a script, if any, and flags."""
    ranks: int | None
    """How many there will be; None where the command does not tell."""


def run_of(words: Sequence[str], config: str) -> Run | None:
    """Return what a trial's command runs; None if it is not ``megatron_patch run`` with the trial's own config.

    Args:
        words: of the command, placeholders filled in.
        config: path of the trial's config.yaml.

    >>> run_of(["deepspeed", "--num_gpus", "2", "--module", "megatron_patch", "run", "--config", "c", "--bf16"], "c")
    Run(arguments=('--bf16',), ranks=2)
    >>> run_of(["launch/pretrain.sh", "--num-gpus=4", "--config", "c", "my.py"], "c")
    Run(arguments=('my.py',), ranks=4)
    >>> run_of(["my_trainer", "--config", "c"], "c") is None
    True
    """
    for place, word in enumerate(words):
        name = os.path.basename(word)
        if name in _SCRIPTS:
            arguments = _without_options(words[place + 1 :])
            return _run(arguments, config, _ranks(words) if name == "pretrain.sh" else None)
        if name in _OURS and words[place + 1 : place + 2] == ["run"]:
            launched = any(os.path.basename(launcher) in _LAUNCHERS for launcher in words[:place])
            return _run(words[place + 2 :], config, _ranks(words[:place]) if launched else 1)
    return None


def _run(arguments: Sequence[str], config: str, ranks: int | None) -> Run | None:
    if arguments[:2] == ["--config", config]:
        return Run(tuple(arguments[2:]), ranks)
    return Run(tuple(arguments[1:]), ranks) if arguments[:1] == [f"--config={config}"] else None


def _without_options(words: Sequence[str]) -> list[str]:
    """Return the words for a script of launch/, --config first, without what is the script's own."""
    rest, first = list[str](), list[str]()
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, _ = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in _SCRIPT_OPTIONS:
            value = [word] if equals else [word, *left[:1]]
            left = left if equals else left[1:]
            first = value if name == "config" else first
        elif word != "--no-ssh":
            rest.append(word)
    return [*first, *rest]


def _ranks(words: Sequence[str]) -> int | None:
    """Return the number of ranks that a launcher's options ask for on one machine; None if they do not tell."""
    values: dict[str, str] = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("-"):
            name, equals, value = word.lstrip("-").partition("=")
            values[name] = value if equals else following
    if any(values.get(name, "1") != "1" for name in _MANY_NODES):
        return None
    if "gpus" in values and "ntasks" not in values:
        return len(values["gpus"].split(","))
    return next((int(values[name]) for name in _RANKS if values.get(name, "").isdigit()), None)


def to_check(file: SweepFile) -> list[PlannedTrial]:
    """Return trials whose flags are right if those of every trial are.

    All of a grid; of two phases all, with each LR in the place of the vector LR that the first one will find; of a
    search, what comes of every category and of both ends of every range, one after the other.
    """
    if isinstance(file.plan, Search):
        return _ends(file.plan)
    if isinstance(file.plan, TwoPhase):
        return [*file.plan.first, *(with_vector_lr(t, float(t.changes["lr"])) for t in file.plan.second)]
    return list(file.plan)


def _ends(search: Search) -> list[PlannedTrial]:
    alternatives: list[list[tuple[str, dict[str, Any]]]] = []
    for dimension in search.space:
        if isinstance(dimension, Axis):
            alternatives.append([(f"{dimension.name}={p.label}", dict(p.flags)) for p in dimension.points])
        else:
            kind = int if dimension.kind == "integer" else float
            ends = (kind(dimension.low), kind(dimension.high))
            alternatives.append([(f"{dimension.flag}={end:g}", {dimension.flag: end}) for end in ends])
    first = {flag: value for choices in alternatives for flag, value in choices[0][1].items()}
    found = {tuple(sorted(map(str, first.items()))): PlannedTrial("_".join(c[0][0] for c in alternatives), first)}
    for choices in alternatives:
        for label, flags in choices[1:]:
            changes = {**first, **flags}
            found.setdefault(tuple(sorted(map(str, changes.items()))), PlannedTrial(label, changes))
    return list(found.values())


def is_done(file: SweepFile, trial: PlannedTrial) -> bool:
    """Return whether a trial need not be trained any more."""
    outcome = settled(file.folder(trial))
    return outcome is not None and outcome.kind in (FINISHED, DIVERGED)
