"""The audit reads the live optimizer, so it must notice whatever somebody does to a param group after it was built."""

import socket
from typing import Any

import pytest

from tests.support.building import LLAMA_STYLE, Builder, Built
from tests.support.pool import Pool, RankFailure

# linear_fc2 is the only matrix with m = 3 and linear_proj the only one with m = 2: each has a param group of its own.
ARGV = (
    f"{LLAMA_STYLE} --ffn-hidden-size 96 --kv-channels 24 --width-scaling sqrt --base-hidden-size 16 "
    "--base-ffn-hidden-size 32 --base-kv-projection-size 48"
).split()
HOST = socket.gethostname()
FC2, PROJ = "decoder.layers.0.mlp.linear_fc2.weight", "decoder.layers.0.self_attention.linear_proj.weight"


def group_of(built: Built, name: str) -> dict[str, Any]:
    """The param group of a parameter."""
    from tests.support.building import groups_of
    from tests.support.training import global_names

    parameter = global_names(built.model)[name]
    return next(group for group, _, owned in groups_of(built.optimizer) if owned is parameter)


def complaint(built: Built) -> str:
    """What the two audits that follow the set-up say, as the text of the error; empty if they are content."""
    from megatron_patch.errors import AuditError
    from megatron_patch.upstream.width.audit import audit_groups, audit_schedule

    try:
        audit_groups(built.plan, built.optimizer)
        audit_schedule(built.plan, built.optimizer, built.scheduler)
    except AuditError as error:
        return str(error)
    return ""


def tamper(changes: dict[str, float]) -> dict[str, str]:
    """The complaint after each change of linear_fc2's group; the change is undone again."""
    built = Builder().build(ARGV)
    group = group_of(built, FC2)
    assert len(group["params"]) == 1
    said = {"nothing": complaint(built)}
    for key, value in changes.items():
        before, group[key] = group[key], value
        said[key] = complaint(built)
        group[key] = before
    said["all undone"] = complaint(built)
    return said


def test_every_field_of_a_live_group_is_compared(pool: Pool):
    """Name, live and planned value: lr 0.01 / sqrt(3), min_lr a tenth of it, weight decay factor sqrt(3), eps 1e-8."""
    changes = {
        "max_lr": 0.0058,
        "min_lr": 0.0,
        "wd_mult": 1.0,
        "eps": 1e-6,
        "lr": 0.01,
        "weight_decay": 0.1,
    }
    planned = {
        "max_lr": "0.0057735026919",
        "min_lr": "0.00057735026919",
        "wd_mult": "1.73205080757",
        "eps": "1e-08",
        "lr": "0.0057735026919",
        "weight_decay": "0.173205080757",
    }
    (said,) = pool.run(tamper, changes=changes)
    assert said.pop("nothing") == said.pop("all undone") == ""
    for key, text in said.items():
        assert text == (
            f"{FC2}: the optimizer has {key} = {changes[key]:.12g}, but --width-scaling sqrt gives {planned[key]}"
        )


def test_differences_of_rounding_are_none(pool: Pool):
    """A tolerance of 0 would stop runs for the last bit of a product; one of 1e-6 would let a wrong m = 1e6 pass."""
    lr = 0.01 / 3**0.5
    (said,) = pool.run(tamper, changes={"max_lr": lr * (1 + 1e-13)})
    assert said["max_lr"] == ""
    (said,) = pool.run(tamper, changes={"max_lr": lr * (1 + 1e-7)})
    assert "max_lr" in said["max_lr"]


def regroup() -> list[str]:
    """The complaint when a parameter is in two groups, in none, in another's, and when the optimizer has a stranger."""
    import torch

    built = Builder().build(ARGV)
    fc2, proj = group_of(built, FC2), group_of(built, PROJ)
    (weight,) = fc2["params"]
    param_groups = built.optimizer.chained_optimizers[0].optimizer.param_groups
    said = []
    param_groups.append(dict(fc2, params=[weight]))
    said.append(complaint(built))
    param_groups.pop()
    fc2["params"].clear()
    proj["params"].append(weight)
    said.append(complaint(built))
    proj["params"].pop()
    said.append(complaint(built))
    stranger = torch.nn.Parameter(torch.zeros(3, 5))
    fc2["params"] += [weight, stranger]
    said.append(complaint(built))
    return said


