"""What a run leaves behind: hyperparameters.json, run.json, and LR and weight decay per class in Megatron's writers."""

import datetime
import importlib.metadata
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import megatron_patch
from megatron_patch.errors import AuditError, ConfigError
from megatron_patch.files import WriteTrouble, read_json, say, write_json
from megatron_patch.upstream.audit import live_groups
from megatron_patch.upstream.optimizer import Hyperparameters, Plan

_PACKAGES = ("megatron-core", "torch", "deepspeed", "transformer-engine", "numpy")


@dataclass(frozen=True)
class ParameterClass:
    """Parameters that share every hyperparameter, under the name by which they are logged."""

    label: str
    """The class, e.g. ``matrix``; with the multiplier, e.g. ``matrix_m4``, where a class has several."""
    hyperparameters: Hyperparameters


def _gather(value: Any) -> list[Any]:
    if not torch.distributed.is_initialized():
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def parameter_classes(plan: Plan) -> tuple[ParameterClass, ...]:
    """Return the classes of the whole model, the same on every rank; a collective call.

    Raises:
        AuditError: there is a rule, but no parameter of the whole model that it could scale. (One rank may well have
            none: a pipeline stage of embeddings alone.)
    """
    local = {(p.spec.role, p.spec.m, plan.hyperparameters[p.spec.name]) for p in plan.parameters}
    distinct = {entry for entries in _gather(local) for entry in entries}
    by_role: dict[str, dict[Hyperparameters, float]] = {}
    for role, m, hyperparameters in distinct:
        by_role.setdefault(role, {})[hyperparameters] = m
    if plan.width.rule != "none" and not by_role.keys() & {"matrix", "output"}:
        raise AuditError(
            f"--width-scaling {plan.rule.name} scales no parameter: the model has {', '.join(sorted(by_role))} only"
        )
    classes = []
    for role, variants in sorted(by_role.items()):
        for hyperparameters, m in sorted(variants.items(), key=lambda item: (item[1], item[0].weight_decay)):
            label = role
            if len(variants) > 1:
                many_m = len(set(variants.values())) > 1
                label = f"{role}_m{m:g}" if many_m else f"{role}_wd{hyperparameters.weight_decay:g}"
            classes.append(ParameterClass(label, hyperparameters))
    return tuple(classes)


def live_values(classes: Sequence[ParameterClass], optimizer: Any) -> dict[str, tuple[float, float]]:
    """Return ``{label: (lr, weight decay)}`` that the coming step will use, from the live param groups.

    Every rank holds every group, also those whose parameters live on other ranks.
    """
    values = {}
    for c in classes:
        h = c.hyperparameters
        for group in optimizer.param_groups:
            if (
                math.isclose(group["max_lr"], h.lr, rel_tol=1e-9)
                and math.isclose(group["wd_mult"], h.factors.weight_decay, rel_tol=1e-9)
                and math.isclose(group.get("eps", h.eps), h.eps, rel_tol=1e-9)
            ):
                values[c.label] = (float(group["lr"]), float(group["weight_decay"]))
                break
    return values


def hyperparameter_table(plan: Plan, optimizer: Any) -> dict[str, Any]:
    """Return the content of hyperparameters.json, the values read from the live groups of every rank; a collective.

    Raises:
        AuditError: a parameter that no rank trains, or replicas of one that are trained differently.
    """
    specs = {id(p.parameter): p.spec for p in plan.parameters}
    live: dict[str, dict[str, float]] = {}
    for group, parameters in live_groups(optimizer):
        for parameter in parameters:
            name = specs[id(parameter)].name
            live[name] = {
                "lr": group["max_lr"],
                "weight_decay": group["wd_mult"] * plan.weight_decay,
                "eps": group.get("eps", plan.hyperparameters[name].eps),
            }
    merged: dict[str, dict[str, float]] = {}
    described: dict[str, Any] = {}
    for rank_specs, rank_live in _gather((list(specs.values()), live)):
        described.update((spec.name, spec) for spec in rank_specs)
        for name, values in rank_live.items():
            if merged.setdefault(name, values) != values:
                raise AuditError(f"{name} is trained with {merged[name]} on one rank and with {values} on another")
    missing = sorted(set(described) - set(merged))
    if missing:
        raise AuditError(f"{missing[0]} is in no param group of any rank: the optimizer does not train it")
    width = plan.width
    return {
        "rule": plan.rule.name,
        "exponents": [plan.rule.lr_exponent, plan.rule.wd_exponent],
        "base": {"hidden_size": width.base_hidden_size, **width.base_dimensions},
        "source": plan.rule.source,
        "parameters": [
            {
                "name": name,
                "class": spec.role,
                "shape": list(spec.shape),
                "fan_in": spec.fan_in,
                "base_fan_in": spec.base_fan_in,
                "m": spec.m,
                **merged[name],
            }
            for name, spec in sorted(described.items())
        ],
    }


