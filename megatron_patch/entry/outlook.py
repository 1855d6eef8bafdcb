"""What theory says about a run before it starts: predicted relative updates, and warnings that follow from them.

Predictions are the weight-norm model's (`megatron_patch.theory.equilibrium`), for the largest matrix of the model and
its counterpart in the base model, each from its own initial weights.
"""

import bisect
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.config.pattern import depth
from megatron_patch.errors import ConfigError
from megatron_patch.files.run_json import RUN_JSON, RunJson
from megatron_patch.theory.equilibrium import momentum_update_rms, steps_to_equilibrium, trajectory_of_stretches
from megatron_patch.theory.updates import accumulated_update_rms, update_rms
from megatron_patch.upstream.dry.coverage import Held
from megatron_patch.upstream.dry.run import DryRun
from megatron_patch.upstream.dry.schedule import Schedule

LARGEST_UPDATE = 0.5
"""A predicted relative update above it is an LR at the upper edge: half of a matrix replaced in one step. assumed"""
SMALLEST_MOVE = 0.1
"""Updates that add up to less than this part of the initial weights are an LR at the lower edge. assumed"""
AGREEMENT = 0.1
"""Relative difference to the base model's relative update above which it is worth a warning. assumed"""
END = 0.995
"""Part of the run at which its end is predicted: after it a schedule that decays to 0 makes predictions meaningless."""


