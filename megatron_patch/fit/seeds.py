"""Seeds as blocks: what one seed adds to every loss is taken out before losses are compared.

A seed draws the initial weights, the order of the data and, in Megatron, the evaluated part of the validation set. So a
whole curve moves up or down with it, often by more than the difference that a learning rate makes. Where seeds were not
all trained at the same settings, a plain mean over seeds would take the one for the other.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median

from megatron_patch.runs.trial import Trial

SHORTEST = 3
"""Pairs that one seed must have for it to be a curve that others can be compared with."""

type _Losses = dict[tuple[float, float | None], float]
"""(LR, weight decay) -> loss."""


def aligned(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Return the trials of one curve or surface, in their order, with the offset of each seed taken out of its losses.

    The offset is the median difference to the seed with the most trials, over the (LR, weight decay) pairs that both
    have. They are shifted so that the mean of all losses stays. Where every seed has every pair, the means over seeds
    change by one constant. A seed that shares nothing with that one is left as it is.
    """
    losses, reference = _by_seed(trials)
    offsets = {
        seed: median(own[pair] - reference[pair] for pair in shared)
        for seed, own in losses.items()
        if (shared := own.keys() & reference.keys())
    }
    if len(offsets) < 2:
        return tuple(trials)
    shift = fmean(offsets[t.seed] for t in trials if not t.diverged and t.seed in offsets)
    return tuple(
        t if t.diverged or t.seed not in offsets else replace(t, loss=t.loss - offsets[t.seed] + shift) for t in trials
    )


def informative(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials without the seeds whose one trial only tells their own offset.

    Such a trial agrees with the others by construction, and to a fit it would look like a lack of noise.
    """
    losses, reference = _by_seed(trials)
    silent = {
        seed
        for seed, own in losses.items()
        if own is not reference and len(own) == 1 and own.keys() <= reference.keys()
    }
    return [t for t in trials if t.diverged or t.seed not in silent]


def _by_seed(trials: Sequence[Trial]) -> tuple[dict[int | None, _Losses], _Losses]:
    """Return the finite losses of each seed, and those of the seed that has the most; none where none has a curve."""
    losses: dict[int | None, _Losses] = defaultdict(dict)
    for t in trials:
        if not t.diverged:
            losses[t.seed][t.lr, t.weight_decay] = t.loss
    most = max(losses.values(), key=len, default={})
    return losses, most if len(most) >= SHORTEST else {}
