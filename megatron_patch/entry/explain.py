"""``python -m megatron_patch explain``: which parameter would get which LR, weight decay, eps and m, and why."""

import argparse
import bisect
import json
import math
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_patch.entry.exits import exit_code
from megatron_patch.entry.main import started_as
from megatron_patch.entry.run import (
    DEFAULT_SCRIPT,
    asked_for,
    did_you_mean,
    first_on_path,
    megatron_arguments,
    split_command_line,
)
from megatron_patch.errors import ConfigError
from megatron_patch.files.yaml_flags import load_yaml

if TYPE_CHECKING:
    from megatron_patch.entry.outlook import Outlook
    from megatron_patch.upstream.dry.coverage import Held
    from megatron_patch.upstream.dry.run import DryRun
    from megatron_patch.upstream.dry.schedule import Schedule

USAGE = """usage: {started} explain [--config FILE.yaml] [SCRIPT.py] [the same arguments as run]
           [--world-size N] [--rank R | --all-ranks] [--schedule] [--json] [--ignore-unknown]

A dry run on any machine, without GPUs or peers. Checks the arguments with Megatron's own validation, builds the model's
shard of one rank on the meta device, and shows which parameter gets which LR, weight decay and eps, and why.

  --world-size N  ranks of the run; default: the fewest that hold one copy of the model
  --rank R        whose shard to build; default 0
  --all-ranks     build one rank of every distinct position and prove that they hold every parameter exactly once
  --schedule      LR, extra warmup factor and predicted relative update at every step (a selection on the terminal)
  --json          JSON on standard output instead of tables
  --ignore-unknown   leave out flags that neither Megatron nor this package has: SCRIPT.py, which may, is never run
Example: {started} explain --config configs/target_70b_h100_bf16.yaml --world-size 512 --rank 37"""

SCHEDULE_ROWS = 24


def explain(argv: Sequence[str]) -> None:
    """Explain what ``python -m megatron_patch explain`` was given; exits with code 2 on a user's mistake."""
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE.format(started=started_as()))
        return
    if code := exit_code(lambda: _explain(argv)):
        sys.exit(code)


def own_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into the options of explain itself and the rest, which is that of run.

    Raises:
        ConfigError: a value that is no number, --rank beside --all-ranks, or a world of no ranks.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--rank", type=int)
    for name in ("--all-ranks", "--schedule", "--json", "--ignore-unknown"):
        parser.add_argument(name, action="store_true")
    plain_errors(parser)
    options, rest = parser.parse_known_args(argv)
    if options.world_size is not None and options.world_size < 1:
        raise ConfigError("--world-size", options.world_size, "a positive integer", "give the number of ranks")
    if options.all_ranks and options.rank is not None:
        raise ConfigError("--rank", options.rank, "no --rank beside --all-ranks", "drop one of the two")
    options.rank = options.rank or 0
    return options, rest


def plain_errors(parser: argparse.ArgumentParser, leave_out: str | None = None) -> None:
    """Make `parser` raise a ConfigError of one line where it would print its usage, which for Megatron is 900 lines.

    Args:
        parser: changed.
        leave_out: what leaves out a flag that only the script knows, in words.
    """

    def error(message: str) -> None:
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)[\s=]?(.*)", message):
            if not unknown[1].startswith("-"):
                raise ConfigError(unknown[1], "given", "a flag", "put the script first and a value behind its flag")
            value = unknown[2].partition(" --")[0] or "given"
            expected = "a flag of Megatron or of megatron_patch"
            if leave_out:
                expected += ": explain never runs SCRIPT.py, which may have its own"
            fixes = [did_you_mean(unknown[1], parser._option_string_actions), leave_out]
            fix = " ".join(fix for fix in fixes if fix) or "correct it, or drop it"
            raise ConfigError(unknown[1], value, expected, fix)
        flag, _, problem = message.removeprefix("argument ").partition(": ")
        got = re.search(r"(invalid (\w+) value|invalid choice): '([^']*)'(?: \(choose from (.*)\))?", problem)
        if got and got[4]:
            raise ConfigError(flag, got[3], f"one of {got[4]}", "choose one of them")
        if got:
            kind = {"int": "an integer", "float": "a number"}.get(got[2], f"a value of type {got[2]}")
            raise ConfigError(flag, got[3], kind, "correct the value")
        raise ConfigError(flag, "given", problem.removeprefix("expected "), "complete or correct it")

    parser.error = error  # type: ignore[method-assign, assignment]


