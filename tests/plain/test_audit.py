"""The audit finds every way in which an optimizer does not hold what was planned."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from megatron_patch.errors import AuditError
from megatron_patch.plain import ExtraWarmup, audit, width_groups
from tests.support.plain_models import mixed, proxy
from tests.support.plain_training import batch, initialised_engine
from tests.support.pool import Pool

PLAN: dict[str, Any] = {"rule": "independent", "lr": 0.01, "weight_decay": 0.1}


def groups(model: nn.Module | None = None, **changes: Any) -> list[dict[str, Any]]:
    return width_groups(mixed() if model is None else model, base=proxy(), **{**PLAN, **changes})


def test_what_was_planned_passes_anywhere_in_a_schedule() -> None:
    model = mixed()
    optimizer = torch.optim.AdamW(groups(model, scale_eps=1e-8))
    assert audit(optimizer).factor == 1
    schedule = schedulers.LambdaLR(optimizer, lambda t: min(1.0, t / 4))
    assert audit(optimizer).factor == 0  # initial_lr tells the peaks
    warmup = ExtraWarmup(schedule, "exp", m=4, steps=6, scope="width-dependent")
    for t in range(1, 9):
        optimizer.step()
        warmup.step()
        audited = audit(optimizer)
        assert audited.factor == pytest.approx(min(1.0, t / 4), rel=1e-12)
    assert len(audited.lines) == len(optimizer.param_groups)
    assert audited.plan.rule.name == "independent"


def test_one_cycle_with_the_groups_own_peaks_passes() -> None:
    optimizer = torch.optim.AdamW(groups())
    schedulers.OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups], total_steps=10)
    assert audit(optimizer).factor == pytest.approx(1 / 25)


def _set(key: str, value: Any) -> Callable[[torch.optim.Optimizer], None]:
    def change(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group[key] = value

    return change


def _set_in(number: int, key: str, value: Any) -> Callable[[torch.optim.Optimizer], None]:
    return lambda optimizer: optimizer.param_groups[number].__setitem__(key, value)


def _drop_group(optimizer: torch.optim.Optimizer) -> None:
    del optimizer.param_groups[2]


def _add_stranger(optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 5))]})


def _floor(optimizer: torch.optim.Optimizer) -> None:
    schedule = schedulers.CosineAnnealingLR(optimizer, 10, eta_min=1e-3)  # one floor for all groups
    for _ in range(8):
        optimizer.step()
        schedule.step()


def _flat_cycle(optimizer: torch.optim.Optimizer) -> None:
    schedulers.OneCycleLR(optimizer, 0.01, total_steps=10)


BREAKAGES: dict[str, tuple[Callable[[torch.optim.Optimizer], None], str]] = {
    "one LR for all": (_set("lr", 0.002), r"group 0 \(vector\), scale: the optimizer has lr = 0.002, but"),
    "one group's LR": (
        _set_in(2, "lr", 0.01),
        r"group 2 \(matrix_m4\), fc1.weight: the optimizer has lr = 0.01, but the plan gives 0.0025",
    ),
    "weight decay lost": (
        _set("weight_decay", 0.0),
        r"group 1 \(embedding\), embedding.weight: the optimizer has weight_decay = 0, but the plan gives 0.1",
    ),
    "weight decay not scaled": (
        _set("weight_decay", 0.1),
        r"group 0 \(vector\), scale: the optimizer has weight_decay = 0.1, but the plan gives 0",
    ),
    "eps": (_set("eps", 1e-6), "the optimizer has eps = 1e-06, but the plan gives 1e-08"),
    "a group dropped": (_drop_group, r"fc1.weight \(2 in all\) is in no param group"),
    "a stranger": (_add_stranger, r"group 6: the optimizer trains a parameter of shape \(3, 5\) that width_groups was"),
    "a floor": (_floor, "group 2 .*fc1.weight: the optimizer has lr = .*a scheduler that sets LRs of its own"),
    "a flat cycle": (_flat_cycle, r"group 2 .* has max_lr = 0.01, but the plan gives 0.0025"),
    "all 0": (_set("lr", 0.0), "has lr = 0, but the plan gives 0.01"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_every_breakage_is_found_and_named(breakage: str) -> None:
    breaks, complaint = BREAKAGES[breakage]
    optimizer = torch.optim.AdamW(groups(scale_eps=1e-8))
    audit(optimizer)
    breaks(optimizer)
    with pytest.raises(AuditError, match=complaint):
        audit(optimizer)


def test_a_checkpoint_of_another_rule_is_found() -> None:
    """Loading replaces every value of the groups, also those that say what was planned."""
    other = torch.optim.AdamW(groups(rule="sqrt"))
    optimizer = torch.optim.AdamW(groups())
    optimizer.load_state_dict(other.state_dict())
    with pytest.raises(AuditError, match=r"group 2 .*has weight_decay = 0.2, but the plan gives 0.4"):
        audit(optimizer)


def test_resuming_without_the_extra_warmup_is_found() -> None:
    first = torch.optim.AdamW(groups())
    ExtraWarmup(schedulers.LambdaLR(first, lambda t: 1.0), "exp", m=4, steps=6)
    optimizer = torch.optim.AdamW(groups())
    optimizer.load_state_dict(first.state_dict())
    schedule = schedulers.LambdaLR(optimizer, lambda t: 1.0)
    optimizer.step()
    schedule.step()
    with pytest.raises(AuditError, match="every live LR is 4 times what was planned as its peak"):
        audit(optimizer)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.SGD])
def test_weight_decay_that_is_not_decoupled_is_found(kind: Any) -> None:
    with pytest.raises(AuditError, match=f"of {kind.__name__} is added to the gradient"):
        audit(kind(groups()))
    if kind is not torch.optim.SGD:
        audit(kind(groups(), decoupled_weight_decay=True))
    audit(kind(groups(rule="no-decay")))


def test_parameters_that_the_model_no_longer_has_are_found() -> None:
    with torch.device("meta"):
        model = mixed()
    optimizer = torch.optim.AdamW(groups(model))
    audit(optimizer)
    model.to_empty(device="cpu")
    with pytest.raises(
        AuditError, match=r"group 0 \(vector\): the model's scale is another parameter since width_group"
    ):
        audit(optimizer)
    del model
    gc.collect()
    audit(optimizer)  # nobody can say any more


def test_parameters_of_two_plans_are_found() -> None:
    one, other = mixed(), mixed()
    optimizer = torch.optim.AdamW(groups(one))
    for group in groups(other):
        optimizer.add_param_group(group)
    with pytest.raises(AuditError, match="from several calls of width_groups"):
        audit(optimizer)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(AuditError, match="keeps its parameters in a way that is not known"):
        audit(object())


FLAT = {
    "WarmupDecayLR": {"total_num_steps": 10, "warmup_num_steps": 4},
    "WarmupLR": {"warmup_max_lr": 0.01, "warmup_num_steps": 4},
    "OneCycle": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01},
}
KEEPS = {
    "WarmupLR": {"warmup_num_steps": 4},
    "WarmupCosineLR": {"total_num_steps": 10, "warmup_num_steps": 4},
}


def said_of(stage: int, config: dict[str, Any], steps: int) -> str:
    """What the audit says of an engine before each step and at the end; empty if nothing."""
    model = mixed()
    engine = initialised_engine(model, groups(model), stage, config=config)
    said = []
    for step in range(steps + 1):
        if step:
            engine.backward(engine(batch(step)).square().mean())
            engine.step()
        try:
            audit(engine)
        except AuditError as error:
            said.append(str(error))
    return "\n".join(said)


def engines(stage: int) -> dict[str, str]:
    """All of that in one process, by the name of the case."""
    said = {f"flat {n}": said_of(stage, {"scheduler": {"type": n, "params": p}}, 0) for n, p in FLAT.items()}
    said |= {f"keeps {n}": said_of(stage, {"scheduler": {"type": n, "params": p}}, 3) for n, p in KEEPS.items()}
    for name, params in (
        ("none", {}),
        ("same", {"lr": 0.01, "weight_decay": 0.1}),
        ("lr", {"lr": 0.02}),
        ("weight_decay", {"lr": 0.01, "weight_decay": 0.77}),
    ):
        config = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, **params}}}
        said[f"block {name}"] = said_of(stage, config, 1)
    model = mixed()
    engine = initialised_engine(model, groups(model), stage)
    for group in engine.optimizer.param_groups:
        group["weight_decay"] = 0.0
    with pytest.raises(AuditError) as caught:
        audit(engine)
    return {**said, "lost": str(caught.value)}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeeds_engine(stage: int, pool: Pool) -> None:
    (said,) = pool.run(engines, stage=stage, env={"DS_ACCELERATOR": "cpu"})
    assert "the peak LR of WarmupDecayLR = 0.001, but the plan gives 0.01: a sched" in said.pop("flat WarmupDecayLR")
    assert said.pop("flat WarmupLR").startswith("group 2 (matrix_m4), fc1.weight: the optimizer has the peak LR of")
    assert said.pop("flat OneCycle").startswith("group 2 (matrix_m4), fc1.weight: the optimizer has the peak LR of")
    assert said.pop("block lr").startswith("the block optimizer of DeepSpeed's config has lr = 0.02, but width_groups")
    assert said.pop("block weight_decay").startswith(
        "the block optimizer of DeepSpeed's config has weight_decay = 0.77"
    )
    assert said.pop("lost").startswith("group 1 (embedding), embedding.weight: the optimizer has weight_decay = 0, but")
    assert said == dict.fromkeys(said, "")
    assert len(said) == 4


def resumed(folder: str) -> bool:
    """Whether an engine with an extra warmup goes on from its checkpoint as if it had never stopped."""

    def build() -> Any:
        model = mixed()
        planned = groups(model)
        optimizer = torch.optim.AdamW(planned)
        schedule = schedulers.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 4))
        warmup = ExtraWarmup(schedule, "decay-away", m=4, weight_decay=0.1)
        return initialised_engine(model, planned, 2, optimizer=optimizer, lr_scheduler=warmup)

    def go_on(engine: Any, steps: range) -> list[Any]:
        seen = []
        for step in steps:
            seen.append([group["lr"] for group in engine.optimizer.param_groups])
            engine.backward(engine(batch(step)).square().mean())
            engine.step()
            audit(engine)
        return [seen, [p.detach().clone() for p in engine.module.parameters()]]

    straight = build()
    go_on(straight, range(3))
    straight.save_checkpoint(folder, tag="three")
    lrs, weights = go_on(straight, range(3, 6))
    engine = build()
    engine.load_checkpoint(folder, tag="three")
    audit(engine)
    lrs_again, weights_again = go_on(engine, range(3, 6))
    return lrs == lrs_again and all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))


def test_deepspeeds_engine_resumes_an_extra_warmup(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(resumed, folder=str(tmp_path), env={"DS_ACCELERATOR": "cpu"}) == [True]
