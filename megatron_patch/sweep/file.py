"""The YAML file of a sweep, checked and frozen: docs/sweep.md describes it."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import METRICS_FOLDER, RUN_JSON
from megatron_patch.files.yaml_flags import load_yaml, read_mapping
from megatron_patch.sweep.axes import (
    OWN_FLAGS,
    Axis,
    PlannedTrial,
    bounds,
    check_value,
    flag_of,
    plan,
    read_axes,
    read_axis,
    read_number,
)
from megatron_patch.sweep.placeholders import PLACEHOLDER, PLACEHOLDERS, check_placeholders, filled

KINDS = ("grid", "two-phase", "optuna")
SAMPLERS = ("tpe", "random", "qmc", "cmaes", "gp")
PRUNERS = ("median", "successive-halving", "hyperband")
DEFAULT_COMMAND = ("{python}", "-m", "megatron_patch", "run", "--config", "{config}")
WAITS = ("command", RUN_JSON)
DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, for a sampler."""

    flag: str
    kind: str
    """``log``, ``uniform`` or ``integer``."""
    low: float
    high: float


@dataclass(frozen=True)
class Search:
    """Trials chosen by an Optuna sampler."""

    sampler: str
    trials: int
    seed: int | None
    space: tuple[Range | Axis, ...]
    pruner: str | None


@dataclass(frozen=True)
class TwoPhase:
    """The sweep of arXiv 2510.19093, G.2: first one global LR, then the LR of matrices and output alone."""

    first: tuple[PlannedTrial, ...]
    second: tuple[PlannedTrial, ...]
    """Without the flag vector-lr, which the first phase decides."""


@dataclass(frozen=True)
class SweepFile:
    """A whole sweep."""

    path: str
    output: str
    flags: Mapping[str, Any]
    """Of every trial: the base config's and those of ``set``."""
    command: tuple[str, ...]
    environment: Mapping[str, str]
    wait: str
    """What ends a trial: the end of its ``command``, or a final status in ``run.json``."""
    timeout: float
    """With wait = run.json: seconds without a change of run.json after which a trial counts as failed."""
    plan: tuple[PlannedTrial, ...] | TwoPhase | Search

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return os.path.splitext(os.path.basename(self.path))[0]

    def folder(self, trial: PlannedTrial) -> str:
        """Return the folder of a trial."""
        return os.path.join(self.output, "trials", trial.name)

    def trial_flags(self, trial: PlannedTrial, folder: str) -> dict[str, Any]:
        """Return all flags of a trial that lies in `folder`, placeholders filled in."""
        known = self._values(trial, {}, folder)
        flags = {name: value for name, value in {**self.flags, **trial.changes}.items() if value is not None}
        flags = {name: filled(value, known) for name, value in flags.items()}
        return flags | {"metrics-dir": f"{folder}/{METRICS_FOLDER}", "tensorboard-dir": f"{folder}/tensorboard"}

    def config_text(self, trial: PlannedTrial) -> str:
        """Return the content of a trial's config.yaml."""
        flags = self.trial_flags(trial, self.folder(trial))
        text: str = yaml.safe_dump(flags, sort_keys=False, default_flow_style=False, allow_unicode=True)
        return f"# Trial {trial.name} of {self.path}, complete: repeat it with `run --config`.\n{text}"

    def words(self, trial: PlannedTrial, values: Mapping[str, str]) -> list[str]:
        """Return the command line of a trial; `values` fills python, worker and port."""
        return [filled(word, self._values(trial, values)) for word in self.command]

    def variables(self, trial: PlannedTrial, values: Mapping[str, str]) -> dict[str, str]:
        """Return the environment variables of a trial."""
        return {name: filled(value, self._values(trial, values)) for name, value in self.environment.items()}

    def _values(self, trial: PlannedTrial, values: Mapping[str, str], folder: str | None = None) -> dict[str, str]:
        folder = folder or self.folder(trial)
        known = {"folder": folder, "config": os.path.join(folder, "config.yaml"), "name": trial.name}
        return {**known, "sweep": self.name, **values}

    def difference(self, trial: PlannedTrial) -> tuple[str, Any, Any] | None:
        """Compare a trial's config.yaml with what would be written now.

        Values with a placeholder do not count, so that a sweep can be moved and renamed.

        Returns:
            The first flag that differs with its old and its new value; None if there is none.

        Raises:
            ConfigError: config.yaml cannot be read.
        """
        folder = self.folder(trial)
        new = yaml.safe_load(self.config_text(trial)) or {}
        old = load_yaml(os.path.join(folder, "config.yaml"), "config.yaml")
        placed = {name for name, value in {**self.flags, **trial.changes}.items() if PLACEHOLDER.search(str(value))}
        for name in [*new, *old]:
            if name not in placed and name not in OWN_FLAGS and new.get(name) != old.get(name):
                return name, old.get(name), new.get(name)
        return None