def _plain(value: Any) -> Any:
    """Return `value` if JSON can hold it, else its text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def versions() -> dict[str, str]:
    """Return the installed versions of what decides a run's numbers."""
    found = {"megatron-patch": megatron_patch.__version__, "python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class RunRecord:
    """run.json: what was run, with which versions and layout, and how it went; rewritten as a whole at every update.

    Args:
        directory: the metrics folder.
        args: Megatron's arguments.
        layout: sizes of the parallel groups, e.g. ``{"tensor": 2}``.
        iteration: iterations completed before this start; evaluations of an earlier start up to here are kept.

    Raises:
        OSError: the file cannot be written at the start. Later that is a warning, and the next update writes it all.
    """

    def __init__(self, directory: str, args: Any, layout: Mapping[str, int], iteration: int) -> None:
        self.path = os.path.join(directory, "run.json")
        self._trouble = WriteTrouble(self.path)
        self.content: dict[str, Any] = {
            "status": "running",
            "started": _now(),
            "command": sys.argv,
            "iteration": iteration,
            "train_iterations": args.train_iters,
            "final_loss": None,
            "best_loss": None,
            "train_loss": None,
            "evaluations": self._earlier_evaluations(iteration),
            "layout": dict(layout),
            "versions": versions(),
            "arguments": _plain(vars(args)),
        }
        self._summarise()
        self.write()

    def _earlier_evaluations(self, iteration: int) -> list[dict[str, Any]]:
        if iteration == 0 or not os.path.exists(self.path):
            return []
        try:
            return [e for e in read_json(self.path)["evaluations"] if e["iteration"] <= iteration and e["set"]]
        except (OSError, ValueError, KeyError, TypeError):
            say(f"WARNING: {self.path}: damaged; the evaluations before iteration {iteration} are lost")
            return []

    def trained(self, iteration: int, losses: Mapping[str, Any]) -> None:
        """Note the training losses of an iteration; in memory only."""
        self.content["iteration"] = iteration
        if losses:
            self.content["train_loss"] = {name: float(value) for name, value in losses.items()}

    def evaluated(self, iteration: int, on: str, losses: Mapping[str, float]) -> None:
        """Add one evaluation, e.g. ``on="validation"``, and write if the disk lets us."""
        entries = self.content["evaluations"]
        entries[:] = [e for e in entries if (e["iteration"], e["set"]) != (iteration, on)]
        entries.append({"iteration": iteration, "set": on, **losses})
        self._summarise()
        self._update()

    def ended(self, status: str) -> None:
        """Note how training ended, and write if the disk lets us.

        Args:
            status: ``finished``, ``stopped`` (at --exit-interval, say), ``diverged`` or ``failed``.
        """
        self.content["status"] = status
        self._update()

    def _summarise(self) -> None:
        losses = [e["lm loss"] for e in self.content["evaluations"] if e["set"] == "validation" and "lm loss" in e]
        if losses:
            self.content["final_loss"] = losses[-1]
            self.content["best_loss"] = min(losses)

    def _update(self) -> None:
        try:
            self.write()
        except OSError as error:
            self._trouble.begins(error, "training goes on, and the next update writes all of it")
        else:
            self._trouble.ends("nothing is missing")

    def write(self) -> None:
        """Write the file.

        Raises:
            OSError: it cannot be written.
        """
        self.content["updated"] = _now()
        write_json(self.path, self.content)


def writing[Result](directory: str, step: Callable[[], Result]) -> Result:
    """Return what `step`, which begins files in the metrics folder, returns.

    Raises:
        ConfigError: the folder cannot be written to. At the start of a run that is a mistake, not bad luck.
    """
    try:
        return step()
    except OSError as error:
        raise ConfigError(
            "--metrics-dir",
            directory,
            f"a folder for the metrics that can be written to ({error.strerror or error})",
            "make room, correct its permissions, or give another folder",
        ) from None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
