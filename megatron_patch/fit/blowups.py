"""Runs that blew up to a finite loss: they diverged, as the ones that ended in nan did.

A run whose learning rate is too high often does not end in nan: it stays near the loss that it began with, or
falls back to what the frequencies of tokens alone give. Such a point is no part of the valley of losses over log2(LR),
and a fit that takes it for one bends the curve until its minimum lies a nat below anything measured. In 246 public
curves (Step Law) the valley rises by less than 0.31 nats towards high LRs, and what blew up is 1.5 nats or more above
the best.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_patch.runs.trial import DIVERGED, Trial

FAR = 1.5
"""Nats above another run with the same LR at which a run has diverged; other seeds and decays differ by far less."""
JUMP = 0.5
"""Nats above the best run, for every octave to the LR below, at which one has diverged if this is a jump."""
STEEP = 5.0
"""A jump: this many times as far above the best run as any run whose LR is no further from the best one's."""
MOST_NAMED = 6
"""Runs that one sentence lists."""


@dataclass(frozen=True)
class Settled:
    """Trials, with the ones that blew up marked as diverged."""

    trials: tuple[Trial, ...]
    """All of them, in their order; the loss of one that blew up is nan."""
    blown: tuple[Trial, ...]
    """Those that blew up, as they were."""


def settle(trials: Sequence[Trial]) -> Settled:
    """Return the trials of one curve or surface with every finite blow-up as a diverged run.

    A run with a finite loss has diverged if

    - it is not below the loss that it began with, ln(vocabulary size) where that is known, and a run with the same or a
      lower LR is; or
    - it is more than `FAR` nats above another run with the same LR; or
    - it jumped: it is `JUMP` nats above the best run at its weight decay, whose LR is lower, and `STEEP` times as far
      above it as any run whose LR is no further from the best one's. On a grid with more than an octave to the next
      lower LR it must be as many times `JUMP` above; if a run with a higher LR ended lower, `FAR`, or it may be noise.
      Above the first LR that jumped, what is half as far above the best has diverged too.

    A loss that rises smoothly is no jump, however high.

    Args:
        trials: that differ in LR, weight decay and seed only.
    """
    finite = sorted((t for t in trials if not t.diverged), key=lambda t: t.lr)
    same: dict[float, float] = {}  # the lowest loss with that LR
    for t in finite:
        same[t.lr] = min(same.get(t.lr, math.inf), t.loss)
    up_to = dict(zip(same, itertools.accumulate(same.values(), min), strict=True))  # with that LR or a lower one
    lost = {id(t) for t in finite if t.loss > same[t.lr] + FAR or _learned_nothing(t, up_to[t.lr])}
    by_decay: dict[float | None, list[Trial]] = {}
    for t in finite:
        if id(t) not in lost:
            by_decay.setdefault(t.weight_decay, []).append(t)
    lost.update(*map(_jumped, by_decay.values()))
    settled = tuple(replace(t, loss=DIVERGED) if id(t) in lost else t for t in trials)
    return Settled(settled, tuple(t for t in trials if id(t) in lost))


def _learned_nothing(trial: Trial, other: float) -> bool:
    """Whether a run ended no lower than it began, and one that ended with the loss `other` did."""
    start = start_loss(trial)
    return start is not None and trial.loss >= start > other


def start_loss(trial: Trial) -> float | None:
    """Return ln(vocabulary size), the loss of a model that has learned nothing, where the vocabulary is known."""
    for name in ("padded_vocab_size", "vocab_size"):
        size = trial.arguments.get(name)
        if isinstance(size, int) and size > 1:
            return math.log(size)
    return None


def _jumped(trials: Sequence[Trial]) -> set[int]:
    """Return the ids of the runs that jumped; `trials` are of one weight decay and rise in LR, and there is one."""
    best = min(trials, key=lambda t: t.loss)
    below = [t for t in reversed(trials) if t.lr < best.lr]
    above = [t for t in trials if t.lr > best.lr]
    last = math.inf
    falls_back = {}  # whether a run with a higher LR ended lower
    for t in reversed(above):
        falls_back[id(t)] = last < t.loss
        last = min(last, t.loss)
    found: set[int] = set()
    usual, place, lr, before, here, jump = 0.0, 0, best.lr, best.lr, 0.0, math.inf
    for t in above:
        if t.lr > lr:  # runs of one LR are not compared with each other
            usual, before, lr, here = max(usual, here), lr, t.lr, 0.0
        while place < len(below) and best.lr / below[place].lr <= t.lr / best.lr * (1 + 1e-9):
            usual = max(usual, below[place].loss - best.loss)
            place += 1
        rise = t.loss - best.loss
        enough = JUMP * max(1.0, math.log2(t.lr / before))
        if falls_back[id(t)]:
            enough = max(enough, FAR)
        if rise > enough and (rise > STEEP * usual or rise > jump / 2):
            found.add(id(t))
            jump = min(jump, rise)
        else:
            here = max(here, rise)
    return found


def described(blown: Sequence[Trial]) -> str:
    """Return what blew up, in words.

    >>> described([Trial(768, 0.016, 7.76), Trial(768, 0.032, 7.784)])
    'loss 7.76 at LR 0.016, 7.784 at LR 0.032'
    """
    first = [f"{t.loss:.4g} at LR {t.lr:.4g}" for t in sorted(blown, key=lambda t: (t.lr, t.loss))[:MOST_NAMED]]
    rest = f" and {len(blown) - MOST_NAMED} more" if len(blown) > MOST_NAMED else ""
    return f"loss {', '.join(first)}{rest}"