def test_every_parameter_is_in_exactly_one_group_and_that_is_its_own(pool: Pool):
    """Each way to lose track of a parameter has its own message."""
    (said,) = pool.run(regroup)
    assert said[0] == f"{FC2} is in two param groups"
    assert said[1].startswith(f"{FC2}: the optimizer has max_lr = 0.00707106781187")
    assert said[2] == f"{FC2} is in no param group: the optimizer does not train it"
    assert said[3] == "the optimizer holds a parameter of shape (3, 5) unknown to the model"


# --- on several ranks ------------------------------------------------------------------------------------------------


def tamper_during_setup(argv: list[str]) -> None:
    """Set up; on rank 1 something changes a group between the building of the optimizer and the end of the set-up."""
    import torch
    from megatron.training import training

    original = training.get_optimizer_param_scheduler

    def meddle(optimizer: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            for group in optimizer.param_groups:
                if group["max_lr"] == 0.005:
                    group["max_lr"] = 0.25
        return original(optimizer)

    training.get_optimizer_param_scheduler = meddle
    Builder().build(argv)


def test_one_rank_that_differs_stops_all_of_them(pool: Pool):
    """The others would otherwise wait in the next collective for a rank that is gone; all say which rank and why."""
    argv = [*ARGV, "--tensor-model-parallel-size", "2"]
    with pytest.raises(RankFailure) as caught:
        pool.run(tamper_during_setup, ranks=2, argv=argv)
    assert sorted(caught.value.errors) == [0, 1]
    for text in caught.value.errors.values():
        last = text.strip().splitlines()[-1]
        assert last.startswith(f"megatron_patch.errors.AuditError: rank 1 on {HOST}: decoder.layers.0.")
        assert "has max_lr = 0.25, but --width-scaling sqrt gives 0.005" in last


def fail_to_plan_on_one_rank() -> None:
    """Set up with a layer on rank 1 whose width is not what its name says."""
    import torch

    from megatron_patch.upstream.width import planned

    original = planned.describe

    def after_meddling(model: Any, config: Any, *rest: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            config.ffn_hidden_size = 100
        return original(model, config, *rest)

    planned.describe = after_meddling
    Builder().build([*ARGV, "--tensor-model-parallel-size", "2"])


def test_a_plan_that_fails_on_one_rank_stops_all_of_them(pool: Pool):
    """Building the optimizer is a collective: the healthy rank would hang in it."""
    with pytest.raises(RankFailure) as caught:
        pool.run(fail_to_plan_on_one_rank, ranks=2)
    assert sorted(caught.value.errors) == [0, 1]
    for text in caught.value.errors.values():
        assert f"AuditError: rank 1 on {HOST}: {FC2} has the global fan-in 96" in text


def disagree(argv: list[str]) -> str:
    """hyperparameters.json on two replicas, one of which trains linear_fc2 differently."""
    import torch

    from megatron_patch.errors import AuditError
    from megatron_patch.upstream.record import hyperparameter_table

    built = Builder().build(argv)
    if torch.distributed.get_rank() == 1:
        group_of(built, FC2)["max_lr"] = 0.002
    try:
        hyperparameter_table(built.plan, built.optimizer)
    except AuditError as error:
        return str(error)
    return ""


def test_replicas_that_disagree_are_no_table(pool: Pool):
    """One number per parameter goes into hyperparameters.json: two replicas with two numbers are an error on both."""
    said = pool.run(disagree, ranks=2, argv=ARGV)
    assert said[0] == said[1]
    assert said[0].startswith(f"{FC2} is trained with ")
    assert "0.00577350269" in said[0]
    assert "0.002" in said[0]


def orphan() -> str:
    """hyperparameters.json when no rank of a distributed optimizer owns any of linear_fc2."""
    from megatron_patch.errors import AuditError
    from megatron_patch.upstream.record import hyperparameter_table
    from tests.support.training import global_names

    built = Builder().build([*ARGV, "--use-distributed-optimizer"])
    parameter = global_names(built.model)[FC2]
    for child in built.optimizer.chained_optimizers:
        child.model_param_group_index_map.pop(parameter, None)
    assert complaint(built) == "", "one rank need not own a part of every parameter"
    try:
        hyperparameter_table(built.plan, built.optimizer)
    except AuditError as error:
        return str(error)
    return ""


def test_a_parameter_that_no_rank_trains(pool: Pool):
    """With the distributed optimizer only all ranks together know that a parameter was forgotten."""
    message = f"{FC2} is in no param group of any rank: the optimizer does not train it"
    assert pool.run(orphan, ranks=2) == [message, message]
