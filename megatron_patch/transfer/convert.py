"""What the conversion of a config reads, prints and writes."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_patch.config import Settings
from megatron_patch.errors import ConfigError
from megatron_patch.files.whole import write_text
from megatron_patch.files.yaml_flags import attributes, load_yaml
from megatron_patch.fit.found import NoOptimum
from megatron_patch.runs.read import read_trials
from megatron_patch.runs.wandb import WANDB_NOTE
from megatron_patch.theory.width import Role, multipliers
from megatron_patch.transfer.checks import Training
from megatron_patch.transfer.options import Options
from megatron_patch.transfer.plan import Conversion, plan_conversion
from megatron_patch.transfer.yaml_edit import edit

_FAN_INS = {
    "ffn_hidden_size": "linear_fc2",
    "kv_projection_size": "linear_proj",
}


@dataclass(frozen=True)
class ClassValue:
    """What one class of the target's parameters will be trained with."""

    role: Role
    layers: str
    m: float
    lr: float
    """Peak."""
    weight_decay: float


def convert(
    sweep: str, target: str, output: str, options: Options, *, proxy: str | None = None, as_json: bool = False
) -> Conversion:
    """Read a sweep and the target's config, write the tuned config, print what it will do, and return the plan.

    Args:
        sweep: folder of runs, or CSV file.
        target: YAML file of flags.
        output: YAML file to write; replaced if it exists.
        options: of the command line.
        proxy: YAML file of the proxy's flags, if given.
        as_json: print JSON instead of tables.

    Raises:
        ConfigError: a mistake in the arguments or files.
        NoOptimum: refused; nothing is written.
    """
    for name, path in (("target", target), ("proxy's config", proxy), ("sweep", sweep)):
        if path is not None and os.path.realpath(path) == os.path.realpath(output):
            raise ConfigError("--output", output, f"another file than the {name}", "choose another name")
    if os.path.isdir(output):
        raise ConfigError("--output", output, "a file name, and this is a folder", "add the name of the file")
    flags = load_yaml(target, "--target")
    trials = read_trials(sweep)
    proxy_flags = load_yaml(proxy, "--proxy") if proxy else None
    notes = (WANDB_NOTE,) if any(t.source.endswith(".wandb") for t in trials) else ()
    try:
        plan = plan_conversion(trials, flags, options, proxy_flags)
    except NoOptimum as error:
        if not notes:
            raise
        raise NoOptimum(error.reason, "; ".join((error.fix, *notes)), error.partial) from None
    plan = replace(plan, warnings=(*plan.warnings, *notes))
    with open(target, encoding="utf-8", newline="") as file:
        text = file.read()
    title = f"Added by megatron-patch transfer, from the sweep {' '.join(sweep.split())}:"
    new = edit(target, text, plan.changes, title, [f"Written by --force against: {text}" for text in plan.forced])
    if as_json:
        print(json.dumps(plan.as_json(), allow_nan=False))
    _write(output, new)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not as_json:
        _show(plan, output)
    return plan


def _write(path: str, text: str) -> None:
    try:
        write_text(path, text, durable=True)
    except OSError as error:
        raise ConfigError(
            "--output", path, "a file that can be written", f"choose another ({error.strerror})"
        ) from None


def classes(flags: Mapping[str, Any]) -> list[ClassValue]:
    """Return what a config gives each class of a GPT's parameters, by the width rule alone.

    Layers whose fan-in is the hidden size, the MLP's width, and heads times head size; the dry run
    (``python -m megatron_patch explain``) shows every parameter.
    """
    lr, decay = float(flags["lr"]), float(flags["weight-decay"])
    width = Settings.of(attributes(flags)).width
    hidden = float(flags["hidden-size"])
    m = hidden / (width.base_hidden_size or hidden)
    embedding_decay = width.embedding_weight_decay
    sizes = Training.of_flags(flags).values

    def value(role: Role, layers: str, m: float) -> ClassValue:
        factors = multipliers(
            width.scaling,
            role,
            m,
            vector_lr=(width.vector_lr or lr) / lr,
            embedding_weight_decay=None if embedding_decay is None else embedding_decay / (decay or 1),
            scale_output=width.scale_output_layer,
        )
        return ClassValue(role, layers, m, lr * factors.lr, decay * factors.weight_decay)

    found = [value("embedding", "embeddings", 1.0), value("vector", "gains, biases", 1.0)]
    by_m: dict[float, list[str]] = {m: ["fan-in hidden size"]}
    bases: dict[str, Any] = dict(width.base_dimensions)
    if flags.get("ffn-hidden-size") is None:  # at the proxy's width, too, it is what Megatron makes of this config
        at_base = Training.of_flags({**flags, "hidden-size": width.base_hidden_size}).values
        bases.setdefault("ffn_hidden_size", at_base.get("ffn_hidden_size"))
    for dimension, layer in _FAN_INS.items():
        base, size = bases.get(dimension), sizes.get(dimension)
        by_m.setdefault(float(size) / base if base and size else m, []).append(layer)
    found += [value("matrix", ", ".join(layers), own) for own, layers in by_m.items()]
    if flags.get("untie-embeddings-and-output-weights"):
        found.append(value("output", "LM head", m))
    return found


def _show(plan: Conversion, output: str) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"proxy of width {plan.base_hidden_size}: best LR {plan.lr:.4g} ({plan.spread}), "
        f"weight decay {plan.weight_decay:.4g}, expected loss {plan.loss:.4f}, from {plan.found.points} runs"
    )
    table = Table(title="What the target's parameters get, at the peak", title_justify="left")
    for column in ("class", "layers", "m", "lr", "weight decay"):
        table.add_column(column, justify="left" if column in ("class", "layers") else "right")
    for c in classes(plan.flags):
        table.add_row(c.role, c.layers, f"{c.m:g}", f"{c.lr:.5g}", f"{c.weight_decay:.5g}")
    console.print(table)
    changes = Table(title="Written", title_justify="left")
    for column in ("flag", "value", "from"):
        changes.add_column(column)
    for name, change in plan.changes.items():
        changes.add_row(name, str(change.value), change.source)
    console.print(changes)
    console.print(f"{output}: check it with  python -m megatron_patch explain --config {output}", markup=False)
