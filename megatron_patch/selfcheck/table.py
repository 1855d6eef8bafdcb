"""The lines of the table: which there are on a machine, which runs each needs, and why the others are left out."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.selfcheck import verdicts
from megatron_patch.selfcheck.runs import FP8, LAYOUTS, Machine, Spec, runs_of
from megatron_patch.selfcheck.verdicts import Verdict

FP32_LOSSES = 1e-4
BF16_LOSSES = 2e-2
FP8_LOSSES = 5e-2
TF32_LOSSES = 1e-2
"""Transformer Engine multiplies fp32 matrices in TF32."""
METRICS = {"fp32": 1e-5, "bf16": 1e-5, "fused": 1e-4, "fp8": 1e-4}
"""By what a run multiplies. `fused`: where the norm's output is worked out anew, an entry may be rounded otherwise."""


@dataclass(frozen=True)
class Row:
    """A line to be judged."""

    name: str
    compared: str
    needs: tuple[str, ...]
    """Names of runs."""
    judge: Callable[..., Verdict]
    """From their results, in that order."""
    skip: str = ""
    """Why it is left out."""


def rows_of(machine: Machine) -> list[Row]:
    """Return every line, in the order of the table; what this machine cannot do is there with the reason."""
    rows = [*_same(machine), *_rules(machine), *_metrics(machine), *_cost(machine), *_rest(machine)]
    return [_possible(row, machine, runs_of(machine)) for row in rows]


def _possible(row: Row, machine: Machine, specs: Sequence[Spec]) -> Row:
    known = {spec.name for spec in specs}
    absent = [name for name in row.needs if name not in known]
    if row.skip or not absent:
        return row
    return Row(row.name, row.compared, row.needs, row.judge, why_not(absent[0], machine))


def why_not(run: str, machine: Machine) -> str:
    """Return why a run is not made on a machine."""
    if run in LAYOUTS and (not machine.gpus or machine.te):
        return "left out by --quick" if not machine.gpus else "needs two GPUs"
    if not machine.gpus:
        return "needs a GPU"
    if run.startswith("fp8-"):
        recipe = "delayed" if run == "fp8-param-gather" else run.removeprefix("fp8-")
        return machine.fp8.get(recipe) or "not on this machine"
    return "needs Transformer Engine" if not machine.te else "not on this machine"


def _same(machine: Machine) -> list[Row]:
    def within(bound: float) -> Callable[[Any, Any], Verdict]:
        return lambda a, b: verdicts.same_losses(a, b, bound)

    steps = machine.size.steps
    rows = [
        Row("same/cpu-gpu", f"{steps} losses: fp32 on CPU, fp32 on GPU (local spec)", ("cpu-fp32", "fp32"),
            within(FP32_LOSSES)),
        Row("same/te", "losses: local spec, Transformer Engine's, fp32 (TE's products in TF32)", ("fp32", "te-fp32"),
            within(TF32_LOSSES)),
        Row("same/fused", "losses: fp32, bf16 with compiled kernels (local spec)", ("fp32", "fused"),
            within(BF16_LOSSES)),
        Row("same/bf16", "losses: fp32, bf16", ("fp32", "bf16"), within(BF16_LOSSES)),
    ]  # fmt: skip
    for recipe in FP8:
        title = f"losses: bf16, FP8 ({recipe})"
        rows.append(Row(f"same/fp8-{recipe}", title, ("bf16", f"fp8-{recipe}"), within(FP8_LOSSES)))
    return rows


def _rules(machine: Machine) -> list[Row]:
    rows = []
    for name, what in {
        "fp32": "Adam on fp32 weights",
        "bf16": "distributed optimizer, bf16",
        "precision-aware": "precision-aware optimizer",
        "fp8-param-gather": "--fp8-param-gather",
    }.items():
        rows += [
            Row(f"rules/{name}/rates", f"LR and weight decay of every parameter and step, {what}: by hand", (name,),
                lambda run: verdicts.live_rates(run, machine.size)),
            Row(f"rules/{name}/decay", f"shrinkage of weights without gradients, {what}: eta * lambda", (name,),
                lambda run: verdicts.shrunk(run, machine.size)),
        ]  # fmt: skip
    return rows


