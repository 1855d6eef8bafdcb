"""When two param groups are the same, in each of the three senses."""

import dataclasses
from typing import Any

import pytest

from megatron_patch.theory.width import Multipliers
from megatron_patch.upstream.width.groups import identifier, schedule_key, trains_with
from megatron_patch.upstream.width.plan import Hyperparameters

GROUP: dict[str, Any] = {
    "wd_mult": 2.0,
    "lr_mult": 0.5,
    "is_expert_parallel": False,
    "is_decoupled_lr": False,
    "max_lr": 0.005,
    "min_lr": 0.0005,
    "start_wd": None,
    "end_wd": None,
    "eps": 1e-8,
    "lr": 0.003,
}
PLANNED = Hyperparameters(lr=0.005, min_lr=0.0005, weight_decay=0.2, eps=1e-8, factors=Multipliers(0.5, 2.0, 1.0))


@pytest.mark.parametrize(
    ("key", "confused_on_resume", "same_schedule", "same_class"),
    [
        ("wd_mult", False, False, False),
        ("lr_mult", False, True, True),
        ("is_expert_parallel", False, True, True),
        ("is_decoupled_lr", False, True, True),
        ("max_lr", False, False, False),
        ("min_lr", False, False, False),
        ("start_wd", False, False, True),
        ("end_wd", False, False, True),
        ("eps", True, True, False),
        ("lr", True, True, True),  # the value of one step
    ],
)
def test_which_keys_tell_groups_apart(
    key: str, confused_on_resume: bool, same_schedule: bool, same_class: bool
) -> None:
    other = {**GROUP, key: 0.25}
    assert (identifier(other) == identifier(GROUP)) == confused_on_resume
    assert (schedule_key(other) == schedule_key(GROUP)) == same_schedule
    assert trains_with(GROUP, PLANNED)
    assert trains_with(other, PLANNED) == same_class


def test_the_text_of_a_schedule_is_the_same_on_every_rank() -> None:
    """It is compared between ranks: the order is that of the keys here, not that of the group."""
    text = "max_lr=0.005 min_lr=0.0005 start_wd=None end_wd=None wd_mult=2.0"
    assert schedule_key(GROUP) == schedule_key(dict(reversed(GROUP.items()))) == text


@pytest.mark.parametrize(("key", "value"), [("max_lr", 0.005), ("wd_mult", 2.0), ("eps", 1e-8)])
def test_a_class_is_recognised_up_to_rounding_alone(key: str, value: float) -> None:
    assert trains_with({**GROUP, key: value * (1 + 1e-12)}, PLANNED)
    assert not trains_with({**GROUP, key: value * (1 + 1e-6)}, PLANNED)


def test_an_optimizer_without_eps_has_that_of_the_plan() -> None:
    without = {key: value for key, value in GROUP.items() if key != "eps"}
    assert trains_with(without, PLANNED)
    assert trains_with(without, dataclasses.replace(PLANNED, eps=1.0))
