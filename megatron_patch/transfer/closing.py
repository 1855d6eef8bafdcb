"""The last words of a sweep: the optimum of every curve, what is wrong with it, and the next command to type."""

import shlex
from collections.abc import Sequence

from megatron_patch.fit.curves import Curve, Study, grouped, is_sweep, setting, study
from megatron_patch.runs.trial import Trial


def closing(trials: Sequence[Trial], sweep: str, output: str) -> list[str]:
    """Return what to print at the end of a sweep.

    A line for every curve (a rule at a width, with one weight decay, vector LR and length), the narrowest first; then
    the commands that come next. Losses of different widths are not compared: the wider model has the lower one.

    Args:
        trials: those that finished or diverged.
        sweep: path of the sweep file.
        output: folder of the sweep.
    """
    if not trials:
        return []
    if not is_sweep(trials):
        return _next([f"megatron-patch report {shlex.quote(output)} --output {_in(output, 'report.html')}"])
    studies = [study(members) for members in grouped(trials, setting).values()]
    studies.sort(key=lambda s: (s.setting.weight_decay or 0.0, s.setting.vector_lr or 0.0, s.setting.steps or 0))
    curves = [(s, name, curve) for s in studies for name, curve in _distinct(s)]
    lines = [_line(curve, name, s, len(studies) > 1) for s, name, curve in curves]
    commands = []
    if any(curve.optimum is None for _, _, curve in curves):
        commands.append(
            f"megatron-patch sweep {shlex.quote(sweep)} --resume   # with what the lines above miss added to {sweep}"
        )
    if any(curve.optimum and curve.hidden_size == s.base_hidden_size for s, _, curve in curves):
        commands.append(
            f"megatron-patch transfer --sweep {shlex.quote(output)} --target TARGET.yaml --output tuned.yaml"
            "   # TARGET.yaml: the wide one"
        )
    commands.append(f"megatron-patch report {shlex.quote(output)} --output {_in(output, 'report.html')}")
    return [*lines, *_next(commands)]


def _in(output: str, name: str) -> str:
    return shlex.quote(f"{output}/{name}")


def _next(commands: Sequence[str]) -> list[str]:
    return ["next:", *(f"  {command}" for command in commands)]


def _distinct(s: Study) -> list[tuple[str, Curve]]:
    """Return every curve once, the narrowest first, with its rules: at the base width several may share one."""
    names: dict[int, list[str]] = {}
    found: dict[int, Curve] = {}
    for (name, _), curve in s.curves.items():
        names.setdefault(id(curve), []).append(name)
        found[id(curve)] = curve
    order = sorted(found, key=lambda key: (found[key].hidden_size, names[key]))
    return [(", ".join(names[key]), found[key]) for key in order]


def _line(curve: Curve, name: str, s: Study, several: bool) -> str:
    where = f"width {curve.hidden_size} ({name}{f'; {s.setting.text}' if several else ''})"
    best = curve.optimum
    if best is None:
        measured = [p for p in curve.points if p.loss == curve.best]
        lowest = f"; lowest measured: {measured[0].loss:.4f} at LR {measured[0].lr:.4g}" if measured else ""
        return f"{where}: no optimum: {curve.refusal}{lowest}"
    dropped = ", ".join(f"{t.loss:.4g} at LR {t.lr:.4g}" for t in best.dropped)
    left_out = f"; left out, since they do not fit the others: {dropped}" if dropped else ""
    low, high = 2**best.low, 2**best.high
    return (
        f"{where}: best LR {best.lr:.4g} (90% interval {low:.4g} to {high:.4g}), expected loss {best.loss:.4f}, "
        f"from {best.points} runs{left_out}"
    )
