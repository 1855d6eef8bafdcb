"""The extra warmup on top of torch's schedulers: the formulas, any scheduler inside, resuming bit by bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from megatron_patch.errors import ConfigError
from megatron_patch.plain import ExtraWarmup, width_groups
from megatron_patch.theory.schedules import decay_away_factors
from tests.support.plain_models import mixed, proxy

LR, DECAY, M = 0.01, 0.1, 4.0


def optimizer(rule: str = "independent", lr: float = LR) -> torch.optim.AdamW:
    return torch.optim.AdamW(width_groups(mixed(), rule=rule, base=proxy(), lr=lr, weight_decay=DECAY))


def steps(optimizer: torch.optim.Optimizer, scheduler: Any, count: int) -> list[list[float]]:
    """The LRs of all groups in each of so many steps."""
    seen = []
    for i in range(count):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        if isinstance(getattr(scheduler, "scheduler", scheduler), schedulers.ReduceLROnPlateau):
            scheduler.step(1.0 + (i > 4))
        else:
            scheduler.step()
    return seen


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda t: min(1.0, (t + 1) / 5)),
    # These compute the next LR from the one in the group.
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 20),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "multistep": lambda o: schedulers.MultiStepLR(o, [3, 6], 0.5),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.CosineAnnealingLR(o, 10)], [4]
    ),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=1),
}
KINDS: dict[str, dict[str, Any]] = {"exp": {"steps": 7}, "decay-away": {"weight_decay": DECAY}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_scheduler_is_multiplied_and_not_disturbed(schedule: str, kind: str) -> None:
    alone, warmed = optimizer(), optimizer()
    plain = steps(alone, SCHEDULES[schedule](alone), 12)
    found = steps(warmed, ExtraWarmup(SCHEDULES[schedule](warmed), kind, m=M, **KINDS[kind]), 12)
    # The base LR is that of the vectors, group 0, which no rule scales.
    factors = (
        [M ** min(0.0, t / 7 - 1) for t in range(12)]
        if kind == "exp"
        else list(decay_away_factors([lrs[0] for lrs in plain], DECAY, M))
    )
    for t in range(12):
        assert found[t] == pytest.approx([lr * factors[t] for lr in plain[t]], rel=1e-12), t
    assert found[0] == pytest.approx([lr / M for lr in plain[0]], rel=1e-12)


def test_the_check_values_of_the_paper() -> None:
    """m = 16, eta = 0.004, lambda = 0.1, 20,000 steps, 10% linear warmup from 0, linear decay to 0 ([K] fig. 7)."""
    total = 20_000

    def schedule(t: int) -> float:
        return t / 2_000 if t < 2_000 else (total - t) / 18_000

    for kind, arguments, at in (
        ("exp", {"steps": 10_000}, {0: 0.0625, 5_000: 0.25, 10_000: 1.0, 15_000: 1.0}),
        ("decay-away", {"weight_decay": DECAY}, {0: 0.0625, 5_000: 0.270236, 10_000: 0.747678}),
    ):
        p = torch.nn.Parameter(torch.zeros(2))
        sgd = torch.optim.SGD([{"params": [p], "lr": 0.004, "lr_mult": 1.0, "wd_mult": 0.0, "weight_decay": 0.0}])
        warmup = ExtraWarmup(schedulers.LambdaLR(sgd, schedule), kind, m=16, **arguments)  # type: ignore[arg-type]
        for t in range(15_001):
            if t in at:
                assert warmup.factor() == pytest.approx(at[t], abs=5e-7), (kind, t)
            sgd.step()
            warmup.step()


def test_scope_leaves_what_does_not_depend_on_width() -> None:
    o = optimizer()
    ExtraWarmup(schedulers.LambdaLR(o, lambda t: 1.0), "exp", m=M, steps=10, scope="width-dependent")
    for group in o.param_groups:
        assert group["lr"] == group["lr_mult"] * LR / (M if group["class"] in ("matrix", "output") else 1), group[
            "name"
        ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("order", ["optimizer first", "scheduler first"])
def test_resuming_is_exact_to_the_bit(schedule: str, kind: str, order: str) -> None:
    whole = optimizer()
    straight = ExtraWarmup(SCHEDULES[schedule](whole), kind, m=M, **KINDS[kind])
    expected = steps(whole, straight, 6)
    saved = copy.deepcopy((whole.state_dict(), straight.state_dict()))
    expected = steps(whole, straight, 6)

    resumed = optimizer()
    warmup = ExtraWarmup(SCHEDULES[schedule](resumed), kind, m=M, **KINDS[kind])
    for load in (0, 1) if order == "optimizer first" else (1, 0):
        (resumed, warmup)[load].load_state_dict(saved[load])
    assert warmup.factor() < 1
    assert steps(resumed, warmup, 6) == expected
    assert warmup.state_dict() == straight.state_dict()


def test_a_state_survives_a_file_of_plain_numbers(tmp_path: Any) -> None:
    o = optimizer()
    warmup = ExtraWarmup(SCHEDULES["cosine"](o), "decay-away", m=M, weight_decay=DECAY)
    steps(o, warmup, 3)
    torch.save({"optimizer": o.state_dict(), "scheduler": warmup.state_dict()}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert loaded["scheduler"] == warmup.state_dict()
    assert loaded["optimizer"]["param_groups"] == o.state_dict()["param_groups"]


def test_it_is_a_scheduler_of_torchs_and_steps_an_lr_tensor_in_place() -> None:
    groups = width_groups(mixed(), rule="independent", base=proxy(), lr=LR, weight_decay=DECAY)
    tensors = [torch.tensor(group["lr"], dtype=torch.float64) for group in groups]
    o = torch.optim.AdamW([{**g, "lr": t} for g, t in zip(groups, tensors, strict=True)], foreach=False)
    # It computes the next LR from the one that it finds in the tensor.
    warmup = ExtraWarmup(schedulers.ExponentialLR(o, 0.5), "exp", m=M, steps=2)
    assert isinstance(warmup, schedulers.LRScheduler)
    assert warmup.get_last_lr() == pytest.approx([g["lr"] / M for g in groups])
    for factor in (0.5 * M**-0.5, 0.25, 0.125):
        o.step()
        warmup.step()
        assert warmup.get_last_lr() == pytest.approx([g["lr"] * factor for g in groups], rel=1e-12)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("linear", {"m": 4, "steps": 5}, "kind 'linear': expected one of exp, decay-away"),
    ("exp", {"m": 0.25, "steps": 5}, "m 0.25: expected a number >= 1"),
    ("exp", {"m": 4}, "steps not given: expected a value with kind='exp'"),
    ("exp", {"m": 4, "steps": 5, "weight_decay": 0.1}, "weight_decay 0.1: expected kind='decay-away', which alone"),
    ("decay-away", {"m": 4}, "weight_decay not given: expected a value with kind='decay-away'"),
    ("decay-away", {"m": 4, "weight_decay": 0.2}, "weight_decay 0.2: expected 0.1, the base model's"),
    ("decay-away", {"m": 4, "weight_decay": 0.1, "steps": 3}, "steps 3: expected kind='exp', which alone reads it"),
    ("exp", {"m": 4, "steps": -1}, "steps -1: expected a finite number >= 0"),
    ("exp", {"m": 4, "steps": 5, "scope": "some"}, "scope 'some': expected one of all, width-dependent"),
]


@pytest.mark.parametrize(("kind", "arguments", "complaint"), WRONG, ids=[c for *_, c in WRONG])
def test_wrong_input_is_one_clear_line(kind: str, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExtraWarmup(SCHEDULES["lambda"](optimizer()), kind, **arguments)
    assert str(caught.value).startswith(complaint)


def test_groups_of_others_and_checkpoints_of_others_are_refused() -> None:
    plain = torch.optim.AdamW(mixed().parameters(), lr=LR)
    with pytest.raises(ConfigError, match="scheduler of param groups without lr_mult: expected groups of width_groups"):
        ExtraWarmup(SCHEDULES["lambda"](plain), "decay-away", m=4, weight_decay=0.01)
    o = optimizer()
    warmup = ExtraWarmup(SCHEDULES["lambda"](o), "exp", m=4, steps=5)
    with pytest.raises(ConfigError, match="kind exp: expected none, since no extra warmup was saved"):
        warmup.load_state_dict(SCHEDULES["lambda"](optimizer()).state_dict())
    with pytest.raises(ConfigError, match="steps 5: expected 9, as in the checkpoint"):
        warmup.load_state_dict({**warmup.state_dict(), "steps": 9})
    with pytest.raises(ConfigError, match="optimizer with 6 param groups: expected 1, as in the checkpoint"):
        warmup.load_state_dict({**warmup.state_dict(), "unwarmed": [0.1]})