@dataclass(frozen=True)
class Outlook:
    """What `outlook` returns."""

    relative_updates: Sequence[float]
    """Predicted ‖dW‖/‖W‖ of the largest matrix at every step of the schedule; empty where nothing can be predicted."""
    facts: tuple[str, ...]
    """Predictions in words."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """One matrix-like parameter with what the weight-norm model needs to know of it."""

    role: str
    m: float
    size: int
    lr: float
    """Peak."""
    weight_decay: float
    rms: float
    """RMS of its initial entries."""
    base_rms: float
    """The same in the base model."""
    update_rms: float = 1.0
    """b, by which the optimizer's updates let the weights grow; that of one step is smaller by the momentum's part."""
    base_update_rms: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.role} (m = {self.m:g})"


def outlook(dry: DryRun, steps: Schedule) -> Outlook:
    """Predict relative updates along the schedule and collect the warnings.

    Raises:
        ConfigError: --reference-run has no readable run.json.
    """
    matrices = largest_of_each_group(dry)
    warnings = [*product(dry, matrices), *megatrons_mup(dry, matrices), *floor(dry), *shapes(dry), *unknown_layers(dry)]
    if not matrices or not steps.lr:
        return Outlook((), (), tuple(warnings))
    if dry.args.optimizer not in ("adam", "sgd", "muon"):
        note = f"no prediction of relative updates: how far {dry.args.optimizer} lets weights grow is not known"
        return Outlook((), (note,), tuple(warnings))
    warnings += slow_equilibrium(matrices, steps.steps)
    largest = max(matrices, key=lambda matrix: (matrix.role == "matrix", matrix.size))
    lrs, decays = steps.groups[largest.lr, largest.weight_decay]
    base_lrs = [lr / factor for lr, factor in zip(steps.lr, steps.factor, strict=True)]
    strongest = max(
        lr * decay for a, b in ((lrs, decays), (base_lrs, steps.weight_decay)) for lr, decay in zip(a, b, strict=True)
    )
    if strongest >= 1:
        warnings.append(
            f"LR at its upper edge: lr * weight decay reaches {strongest:.3g}, and 1 wipes out the weights in one "
            "step; lower --lr or --weight-decay"
        )
        return Outlook((), (), tuple(warnings))
    times = steps.times
    schedule, base_schedule = [*zip(lrs, decays, strict=True)], [*zip(base_lrs, steps.weight_decay, strict=True)]
    course = trajectory_of_stretches(times, schedule, largest.rms, largest.update_rms)
    run = [step.relative_update for step in course]
    base = [*trajectory_of_stretches(times, base_schedule, largest.base_rms, largest.base_update_rms)]
    warnings += edges(largest, lrs, run, steps)
    warnings += implicit_warmup(dry, largest, base_lrs, steps, [step.rho for step in base])
    at = bisect.bisect_right(times, max(0, math.ceil(END * steps.steps) - 1)) - 1
    warnings += different_end(largest, run[at], base[at].relative_update, times[at])
    return Outlook(run, (_prediction(dry, largest, run, at, times),), tuple(warnings))


def largest_of_each_group(dry: DryRun) -> list[Matrix]:
    """Return the largest matrix and the LM head for each pair of LR and weight decay."""
    found: dict[tuple[str, float, float], Matrix] = {}
    for held in dry.parameters:
        if held.spec.role in ("matrix", "output"):
            matrix = _matrix(held, dry)
            key = matrix.role, matrix.lr, matrix.weight_decay
            if key not in found or matrix.size > found[key].size:
                found[key] = matrix
    return list(found.values())


def _matrix(held: Held, dry: DryRun) -> Matrix:
    spec, args = held.spec, dry.args
    if dry.settings.width.init_scaling == "fan-in":
        rms, base_rms = 1 / math.sqrt(spec.fan_in), 1 / math.sqrt(spec.base_fan_in)
    else:
        # Megatron's constant std, smaller for the layers that write to the residual stream.
        rms = args.init_method_std
        if re.search(r"\.(linear_(fc2|proj)|mixer\.out_proj)\.", spec.name):
            rms /= math.sqrt(2 * (depth(vars(args)) or 1))
        base_rms = rms
        if args.use_mup:
            rms /= math.sqrt(spec.m)
    lr, weight_decay = held.values["lr"], held.values["weight_decay"]
    b = base_b = 1.0
    if held.values["optimizer"] == "muon":
        scale, fan_out = dry.settings.width.optimizer.muon_scale, spec.shape[0]
        b = base_b = args.muon_extra_scale_factor * accumulated_update_rms(args.muon_momentum)
        b *= update_rms(scale, fan_out, spec.fan_in)
        base_b *= update_rms(scale, spec.base_fan_out or fan_out, spec.base_fan_in)
    return Matrix(spec.role, spec.m, math.prod(spec.shape), lr, weight_decay, rms, base_rms, b, base_b)


# --- from the numbers alone ------------------------------------------------------------------------------------------


def product(dry: DryRun, matrices: Sequence[Matrix]) -> Iterator[str]:
    """eta*lambda, which sets the relative updates of the long run, changes with width."""
    a, b = dry.table["exponents"]
    widest = max((matrix.m for matrix in matrices), key=lambda m: abs(math.log(m)), default=1.0)
    if widest == 1 or not dry.args.end_weight_decay:
        return
    rule = dry.table["rule"]
    if rule == "no-decay":
        yield "--width-scaling no-decay: there is no equilibrium; relative updates go on falling, as 1/sqrt(steps)"
    elif rule != "none" and a != b:
        yield (
            f"--width-scaling {rule}: lr * weight decay goes as m^{b - a:g}, {widest ** (b - a):.3g} of the base "
            f"model's at m = {widest:g}, and relative updates in equilibrium as m^{(b - a) / 2:g}; independent and "
            "sqrt keep both"
        )


def megatrons_mup(dry: DryRun, matrices: Sequence[Matrix]) -> Iterator[str]:
    """--use-mup without a rule of ours."""
    widest = max((matrix.m for matrix in matrices), default=1.0)
    if dry.settings.width.mup_alone and widest != 1:
        yield (
            "--use-mup alone is the rule standard: Megatron divides LR and eps by m and leaves the weight decay, so "
            f"lr * weight decay goes as m^-1, {1 / widest:.3g} of the base model's at m = {widest:g}; add "
            f"--width-scaling independent --base-hidden-size {dry.args.mup_base_hidden_size} to keep it constant"
        )


def floor(dry: DryRun) -> Iterator[str]:
    """--min-lr as typed is above the peak LR of a class."""
    below: dict[float, Held] = {}
    for held in dry.parameters:
        if held.values["lr"] < (dry.args.min_lr or 0.0):
            below.setdefault(held.values["lr"], held)
    for lr, held in sorted(below.items()):
        scaled = dry.args.min_lr * lr / dry.args.lr
        yield (
            f"--min-lr {dry.args.min_lr:g} is above the peak LR {lr:.4g} of {held.spec.role} (m = {held.spec.m:g}): "
            f"it is no floor for all, but scaled like the LR, here to {scaled:.4g}"
        )


def shapes(dry: DryRun) -> Iterator[str]:
    """The base model has, or must have, another head size or depth: a rule for width says nothing about these."""
    args = dry.args
    head = args.v_head_dim if args.multi_latent_attention else args.kv_channels
    projections = {h.spec.base_fan_in for h in dry.parameters if h.spec.dimension == "kv_projection_size"}
    for size in sorted(projections):
        if size % head:
            yield (
                f"head size: the base model's heads times head size is {size:g}, no multiple of this model's head size "
                f"{head}, so its heads are of another size; keep the head size when changing width "
                "(--base-kv-projection-size says what it is)"
            )
    reference = _reference(args)
    for label, theirs, ours in (
        ("head size", reference.get("kv_channels"), args.kv_channels),
        ("depth", depth(reference), depth(vars(args))),
    ):
        if theirs is not None and theirs != ours:
            yield (
                f"{label}: the base model of --reference-run has {theirs:g}, this one {ours:g}; the rules transfer "
                "across width alone"
            )


def _reference(args: Any) -> dict[str, Any]:
    """Return the arguments of the proxy's run, where --reference-run names it."""
    folder = getattr(args, "reference_run", None)
    if not folder:
        return {}
    try:
        return RunJson.read(os.path.join(folder, RUN_JSON)).arguments
    except (OSError, ValueError) as error:
        raise ConfigError(
            "--reference-run", folder, "the metrics folder of a run, with a run.json", f"check the path ({error})"
        ) from None