def _explain(argv: Sequence[str]) -> None:
    options, rest = own_options(argv)
    path, script, command_line = split_command_line(rest)
    flags = load_yaml(path) if path else {}
    if script != DEFAULT_SCRIPT:
        first_on_path(script)  # the Megatron that the run would use
    # Only now: a mistake above should not take the seconds that torch and Megatron take to import.
    from megatron_patch.entry.outlook import outlook
    from megatron_patch.upstream.dry.machine import prepare_machine, quiet
    from megatron_patch.upstream.dry.run import dry_run
    from megatron_patch.upstream.dry.schedule import schedule

    def parser_of_explain(parser: argparse.ArgumentParser) -> None:
        plain_errors(parser, "--ignore-unknown leaves it out")

    def progress(done: int, total: int) -> None:
        if total > 1 and sys.stderr.isatty():
            print(f"\rrank {done + 1} of {total} ", end="\n" if done + 1 == total else "", file=sys.stderr, flush=True)

    with quiet():
        gpu = prepare_machine(asked_for("cpu", flags, command_line))
        from megatron_patch.upstream.patch import Session

        session = Session()
        try:
            dry = dry_run(
                megatron_arguments(path, flags, command_line, session, parser_of_explain),
                gpu=gpu,
                world_size=options.world_size,
                rank=options.rank,
                all_ranks=options.all_ranks,
                ignore_unknown=options.ignore_unknown,
                progress=progress,
            )
            steps = schedule(dry.args, dry.groups)
        finally:
            session.remove()
    future = outlook(dry, steps)
    shown = steps if options.schedule else None
    if options.json:
        # A schedule of half a million lines is for programs.
        print(json.dumps(content(dry, shown, future), indent=None if options.schedule else 1))
    else:
        show(dry, shown, future)


# --- JSON ------------------------------------------------------------------------------------------------------------


def content(dry: "DryRun", steps: "Schedule | None", future: "Outlook") -> dict[str, Any]:
    """Return what --json prints; the schedule only where `steps` are given."""
    found: dict[str, Any] = {
        "rule": dry.table["rule"],
        "exponents": dry.table["exponents"],
        "base": dry.table["base"],
        "parameters": [dict(held.values) for held in dry.parameters],
        "groups": groups(dry.parameters),
    }
    if steps is not None:
        found["schedule"] = [
            {"step": t, "lr_factor": factor, "lr": lr, "relative_update_prediction": update}
            for t, factor, lr, update in zip(steps.times, steps.factor, steps.lr, _updates(steps, future), strict=True)
        ]
    found["warnings"] = [*future.warnings, *dry.notes]
    return found


def _updates(steps: "Schedule", future: "Outlook") -> Sequence[float | None]:
    return future.relative_updates or [None] * len(steps.lr)


def groups(parameters: Sequence["Held"]) -> list[dict[str, Any]]:
    """Return the parameters grouped by class, m and hyperparameters, with the numbers of tensors and of weights.

    Weights are counted in the whole model's shapes, also where this rank holds a slice.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for held in parameters:
        names = ("class", "m", "lr", "weight_decay", "eps", "optimizer")
        key = tuple(held.values[name] for name in names)
        group = found.setdefault(key, dict(zip(names, key, strict=True)) | {"parameters": 0, "numel": 0})
        group["parameters"] += 1
        group["numel"] += math.prod(held.spec.shape)
    return [found[key] for key in sorted(found, key=lambda key: (*key[:4], key[4] or 0.0, key[5]))]


# --- terminal --------------------------------------------------------------------------------------------------------


def show(dry: "DryRun", steps: "Schedule | None", future: "Outlook") -> None:
    """Print tables and warnings."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    unlimited = console.options.update(width=400)
    a, b = dry.table["exponents"]
    base = ", ".join(f"{name} {size}" for name, size in dry.table["base"].items() if size is not None)
    console.print(f"[bold]{dry.seen}[/bold]")
    console.print(f"rule {dry.table['rule']} ({dry.table['source']}): lr{_power(-a)}, weight decay{_power(b)}")
    console.print(f"base: {base or 'none'}; --lr {dry.args.lr:g}, --weight-decay {dry.args.end_weight_decay:g}")

    def table(title: str, rows: Sequence[Sequence[str]], *columns: str) -> None:
        found = Table(title=title, title_justify="left", title_style="bold")
        for column in columns:
            text = column in ("class", "parameter", "why")
            found.add_column(column, justify="left" if text else "right", no_wrap=True)
        for row in rows:
            found.add_row(*map(escape, row))
        # As wide as it needs to be, also in a narrower terminal: a number that is cut off helps nobody.
        console.width = max(console.width, console.measure(found, options=unlimited).maximum)
        console.print(found)

    rows = []
    several = dry.args.optimizer not in ("adam", "sgd")
    for g in groups(dry.parameters):
        numbers = (g["m"], g["lr"], g["weight_decay"], g["lr"] * g["weight_decay"])
        eps = "-" if g["eps"] is None else f"{g['eps']:.5g}"
        trainer = [g["optimizer"]] if several else []
        counted = (f"{g['parameters']:,}", f"{g['numel']:,}")
        rows.append([g["class"], *(f"{x:.5g}" for x in numbers), eps, *trainer, *counted])
    columns = ("class", "m", "lr", "weight decay", "lr * wd", "eps", *["optimizer"] * several, "tensors", "weights")
    table("What each class is trained with, at the peak", rows, *columns)
    columns = ("parameter", "number", "shape", "class", "m", "lr", "weight decay", "why")
    table("Each parameter", _parameter_rows(dry), *columns)
    if steps is not None:
        updates = _updates(steps, future)
        rows = [
            [
                str(steps.times[i]),
                f"{steps.factor[i]:.4g}",
                f"{steps.lr[i]:.4g}",
                "-" if updates[i] is None else f"{updates[i]:.3g}",
            ]
            for i in selection(steps.times, SCHEDULE_ROWS, steps.lr.index(max(steps.lr)))
        ]
        table(f"Schedule ({steps.steps:,} steps)", rows, "step", "factor", "lr at m = 1", "relative update")
    for line in future.facts:
        console.print(escape(line))
    for line in [*future.warnings, *dry.notes]:
        console.print(f"[yellow]warning:[/yellow] {escape(line)}")