class _Mapping:
    """A mapping of the file, read key by key, so that keys nobody asked for are found."""

    def __init__(self, where: str, content: object, keys: Sequence[str]) -> None:
        if not isinstance(content, dict):
            raise ConfigError(where, content, f"a mapping with the keys {', '.join(keys)}", "correct it")
        for key in content:
            if key not in keys:
                near = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.0)[0]
                raise ConfigError(f"{where}: {key}", "", f"one of the keys {', '.join(keys)}", f"did you mean {near}?")
        self.where = where
        self.content = content

    def __contains__(self, key: str) -> bool:
        return self.content.get(key) is not None

    def place(self, key: str) -> str:
        return f"{self.where}: {key}"

    def text(self, key: str, default: str | None = None) -> str:
        value = self.content.get(key, default)
        if not isinstance(value, str) or not value:
            raise ConfigError(self.place(key), value, "a text", "correct it" if value is not None else f"add `{key}:`")
        return value

    def choice(self, key: str, choices: Sequence[str], default: str) -> str:
        value = self.content.get(key, default)
        if value not in choices:
            raise ConfigError(self.place(key), value, f"one of {', '.join(choices)}", "choose one of them")
        return str(value)

    def integer(self, key: str, lowest: int) -> int:
        value = self.content.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ConfigError(self.place(key), value, f"an integer >= {lowest}", "correct it")
        return value


def read_sweep(path: str) -> SweepFile:
    """Return the sweep that a YAML file describes; see docs/sweep.md.

    Raises:
        ConfigError: anything in the file, or in the base config, that cannot be honoured.
    """
    content = read_mapping(path, "SWEEP.yaml", "see docs/sweep.md")
    keys = ("config", "output", "set", "command", "environment", "wait", "timeout", *KINDS)
    top = _Mapping(path, content, keys)
    given = [kind for kind in KINDS if kind in top]
    if len(given) != 1:
        raise ConfigError(path, " and ".join(given) or None, f"exactly one of {', '.join(KINDS)}", "keep one of them")
    wait = top.choice("wait", WAITS, "command")
    if "timeout" in top and wait == "command":
        raise ConfigError(
            top.place("timeout"), content["timeout"], "`wait: run.json` beside it", "add it, or drop this"
        )
    timeout = read_number(top.place("timeout"), content.get("timeout", DAY_SECONDS))
    if timeout <= 0:
        raise ConfigError(top.place("timeout"), timeout, "seconds above 0", "correct it")
    output = os.path.normpath(top.text("output"))
    return SweepFile(
        path=path,
        output=output,
        flags=_base_flags(top),
        command=_command(top),
        environment=_environment(top),
        wait=wait,
        timeout=timeout,
        plan=_plan(top, given[0]),
    )


def _base_flags(top: _Mapping) -> dict[str, Any]:
    config = os.path.join(os.path.dirname(top.where), top.text("config"))
    flags = load_yaml(config, top.place("config"))
    for name, value in flags.items():
        check_placeholders(f"{config}: {name}", value)
    extra = top.content.get("set") or {}
    where = top.place("set")
    if not isinstance(extra, dict):
        raise ConfigError(where, extra, "a mapping of flags to values", "correct it")
    for key, value in extra.items():
        flags[flag_of(where, key)] = value
    for name in OWN_FLAGS:
        flags.pop(name, None)
    for name, value in flags.items():
        check_value(where, name, value)
    return flags


def _command(top: _Mapping) -> tuple[str, ...]:
    place = top.place("command")
    words = top.content.get("command", list(DEFAULT_COMMAND))
    if not isinstance(words, list) or not words or any(isinstance(word, (list, dict, type(None))) for word in words):
        raise ConfigError(place, words, "a list of words", 'write for example [srun, python, ..., "{config}"]')
    command = tuple(str(word) for word in words)
    check_placeholders(place, command, PLACEHOLDERS)
    if not any("{config}" in word or "{folder}" in word for word in command):
        raise ConfigError(place, words, "a word with {config}", "tell the command which trial to train")
    return command