def unknown_layers(dry: DryRun) -> Iterator[str]:
    """Layers whose fan-in no rule knows."""
    names = [held.spec.name for held in dry.parameters if held.assumed]
    if names and dry.table["rule"] != "none":
        yield (
            f"{len(names)} parameters are of layers this package does not know, {names[0]} for one; their m is assumed "
            "to be the ratio of the hidden sizes"
        )


def slow_equilibrium(matrices: Sequence[Matrix], steps: int) -> Iterator[str]:
    """T_EQ, the time to come within sqrt(2) of the equilibrium weight norm, exceeds the run."""
    times = [
        (steps_to_equilibrium(matrix.rms, matrix.lr, matrix.weight_decay, matrix.update_rms), matrix.name)
        for matrix in matrices
        if 0 < matrix.lr * matrix.weight_decay < 1
    ]
    longest, name = max(times, key=lambda entry: entry[0], default=(0.0, ""))
    if longest > steps:
        yield (
            f"T_EQ is longer than the run: {name} needs about {longest:,.0f} steps at the peak LR to come within a "
            f"factor sqrt(2) of its equilibrium norm, and the run has {steps:,}; until then its relative updates "
            "depend on its initial weights"
        )


# --- along the schedule ----------------------------------------------------------------------------------------------


def edges(matrix: Matrix, lrs: Sequence[float], updates: Sequence[float], steps: Schedule) -> Iterator[str]:
    """An LR so large that a step replaces the weights, or so small that the whole run leaves them where they were."""
    top = max(updates)
    if top > LARGEST_UPDATE:
        yield (
            f"LR at its upper edge: the update of {matrix.name} at step {steps.times[updates.index(top)]:,} is "
            f"predicted to be {top:.2g} of the weights themselves; lower --lr or lengthen the warmup"
        )
    moved = math.sqrt(sum(length * lr**2 for length, lr in zip(steps.lengths(), lrs, strict=True)))
    moved *= matrix.update_rms / matrix.rms
    if moved < SMALLEST_MOVE:
        yield (
            f"LR at its lower edge: all updates of {matrix.name} together are predicted to be {moved:.2g} of its "
            "initial weights; raise --lr or train longer"
        )