def _metrics(machine: Machine) -> list[Row]:
    def exact(bound: float) -> Callable[[Any], Verdict]:
        return lambda run: verdicts.exact_metrics(run, bound)

    fused = METRICS["fused"] if machine.gpus else METRICS["bf16"]
    norms = ", fused norms" if machine.te else ""
    grouped = "grouped experts" if machine.te else "experts"
    rows = [
        Row("metrics/fp32", "every metric of every layer, fp32: float64", ("fp32",), exact(METRICS["fp32"])),
        Row("metrics/bf16", f"every metric of every layer, bf16{norms}: float64", ("bf16",), exact(fused)),
        Row("metrics/fused", "the same with compiled and fused kernels (local spec): float64", ("fused",),
            exact(METRICS["bf16"])),
        Row("metrics/experts", f"the same with {grouped}: float64", ("experts",), exact(fused)),
    ]  # fmt: skip
    for recipe in FP8:
        title = f"every metric of every layer, FP8 ({recipe}), of the weights before quantisation: float64"
        rows.append(Row(f"metrics/fp8-{recipe}", title, (f"fp8-{recipe}",), exact(METRICS["fp8"])))
    for name in ("bf16", *(f"fp8-{recipe}" for recipe in FP8)):
        bound = 1e-2 if name == "bf16" else 1e-1
        rows.append(Row(f"metrics/product/{name}", f"norm of what the layers multiplied, {name}: of W X in float64",
            (name,), lambda run, bound=bound: verdicts.actual_product(run, bound)))  # fmt: skip
    return rows


def _cost(machine: Machine) -> list[Row]:
    on, metrics, spectral = (1.02, 1.02, 1.10) if machine.gpus and not machine.quick else (1.25, 1.5, 2.5)

    def of(what: str, bound: float) -> Callable[[Any], Verdict]:
        return lambda run: verdicts.cost(run, what, bound)

    return [
        Row("cost/on", "step with the patch, metrics off: without the patch", ("cost",), of("on", on)),
        Row("cost/metrics", "steps with metrics at interval 10: without the patch", ("cost",), of("metrics", metrics)),
        Row("cost/spectral", "steps with metrics and singular values at interval 10: without the patch", ("cost",),
            of("spectral", spectral)),
        Row("cost/syncs", "waits of the host in a measured step: in a plain one, plus one", ("cost",),
            lambda run: verdicts.host_syncs(run, "metrics", 1.0)),
        Row("cost/syncs-spectral", "the same with singular values, which look at their bound", ("cost",),
            lambda run: verdicts.host_syncs(run, "spectral", None)),
        Row("cost/memory", "peak memory of a measured step: of a plain one", ("cost",),
            lambda run: verdicts.peak_memory(run, 1.25), "" if machine.gpus else "needs a GPU"),
        Row("cost/collectives", "part of the traced steps in collectives", ("cost",), verdicts.collectives),
    ]  # fmt: skip


def _rest(machine: Machine) -> list[Row]:
    uninterrupted = "saved" if machine.gpus else "fp32"
    deterministic = ", deterministic kernels" if machine.gpus else ""
    loose = BF16_LOSSES if machine.gpus else FP32_LOSSES
    rows = [
        Row("resume", f"losses, weights and metrics after a resume{deterministic}: of the uninterrupted run",
            (uninterrupted, "resumed"), verdicts.bit_exact),
        Row("graphs/metrics", "CUDA graphs with metrics: refused", ("graphs-and-metrics",),
            lambda run: verdicts.refused(run, "--cuda-graph-impl")),
        Row("graphs/rule", "losses with CUDA graphs, rule alone: without graphs", ("graphs", "bf16"),
            lambda a, b: verdicts.same_losses(a, b, BF16_LOSSES)),
    ]  # fmt: skip
    for name in LAYOUTS:
        one = "experts" if name == "ep2" else "bf16" if machine.gpus else "fp32"
        rows += [
            Row(f"parallel/{name}", f"losses on two ranks, {name}: on one", (one, name),
                lambda a, b: verdicts.same_losses(a, b, loose)),
            Row(f"parallel/{name}/metrics", f"lines and weights on two ranks, {name}: on one", (one, name),
                lambda a, b: verdicts.same_metrics(a, b, loose)),
        ]  # fmt: skip
    return rows


def chosen(rows: Sequence[Row], pattern: str | None) -> list[Row]:
    """Return the lines with those that a pattern does not find marked as left out."""
    if pattern is None:
        return list(rows)
    return [
        row if row.skip or re.search(pattern, row.name)
        else Row(row.name, row.compared, row.needs, row.judge, "left out by --only")
        for row in rows
    ]  # fmt: skip


def needed(specs: Sequence[Spec], rows: Sequence[Row]) -> list[Spec]:
    """Return the runs that lines need, and those that these go on from."""
    names = {name for row in rows if not row.skip for name in row.needs}
    names |= {spec.after for spec in specs if spec.name in names}
    return [spec for spec in specs if spec.name in names]


def judge(row: Row, results: Mapping[str, Any]) -> Verdict | None:
    """Return what came out of a line; None while a run that it needs has not ended.

    A run that has failed fails the line, and so does whatever goes wrong in judging it.
    """
    if any(name not in results for name in row.needs):
        return None
    for name in row.needs:
        if "error" in results[name]:
            return Verdict(None, 0.0, f"run {name}: {results[name]['error']}")
    try:
        return row.judge(*(results[name] for name in row.needs))
    except Exception as error:
        return Verdict(None, 0.0, f"{type(error).__name__}: {error}")
