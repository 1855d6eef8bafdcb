"""The plain path against Megatron's: one GPT, the same weights, data and rule, trained by Megatron and by torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from megatron_patch.plain import AlignmentMeter, ExtraWarmup, audit, width_groups
from tests.support.engine import Watched, full_weights
from tests.support.monitored import read_lines
from tests.support.plain_gpt import Gpt, Sizes, unfused
from tests.support.pool import Pool
from tests.support.training import TINY, Run, _sequence, train

STEPS, MEASURED = 20, (5, 10, 15, 20)
BATCH, LENGTH = 4, 32
LR, MIN_LR, WEIGHT_DECAY, CLIP, EPS = 1e-2, 1e-3, 0.1, 0.5, 1e-8
WARMUP, DECAY = 2, 100


@dataclass(frozen=True)
class Case:
    """A model, its proxy, and what is asked of both paths: to Megatron as flags, to the plain path as arguments."""

    sizes: Sizes
    base: Sizes
    flags: str
    groups: Mapping[str, Any]
    warmup: Mapping[str, Any]


CASES = {
    "llama-sqrt-exp": Case(
        Sizes(32, ffn=96, llama=True, groups=2),
        Sizes(16, ffn=32, llama=True, groups=2),
        "--swiglu --ffn-hidden-size 96 --untie-embeddings-and-output-weights --disable-bias-linear "
        "--normalization RMSNorm --position-embedding-type rope --group-query-attention --num-query-groups 2 "
        "--width-scaling sqrt --base-hidden-size 16 --base-ffn-hidden-size 32 --vector-lr 2e-2 "
        "--extra-warmup exp --extra-warmup-iters 12",
        {"rule": "sqrt", "vector_lr": 2e-2},
        {"kind": "exp", "steps": 12},
    ),
    "llama-independent-exp-eps": Case(
        Sizes(32, ffn=96, llama=True),
        Sizes(16, ffn=32, llama=True),
        "--swiglu --ffn-hidden-size 96 --untie-embeddings-and-output-weights --disable-bias-linear "
        "--normalization RMSNorm --position-embedding-type rope "
        "--width-scaling independent --base-hidden-size 16 --base-ffn-hidden-size 32 --scale-adam-eps "
        "--extra-warmup exp --extra-warmup-iters 12 --extra-warmup-scope width-dependent",
        {"rule": "independent", "scale_eps": EPS},
        {"kind": "exp", "steps": 12, "scope": "width-dependent"},
    ),
    "gpt2-independent-decay-away": Case(
        Sizes(32, ffn=128, llama=False),
        Sizes(16, ffn=64, llama=False),
        "--width-scaling independent --base-hidden-size 16 --embedding-weight-decay 0.05 --extra-warmup decay-away",
        {"rule": "independent", "embedding_weight_decay": 0.05},
        {"kind": "decay-away", "weight_decay": WEIGHT_DECAY},
    ),
}


@dataclass
class Began(Watched):
    """Megatron's run, which notes the weights it began with."""

    weights: dict[str, Any] = field(default_factory=dict)

    def built(self, run: Run) -> None:
        self.weights = full_weights(run)
        super().built(run)

    def result(self, run: Run) -> Any:
        return self.weights, self.groups, full_weights(run)


def schedule(step: int) -> float:
    """Megatron's linear schedule as a fraction of the peak LR, from its definition."""
    if step <= WARMUP:
        return step / WARMUP
    left = 1 - (step - WARMUP) / (DECAY - WARMUP)
    return (MIN_LR + left * (LR - MIN_LR)) / LR