def implicit_warmup(
    dry: DryRun, matrix: Matrix, base_lrs: Sequence[float], steps: Schedule, base_rho: Sequence[float]
) -> Iterator[str]:
    """Relative updates start lower, beside the base model's, than they end: eq. 38 of arXiv 2510.19093.

    For independent scaling of a model that starts with the base model's RMS the ratio goes from 1/m to 1; where the
    rule changes eta*lambda it ends at the square root of that change, by which it is divided here.
    """
    lr, decay = matrix.lr / dry.args.lr, matrix.weight_decay / (dry.args.end_weight_decay or 1.0)
    grows = matrix.update_rms / matrix.base_update_rms
    if matrix.m == 1 or not matrix.weight_decay or (lr, decay) == (1.0, 1.0):
        return
    plain = [(eta * lr, weight * decay) for eta, weight in zip(base_lrs, steps.weight_decay, strict=True)]
    rho = [step.rho for step in trajectory_of_stretches(steps.times, plain, matrix.rms, matrix.update_rms)]
    ratios = [lr * grows * theirs / ours / math.sqrt(lr * decay) for theirs, ours in zip(base_rho, rho, strict=True)]
    below = [t for t, ratio in enumerate(ratios) if ratio < math.sqrt(0.5)]
    if not below:
        return
    length = f"longer than the run's {steps.steps:,} steps"
    if below[-1] < len(ratios) - 1:
        length = f"about {steps.times[below[-1]] + 1:,} of the run's {steps.steps:,} steps"
    also = f", on top of --extra-warmup {dry.settings.warmup.kind}" if dry.settings.warmup.active else ""
    rule = "standard" if dry.table["rule"] == "none" else dry.table["rule"]
    yield (
        f"the implicit warmup of {rule} scaling lasts {length} (equilibrium model, eq. 38): the relative update of "
        f"{matrix.name} over the base model's starts at {ratios[0]:.3g} of what it settles at, and is within a factor "
        f"sqrt(2) of it then{also}"
    )


def different_end(matrix: Matrix, run: float, base: float, at: int) -> Iterator[str]:
    """The relative update at the end of the run is not the base model's."""
    if base > 0 and abs(run / base - 1) > AGREEMENT:
        yield (
            f"relative update predicted at the end (step {at:,}): {run:.3g} for {matrix.name}, {base:.3g} for the base "
            f"model under the same schedule, a ratio of {run / base:.3g}"
        )


def _prediction(dry: DryRun, matrix: Matrix, updates: Sequence[float], at: int, times: Sequence[int]) -> str:
    top, end = max(updates), updates[at]
    args = dry.args
    name, beta, symbol = "AdamW", args.adam_beta1, "beta1"
    if args.optimizer == "muon" and matrix.role == "matrix":
        name, beta, symbol = "Muon", args.muon_momentum, "momentum"
    noise = momentum_update_rms(beta)  # of Muon's, 1 over `accumulated_update_rms`, which is the same number
    return (
        f"predicted relative update of {matrix.name}: {top:.3g} at its largest (step {times[updates.index(top)]:,}), "
        f"{end:.3g} at the end (step {times[at]:,}); one measured {name} step shows {noise:.2g} of that where the "
        f"gradient is mostly noise ({symbol} {beta:g})"
    )
