"""What the lines of the table compare: from the results of runs to a figure, its bound and a remark."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_patch.selfcheck.cost import added_syncs, ratios
from megatron_patch.selfcheck.sizes import ZEROED, Size

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What came out of a line."""

    figure: float | None
    bound: float | None
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure is a number and within its bound; a line without a bound only says its figure."""
        if self.bound is None:
            return self.figure is None or math.isfinite(self.figure)
        return self.figure is not None and math.isfinite(self.figure) and self.figure <= self.bound


class Missing(Exception):
    """A run has ended and left out what a line needs."""


def same_losses(one: Result, other: Result, bound: float) -> Verdict:
    """Compare the losses of two runs at every step that both made: the largest relative difference."""
    a, b = one["losses"], other["losses"]
    steps = sorted(set(a) & set(b), key=int)
    if not steps:
        raise Missing("no step of which both runs have a loss")
    gaps = {step: relative(a[step], b[step]) for step in steps}
    worst = max(steps, key=lambda step: order(gaps[step]))
    fallen = a[steps[0]] - a[steps[-1]]
    why = f"{len(steps)} steps, largest at step {worst}: {a[worst]:.6f} and {b[worst]:.6f}"
    if len(steps) > 5 and not fallen > 0:
        return Verdict(math.inf, bound, f"the loss did not fall: {a[steps[0]]:.4f} to {a[steps[-1]]:.4f}")
    return Verdict(gaps[worst], bound, why)


def live_rates(run: Result, size: Size) -> Verdict:
    """Compare LR and weight decay of every parameter at every step with those worked out by hand."""
    worst, where, number = 0.0, "", 0
    for step, groups in run["live"].items():
        for name, (lr, decay) in groups.items():
            expected_lr, expected_decay = size.trained_with(name, int(step))
            number += 1
            for what, got, wanted in (("LR", lr, expected_lr), ("weight decay", decay, expected_decay)):
                gap = relative(got, wanted)
                if order(gap) > order(worst) or not where:
                    worst, where = gap, f"{name}, step {step}: {what} {got:.6g}, by hand {wanted:.6g}"
    if not number:
        raise Missing("no live value was seen")
    return Verdict(worst, 1e-6, f"{number} values, the farthest {where}")


def shrunk(run: Result, size: Size) -> Verdict:
    """Compare how much each weight shrinks in a step without gradients with eta * lambda, in units of the bound.

    A step multiplies by `1 - eta lambda`, formed in fp32, so that eta * lambda is only known to 2^-23; the entries'
    own rounding averages out. What is not decayed must not change at all, but for 2^-23 as well.
    """
    worst, where = -1.0, ""
    seen = {name: values for name, values in run["shrunk"].items() if values[1] >= 64}
    for name, (share, _) in seen.items():
        lr, decay = size.trained_with(name, ZEROED)
        wanted = lr * decay
        gap = abs(share - wanted) / (1e-3 * wanted + 2.0**-23)
        if order(gap) > worst or not where:
            worst, where = order(gap), f"{name}: shrank by {share:.6g}, eta * lambda is {wanted:.6g}"
    if not seen:
        raise Missing("no weight was looked at")
    return Verdict(worst, 1.0, f"{len(seen)} weights, the farthest {where}; 1 is 0.1% of eta * lambda and 2^-23")


def exact_metrics(run: Result, bound: float, singular: float = 1.5e-3) -> Verdict:
    """Compare every metric of every layer with float64: the largest relative difference, in units of the bound.

    Args:
        run: that has measured.
        bound: for norms and alignment.
        singular: for top singular values, whose own bound is 1e-3.
    """
    worst, where, number = -1.0, "", 0
    for step, layers in run["exact"].items():
        for layer, metrics in layers.items():
            line = run["lines"].get(f"{step} {layer}")
            if line is None:
                return Verdict(math.inf, 1.0, f"{layer} was not measured at step {step}")
            for metric, value in metrics.items():
                number += 1
                got = line[metric]
                gap = math.inf if got is None else relative(got, value)
                units = order(gap) / (singular if metric == "top_singular_value" else bound)
                if units > worst:
                    shown = "null" if got is None else f"{got:.8g}"
                    worst, where = units, f"{metric} of {layer}, step {step}: {shown}, in float64 {value:.8g}"
    measured = {key for key, line in run["lines"].items() if line["kind"] != "expert_mean"}
    unknown = sorted(key for key in measured if key.partition(" ")[0] in run["exact"])
    unknown = [key for key in unknown if key.partition(" ")[2] not in run["exact"][key.partition(" ")[0]]]
    if unknown:
        return Verdict(math.inf, 1.0, f"measured, and nothing to compare with: {unknown[0]}")
    if not number:
        raise Missing("no metric was computed in float64")
    return Verdict(worst, 1.0, f"{number} numbers, the farthest {where}; 1 is {bound:g}, {singular:g} singular values")


def actual_product(run: Result, bound: float) -> Verdict:
    """Say how far the norm of what the layers' own products gave is from that of W X in float64."""
    gaps = {f"{layer}, step {step}": gap for step, layers in run["actual"].items() for layer, gap in layers.items()}
    if not gaps:
        raise Missing("no product was looked at")
    worst = max(gaps, key=lambda where: order(gaps[where]))
    middle = sorted(gaps.values())[len(gaps) // 2]
    return Verdict(gaps[worst], bound, f"{len(gaps)} products, median {middle:.2g}, largest of {worst}")


def same_metrics(one: Result, other: Result, bound: float) -> Verdict:
    """Compare two runs' weights and weight alignment in the first measured step, and that they have the same lines."""
    a, b = one["lines"], other["lines"]
    if not a or set(a) != set(b):
        odd = sorted(set(a) ^ set(b))
        return Verdict(math.inf, bound, f"lines that one of both lacks: {len(odd)}, {odd[0] if odd else 'all'}")
    first = min(int(key.partition(" ")[0]) for key in a)
    gaps = {
        f"{metric} of {key.partition(' ')[2]}": relative(a[key][metric], b[key][metric])
        for key in a
        if int(key.partition(" ")[0]) == first
        for metric in ("weight_norm", "weight_alignment", "tokens")
        if a[key][metric] is not None and b[key][metric] is not None
    }
    worst = max(gaps, key=lambda where: order(gaps[where]))
    return Verdict(gaps[worst], bound, f"{len(gaps)} numbers of step {first}, the farthest {worst}")


def bit_exact(one: Result, other: Result) -> Verdict:
    """Compare a resumed run with the uninterrupted one: losses, final weights and metrics that are not the same."""
    steps = sorted(set(other["losses"]), key=int)
    if not steps or not other["digests"]:
        raise Missing("the resumed run made no step")
    losses = [step for step in steps if one["losses"].get(step) != other["losses"][step]]
    weights = [name for name, value in other["digests"].items() if one["digests"].get(name) != value]
    lines = [key for key, line in other["lines"].items() if one["lines"].get(key) != line]
    different = len(losses) + len(weights) + len(lines)
    first = next((f"; the first: {thing}" for thing in (*losses, *weights, *lines)), "")
    return Verdict(
        different, 0.0, f"{len(steps)} losses, {len(other['digests'])} weights, {len(other['lines'])} lines{first}"
    )


def refused(run: Result, words: str) -> Verdict:
    """Require that a run ended as a user's mistake does, with a line that has certain words in it."""
    right = run["code"] == 2 and words in run["said"]
    return Verdict(0.0 if right else 1.0, 0.0, run["said"])


def cost(run: Result, what: str, bound: float) -> Verdict:
    """Say what a step costs in units of one without the patch; `what` as in `cost.ratios`."""
    found = ratios([(int(place), value) for place, value in run["seconds_of_steps"]])
    return Verdict(found[what], bound, f"a step without the patch takes {found['seconds'] * 1e3:.1f} ms")


def host_syncs(run: Result, what: str, bound: float | None) -> Verdict:
    """Say how often the host waits in a measured step beyond a plain one."""
    by_step = {int(place): number for place, number in run["syncs"].items()}
    return Verdict(added_syncs(by_step)[what], bound, f"by step of the traced cycle: {list(by_step.values())}")


def peak_memory(run: Result, bound: float) -> Verdict:
    """Compare the peak memory of a measured step with that of a plain one."""
    peaks = [(int(place), value) for place, value in run["peaks"]]
    plain = max(value for place, value in peaks if place in (2, 6))
    measured = max(value for place, value in peaks if place in (3, 7))
    return Verdict(measured / plain, bound, f"{plain / 2**30:.2f} GiB and {measured / 2**30:.2f} GiB")


def collectives(run: Result) -> Verdict:
    """Say which part of the traced steps collectives took, and what took most of the time."""
    return Verdict(run["collectives"], None, "most of the time: " + ", ".join(run["kernels"][:6]))


def relative(a: float | None, b: float | None) -> float:
    """Return the difference in units of the second, or of 1 where that is zero; NaN where there is nothing."""
    if a is None or b is None:
        return math.nan
    return abs(a - b) / abs(b) if b else abs(a)


def order(gap: float) -> float:
    """Return what differences are sorted by: no number is the largest."""
    return gap if math.isfinite(gap) else math.inf
