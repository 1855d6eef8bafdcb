"""Seeds as blocks: what one seed adds to every loss is taken out before losses are compared.

A seed draws the initial weights, the order of the data and, in Megatron, the evaluated part of the validation set. So a
whole curve moves up or down with it, often by more than the difference that a learning rate makes. Where seeds were not
all trained at the same settings, a plain mean over seeds would take the one for the other.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median

from megatron_patch.experiments.trials import Trial

type _Point = tuple[float, float | None]


def aligned(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Return the trials of one curve or surface, in their order, with the offset of each seed taken out of its losses.

    The offset is the median difference to the seed with the most trials, over the (LR, weight decay) pairs that both
    have. They are shifted so that the mean of all losses stays. Where every seed has every pair, the means over seeds
    change by one constant. A seed that shares nothing with that one is left as it is.
    """
    losses: dict[int | None, dict[_Point, float]] = defaultdict(dict)
    for t in trials:
        if not t.diverged:
            losses[t.seed][t.lr, t.weight_decay] = t.loss
    if len(losses) < 2:
        return tuple(trials)
    reference = losses[max(losses, key=lambda seed: len(losses[seed]))]
    offsets = {
        seed: median(own[point] - reference[point] for point in own.keys() & reference.keys())
        for seed, own in losses.items()
        if own.keys() & reference.keys()
    }
    shift = fmean(offsets[t.seed] for t in trials if not t.diverged and t.seed in offsets)
    return tuple(
        t if t.diverged or t.seed not in offsets else replace(t, loss=t.loss - offsets[t.seed] + shift) for t in trials
    )