def _environment(top: _Mapping) -> dict[str, str]:
    place = top.place("environment")
    content = top.content.get("environment") or {}
    if not isinstance(content, dict):
        raise ConfigError(place, content, "a mapping of variables to values", "correct it")
    for name, value in content.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(place, name, "the name of a variable", "correct it")
        if isinstance(value, (list, dict, bool, type(None))):
            raise ConfigError(f"{place}.{name}", value, "a text or a number", "quote it")
    environment = {name: str(value) for name, value in content.items()}
    check_placeholders(place, tuple(environment.values()), PLACEHOLDERS)
    return environment


def _plan(top: _Mapping, kind: str) -> tuple[PlannedTrial, ...] | TwoPhase | Search:
    place, content = top.place(kind), top.content[kind]
    if kind == "grid":
        return plan(place, _grids(place, content))
    if kind == "optuna":
        return _search(place, content)
    phases = _Mapping(place, content, ("phase-1", "phase-2"))
    first, second = (_grids(phases.place(key), phases.content.get(key)) for key in ("phase-1", "phase-2"))
    _check_phases(phases, first, second)
    return TwoPhase(plan(phases.place("phase-1"), first, "phase1_"), plan(phases.place("phase-2"), second, "phase2_"))


def _grids(place: str, content: object) -> list[tuple[Axis, ...]]:
    if isinstance(content, list):
        if not content:
            raise ConfigError(place, content, "at least one grid", "add a mapping of axes")
        return [read_axes(f"{place}[{i}]", grid) for i, grid in enumerate(content)]
    return [read_axes(place, content)]


def _check_phases(phases: _Mapping, first: list[tuple[Axis, ...]], second: list[tuple[Axis, ...]]) -> None:
    flags = {flag for axes in (*first, *second) for axis in axes for point in axis.points for flag in point.flags}
    if "vector-lr" in flags:
        fix = "drop it: in phase 1 it is --lr, in phase 2 the best LR of phase 1"
        raise ConfigError(phases.where, "vector-lr", "other flags", fix)
    for key, grids in (("phase-1", first), ("phase-2", second)):
        for axes in grids:
            if not any(axis.name == "lr" for axis in axes):
                raise ConfigError(phases.place(key), None, "an axis lr in each grid", "add `lr: {log2: [-9, -4]}`")
    for axis in (axis for axes in first for axis in axes):
        if axis.name not in ("lr", "seed") and len(axis.points) > 1:
            expected = "only lr and seed with several values: this phase is to find one global LR"
            raise ConfigError(phases.place("phase-1"), axis.name, expected, "give it one value, or sweep it in phase-2")


def _search(place: str, content: object) -> Search:
    keys = _Mapping(place, content, ("sampler", "trials", "seed", "space", "pruner"))
    space = keys.content.get("space")
    if not isinstance(space, dict) or not space:
        raise ConfigError(keys.place("space"), space, "a mapping of flags to ranges or lists", "add `space:`")
    return Search(
        sampler=keys.choice("sampler", SAMPLERS, "tpe"),
        trials=keys.integer("trials", 1),
        seed=keys.integer("seed", 0) if "seed" in keys else None,
        space=tuple(_dimension(keys.place("space"), key, values) for key, values in space.items()),
        pruner=keys.choice("pruner", PRUNERS, "") if "pruner" in keys else None,
    )


def _dimension(where: str, key: object, values: object) -> Range | Axis:
    """Return what one entry of ``space`` describes: a range, or the points of an axis as categories."""
    if not isinstance(values, dict) or "log2" in values:
        return read_axis(where, key, values)
    flag = flag_of(where, key)
    kinds = ("log", "uniform", "integer")
    if len(values) != 1 or next(iter(values)) not in kinds:
        raise ConfigError(f"{where}.{flag}", values, f"one of {', '.join(kinds)} with [low, high]", "write one of them")
    kind, ends = next(iter(values.items()))
    low, high = bounds(f"{where}.{flag}.{kind}", ends)
    if kind == "log" and low <= 0:
        raise ConfigError(f"{where}.{flag}.log", ends, "bounds above 0", "correct the lower one")
    if kind == "integer" and not (low.is_integer() and high.is_integer()):
        raise ConfigError(f"{where}.{flag}.integer", ends, "whole numbers", "correct them, or use uniform")
    return Range(flag, str(kind), low, high)