@dataclass
class Plain:
    """What the plain path's run did."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    groups: list[dict[str, tuple[float, ...]]] = field(default_factory=list)
    lines: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)


def trained_plainly(case: Case, weights: Mapping[str, Any]) -> Plain:
    """Train the same model in a loop that a user of torch would write."""
    model, did = Gpt(case.sizes), Plain()
    with torch.no_grad():
        assert {name for name, _ in model.named_parameters()} == weights.keys()
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    with torch.device("meta"):
        proxy = Gpt(case.base)
    groups = width_groups(model, base=proxy, lr=LR, weight_decay=WEIGHT_DECAY, **case.groups)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=EPS)
    warmup = ExtraWarmup(torch.optim.lr_scheduler.LambdaLR(optimizer, schedule), m=2, **case.warmup)
    meter = AlignmentMeter(model, optimizer, tokens=BATCH * LENGTH)

    def note() -> None:
        live = [(n, (g["lr"], g["weight_decay"], g["eps"])) for g in optimizer.param_groups for n in g["names"]]
        did.groups.append(dict(live))

    note()
    for step in range(1, STEPS + 1):
        samples = [_sequence(BATCH * (step - 1) + i, LENGTH, 63) for i in range(BATCH)]
        tokens, labels = (torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels"))
        if step in MEASURED:
            meter.begin(step)
        loss = functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        did.grad_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        if step in MEASURED:
            did.lines.update({(step, fused(str(line["layer"]))): line for line in meter.end()})
        optimizer.zero_grad()
        warmup.step()
        did.losses.append(loss.item())
        note()
    audit(optimizer, warmup)
    did.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return did


def fused(layer: str) -> str:
    """Return what Megatron's metrics call a layer."""
    return re.sub(r"\.([qkv]|gate|up)$", r"/\1", layer)


NAMED_OTHERWISE = ("layer", "kind")
"""The plain path knows of no split over tensor-parallel ranks."""


def relative(ours: Mapping[Any, Any], theirs: Mapping[Any, Any]) -> dict[str, float]:
    """The largest relative difference of each number of the metrics; what is no fraction must be the same."""
    assert ours.keys() == theirs.keys()
    worst: dict[str, float] = {}
    for place, line in theirs.items():
        assert ours[place].keys() == line.keys()
        for key, value in line.items():
            mine = ours[place][key]
            if key == "top_singular_value_error":  # the bound of something near 0
                assert 0 <= mine <= 1e-3
            elif isinstance(value, float):
                worst[key] = max(worst.get(key, 0.0), abs(mine / value - 1))
            else:
                assert key in NAMED_OTHERWISE or mine == value, (place, key)
    return worst


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_run(case: Case, pool: Pool, tmp_path: Path) -> None:
    """20 losses and gradient norms, LR, weight decay and eps of every parameter at every step, metrics, weights."""
    argv = [
        *TINY,
        *case.flags.split(),
        *f"--micro-batch-size {BATCH} --weight-decay {WEIGHT_DECAY} --clip-grad {CLIP} --adam-eps {EPS}".split(),
        *f"--alignment-interval 5 --spectral-interval 5 --alignment-tokens {BATCH * LENGTH}".split(),
        *f"--adam-beta2 0.999 --no-report --metrics-dir {tmp_path}".split(),
    ]
    (megatron,) = pool.run(train, argv=argv, steps=STEPS, hooks=Began())
    began, groups, ended = megatron.extra
    began, ended = (unfused({n: torch.from_numpy(w) for n, w in each.items()}, case.sizes) for each in (began, ended))
    plain = trained_plainly(case, began)

    assert len(megatron.losses) == len(set(megatron.losses)) == STEPS
    losses = max(abs(a - b) for a, b in zip(plain.losses, megatron.losses, strict=True))
    norms = max(abs(a / b - 1) for a, b in zip(plain.grad_norms, megatron.grad_norms, strict=True))
    # A key's bias has no gradient but rounding, which Adam blows up.
    counted = [name for name in ended if not name.endswith("linear_qkv.k.bias")]
    far = max(float((plain.weights[name] - ended[name]).norm() / ended[name].norm()) for name in counted)
    worst = relative(plain.lines, read_lines(tmp_path))
    print("loss", losses, "norm", norms, "weights", far, "metrics", max((gap, key) for key, gap in worst.items()))
    assert losses < 1e-6
    assert norms < 1e-6
    assert far < 1e-5
    assert max(worst.values()) < 1e-5, worst
    assert {"lr", "weight_decay", "update_norm", "alignment_ratio", "top_singular_value"} <= worst.keys()

    assert len(groups) == len(plain.groups) == STEPS + 1
    for step, (ours, fused_groups) in enumerate(zip(plain.groups, groups, strict=True)):
        theirs = unfused(fused_groups, case.sizes)
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            assert ours[name] == pytest.approx(values, rel=1e-12, abs=0), (step, name)