def _power(exponent: float) -> str:
    return f" * m^{exponent:g}" if exponent else ""


def selection(times: Sequence[int], rows: int, also: int) -> list[int]:
    """Return the places of `rows` steps, or all, evenly spaced, the first and the last among them, and one more.

    >>> selection(range(1000), 5, 100)
    [0, 100, 250, 500, 749, 999]
    >>> selection([0, 2, 9], 5, 1)
    [0, 1, 2]
    """
    if len(times) <= rows:
        return list(range(len(times)))
    evenly = (round(i * times[-1] / (rows - 1)) for i in range(rows))
    return sorted({also, *(bisect.bisect_left(times, t) for t in evenly)})


def _parameter_rows(dry: "DryRun") -> list[list[str]]:
    """One row for the parameters that differ in layer or expert number only."""
    alike: dict[tuple[str, ...], int] = {}
    for held in dry.parameters:
        v = held.values
        name = re.sub(r"(layers|local_experts)\.\d+\.", r"\1.*.", v["name"])
        name = re.sub(r"(experts\..*\.(?:weight|bias))\d+$", r"\1*", name)
        shape = " x ".join(map(str, v["shape"]))
        row = (name, shape, v["class"], f"{v['m']:g}", f"{v['lr']:.5g}", f"{v['weight_decay']:.5g}", why(held, dry))
        alike[row] = alike.get(row, 0) + 1
    return [[row[0], str(number), *row[1:]] for row, number in alike.items()]


def why(held: "Held", dry: "DryRun") -> str:
    """Return in a few words where a parameter's LR and weight decay come from."""
    width, spec, rule = dry.settings.width, held.spec, dry.settings.width.scaling
    if spec.role in ("embedding", "vector"):
        lr = "--vector-lr" if width.vector_lr is not None else "base lr"
        if spec.role == "embedding" and width.embedding_weight_decay is not None:
            return f"{lr}, --embedding-weight-decay"
        return f"{lr}, {'base decay' if held.values['weight_decay'] else 'no decay'}"
    named = f" ({spec.dimension})" if spec.dimension else ""
    unknown = " (unknown layer: ratio of the hidden sizes)"
    origin = f"fan-in {spec.fan_in} / {spec.base_fan_in:g}{unknown if held.assumed else named}"
    if width.mup_alone:
        return f"{origin}, Megatron's --use-mup" if spec.role == "matrix" else "not scaled by Megatron's --use-mup"
    if dry.table["rule"] == "none" or (spec.role == "output" and not width.scale_output_layer):
        return "base lr, base decay"
    if held.values["optimizer"] == "muon" and rule.follows_updates:
        base_fan_out = spec.shape[0] if spec.base_fan_out is None else spec.base_fan_out
        factors = f"lr * {held.values['lr'] / dry.args.lr:.4g}"
        if held.values["weight_decay"]:
            factors += f", wd * {held.values['weight_decay'] / dry.args.end_weight_decay:.4g}"
        return f"{spec.shape[0]} x {origin}, base fan-out {base_fan_out:g}, {width.optimizer.muon_scale}: {factors}"
    decay = "wd" + _power(rule.wd_exponent) if held.values["weight_decay"] else "no decay"
    return f"{origin}: lr{_power(-rule.lr_exponent)}, {decay}"
