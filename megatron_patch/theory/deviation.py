"""Why a layer's relative update is not that of its counterpart in the proxy, as far as LR, weight decay and m can tell.

A relative update is `b eta / rho`: b is the RMS of the optimizer's update at a learning rate of 1, rho that of the
weight. Against the proxy, whose quantities have the index p, it is exactly

    ratio = (b / b_p) * sqrt(eta lambda / (eta_p lambda_p)) / d
    d = (rho / rho_p) / sqrt((eta / lambda) / (eta_p / lambda_p))

The square root is where the ratio settles in equilibrium, `sqrt(2 eta lambda)` (arXiv 2510.19093, eq. 36), which the
rule decides; d is how far the weights are from the norm at which they settle, `sqrt(eta / (2 lambda))` (eq. 33). What
is left, b, is the gradient's and Adam's, and neither LR nor weight decay nor m says anything about it.
"""

import math
from dataclasses import dataclass

from megatron_patch.theory.width import Rule

SHARE = 0.25
"""Part of the logarithm of a ratio from which a factor counts as one of its causes. assumed"""
TOLERANCE = 0.05
"""Relative difference up to which an LR or weight decay is the one that the rule gives. assumed"""
UNKNOWN = "no cause known from LR, weight decay and m"


@dataclass(frozen=True)
class Trained:
    """What one layer was trained with at one step."""

    lr: float
    """eta > 0."""
    weight_decay: float
    """lambda >= 0."""
    m: float
    """Width multiplier against its base model."""
    weight_rms: float | None
    """rho, RMS of the entries of the weight before the step."""
    rule: Rule


def likely_cause(ratio: float, layer: Trained, proxy: Trained, alignment_ratio: float | None = None) -> str:
    """Return in words what makes a layer's relative update, or representation change, `ratio` times its counterpart's.

    Every factor of the module's equation that acts in the direction of `ratio` and makes up at least `SHARE` of its
    logarithm is named; what the flags decide comes first.

    Args:
        ratio: > 0 and not 1.
        layer, proxy: the layer and its counterpart, at the same fraction of training.
        alignment_ratio: for a relative representation change, which is the relative update times the alignment ratio
            (arXiv 2510.19093, eq. 4): the layer's alignment ratio over its counterpart's.
    """
    found = _causes(layer, proxy)
    if alignment_ratio is not None and alignment_ratio > 0:
        text = f"its alignment ratio is {times(alignment_ratio)} the proxy's, for which there is {UNKNOWN}"
        found.append((math.log(alignment_ratio), text))
    total = math.log(ratio)
    return "; ".join(text for log, text in found if log / total >= SHARE) or UNKNOWN


def _causes(layer: Trained, proxy: Trained) -> list[tuple[float, str]]:
    """Return the factors that LR, weight decay and weight norm contribute: logarithm and text."""
    lr, rms = layer.lr / proxy.lr, 1.0
    if layer.weight_rms and proxy.weight_rms:
        rms = layer.weight_rms / proxy.weight_rms
    if layer.weight_decay > 0 and proxy.weight_decay > 0:
        decay = layer.weight_decay / proxy.weight_decay
        product, distance = lr * decay, rms / math.sqrt(lr / decay)
        why = _unexpected(layer, proxy) or _rule_lets_it_move(layer)
        return [
            (math.log(product) / 2, f"its lr * weight decay is {times(product)} the proxy's: {why}"),
            (
                -math.log(distance),
                f"its weight norm is {times(distance)} the one expected beside the proxy's from lr and weight decay: "
                f"not in equilibrium yet{_implicit_warmup(layer, distance)}",
            ),
        ]
    # Nothing settles without decay: the updates are what the LR makes them, over the norm the weights happen to have.
    none = " and there is no weight decay to settle it"
    if layer.weight_decay != proxy.weight_decay:
        none = f": weight decay {layer.weight_decay:.4g} here, {proxy.weight_decay:.4g} in the proxy"
    why = _unexpected(layer, proxy) or f"as the rule {layer.rule.name} has it at m = {layer.m:g}"
    return [
        (math.log(lr), f"its lr is {times(lr)} the proxy's: {why}"),
        (-math.log(rms), f"its weight RMS is {times(rms)} the proxy's{none}"),
    ]


def _unexpected(layer: Trained, proxy: Trained) -> str:
    """Return in what LR and weight decay are not what the rules make of the proxy's; empty if they are."""
    rule, other = layer.rule, proxy.rule
    lr, lr_expected = layer.lr / proxy.lr, layer.m**-rule.lr_exponent / proxy.m**-other.lr_exponent
    found = []
    if abs(lr / lr_expected - 1) > TOLERANCE:
        expected = f"where the rule {rule.name} asks for {fraction(lr_expected)}"
        found.append(f"lr is {times(lr)} the proxy's {expected}; check --lr, the schedule and --extra-warmup")
    if layer.weight_decay > 0 and proxy.weight_decay > 0:
        decay = layer.weight_decay / proxy.weight_decay
        decay_expected = layer.m**rule.wd_exponent / proxy.m**other.wd_exponent
        if abs(decay / decay_expected - 1) > TOLERANCE:
            expected = f"where the rule {rule.name} asks for {fraction(decay_expected)}"
            found.append(f"weight decay is {times(decay)} the proxy's {expected}; check --weight-decay")
    return "; ".join(found)


def _rule_lets_it_move(layer: Trained) -> str:
    a, b = layer.rule.lr_exponent, layer.rule.wd_exponent
    moves = "fall" if (b - a) * math.log(layer.m) < 0 else "grow"
    return (
        f"the rule {layer.rule.name} (a={a:g}, b={b:g}) lets it {moves} with m = {layer.m:g}; --width-scaling "
        "independent or sqrt keeps it"
    )


def _implicit_warmup(layer: Trained, distance: float) -> str:
    """Weights that start as large as the proxy's are too large for a smaller LR: arXiv 2510.19093, eq. 38."""
    if distance > 1 and layer.rule.lr_exponent > 0 and layer.m > 1:
        return f" (the implicit warmup of {layer.rule.name} scaling)"
    return ""


def times(ratio: float) -> str:
    """Return a ratio in words.

    >>> times(0.125), times(4.0), times(0.3)
    ('1/8 of', '4 times', '0.3 times')
    """
    text = fraction(ratio)
    return f"{text} of" if text.startswith("1/") else f"{text} times"


def fraction(ratio: float) -> str:
    """Return a ratio as a number, or as 1/n where that is within 1%.

    >>> fraction(0.125), fraction(1.0), fraction(0.0004), fraction(2 / 3)
    ('1/8', '1', '1/2500', '0.667')
    """
    inverse = round(1 / ratio)
    if inverse > 1 and abs(inverse * ratio - 1) < 0.01:
        return f"1/{inverse}"
    return f"{ratio:.3g}"
