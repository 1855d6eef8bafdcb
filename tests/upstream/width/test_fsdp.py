"""Rules, warmups, audit and resume where FSDP shards the parameters: torch's FSDP2 and Megatron-FSDP, on CPU ranks.

The wrappers are Megatron's own (tests/support/fsdp.py says what stands in). They are compared with tables worked out by
hand, with closed forms, and with Megatron without the patch on one rank.
"""

import math
import os
from pathlib import Path

import pytest

from megatron_patch.upstream.width.parameters import held_here
from tests.support.building import Builder, groups_of
from tests.support.fsdp import MEGATRON, SECOND, SHARDED, TORCH, ByHand, Sharded, build_sharded, on_cpus
from tests.support.observed import ObservedWithPatch
from tests.support.param_groups import CASES, TWO_RANKS, argv, assert_same, build_all, expected_of, stacked
from tests.support.pool import Pool, RankFailure
from tests.support.training import TINY, Run, train

NEXT = [pytest.param(SECOND, marks=pytest.mark.skipif("MEGATRON_NEXT" not in os.environ, reason="from 0.20 on"))]

# --- param groups ----------------------------------------------------------------------------------------------------

TENSOR = TWO_RANKS
EXPERTS = "--expert-model-parallel-size 2"
LAYOUTS = [
    ("llama", TORCH, 2),
    ("llama", f"{TORCH} --bf16", 2),
    ("llama", f"{TORCH} {TENSOR}", 4),
    ("moe", TORCH, 2),
    ("llama", SHARDED, 2),
    ("llama", f"{SHARDED} --bf16", 2),
    ("llama", f"{SHARDED} {TENSOR}", 4),
    ("tied", f"{MEGATRON} --data-parallel-sharding-strategy optim", 2),
    ("moe", f"{SHARDED} {EXPERTS}", 4),
    ("moe", f"{SHARDED} {TENSOR} {EXPERTS} --expert-tensor-parallel-size 1", 4),
]


@pytest.mark.parametrize(("model", "layout", "ranks"), LAYOUTS)
def test_every_parameter_gets_what_it_gets_unsharded(model: str, layout: str, ranks: int, pool: Pool, tmp_path: Path):
    """Values by hand; shapes, fan-ins and classes as one rank has them. A wrong shape would show in m."""
    run = argv(model, CASES["custom"], f"--num-layers 2 --global-batch-size {ranks}")
    one, several = str(tmp_path / "one"), str(tmp_path / "several")
    ((_, whole),) = pool.run(build_all, runs=[run], directory=one)[0]
    results = pool.run(build_sharded, ranks=ranks, runs=[[*run, *layout.split()]], directory=several)
    union: dict[str, dict[str, float]] = {}
    for ((values, _),) in results:
        for name, value in values.items():
            assert union.setdefault(name, value) == value, name
    assert_same(union, expected_of(stacked(model, 2), model, CASES["custom"]), layout)
    ((_, file),) = results[0]
    assert file["parameters"] == whole["parameters"]


# --- training --------------------------------------------------------------------------------------------------------

STYLE = (
    "--untie-embeddings-and-output-weights --swiglu --ffn-hidden-size 64 --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope"
).split()
RULE = "--width-scaling sqrt --base-hidden-size 8 --base-ffn-hidden-size 8".split()  # m = 4; of linear_fc2 m = 8
# Under sqrt the LR is divided by the root of m, and the weight decay multiplied with it.
MATRICES = {
    f"*.{name}.weight": {"max_lr": 0.01 / root, "min_lr": 0.001 / root, "wd_mult": root, "lr_mult": 1 / root}
    for root, names in {
        2.0: ("linear_qkv", "linear_proj", "linear_fc1", "output_layer"),
        8**0.5: ("linear_fc2",),
    }.items()
    for name in names
}
COMMON = [*TINY, *STYLE, "--weight-decay", "2"]
BACK_ENDS = [TORCH, SHARDED, f"{MEGATRON} --data-parallel-sharding-strategy optim"]


@pytest.mark.parametrize("back_end", [*BACK_ENDS, *NEXT])
def test_two_ranks_train_as_megatron_alone_does_with_the_same_groups(back_end: str, pool: Pool) -> None:
    """The rule's LRs and weight decays, given to an unpatched Megatron on one rank parameter by parameter."""
    (alone,) = pool.run(train, argv=COMMON, steps=5, hooks=ByHand(MATRICES))
    results = pool.run(train, ranks=2, argv=[*COMMON, *RULE, *back_end.split()], steps=5, hooks=Sharded())
    (plain,) = pool.run(train, argv=COMMON, steps=5)
    for one in results:
        assert one.losses == pytest.approx(alone.losses, rel=1e-6)
        assert one.grad_norms == pytest.approx(alone.grad_norms, rel=1e-5)
    assert set(results[0].checksums) == set(alone.checksums)
    for name, checksum in alone.checksums.items():
        assert results[0].checksums[name].norm == pytest.approx(checksum.norm, rel=1e-5), name
        # Without the rule it would be another number.
        assert "norm" in name or abs(plain.checksums[name].norm / checksum.norm - 1) > 1e-4, name
    groups = {group for one in results for group in map(tuple, one.extra.peaks)}
    assert all(any(math.isclose(a[0], b[0]) and math.isclose(a[1], b[1]) for b in alone.extra.peaks) for a in groups)
    assert len(groups) == len(set(alone.extra.peaks)) == 4


WARMUPS = {
    "exp": ["--extra-warmup", "exp", "--extra-warmup-iters", "6"],
    "decay-away": ["--extra-warmup", "decay-away"],
    "width-dependent": ["--extra-warmup", "decay-away", "--extra-warmup-scope", "width-dependent"],
}


@pytest.mark.parametrize("back_end", [TORCH, SHARDED, *NEXT])
@pytest.mark.parametrize("warmup", WARMUPS)
def test_warmups_are_those_of_one_rank(back_end: str, warmup: str, pool: Pool) -> None:
    flags = [*COMMON, *RULE, *WARMUPS[warmup]]
    (one,) = pool.run(train, argv=flags, steps=4, hooks=ObservedWithPatch())
    for two in pool.run(train, ranks=2, argv=[*flags, *back_end.split()], steps=4, hooks=Sharded()):
        assert two.losses == pytest.approx(one.losses, rel=1e-6)
        assert [set(rates) for rates in two.extra.rates] == [set(rates) for rates in one.extra.rates]


@pytest.mark.parametrize(
    "back_end",
    [
        TORCH,
        f"{TORCH} --bf16",
        *(
            f"{MEGATRON} --data-parallel-sharding-strategy {strategy}"
            for strategy in ("no_shard", "optim", "optim_grads", "optim_grads_params", "optim_grads_params --bf16")
        ),
        *NEXT,
    ],
)
def test_initial_weights_by_fan_in_are_those_of_one_rank(back_end: str, pool: Pool) -> None:
    """Also those that the first forward pass is computed with, which Megatron-FSDP keeps beside the others."""
    flags = [*COMMON, *RULE, "--init-scaling", "fan-in", *["--bf16"][: "--bf16" in back_end]]
    (one,) = pool.run(train, argv=flags, steps=2, hooks=ObservedWithPatch())
    two = pool.run(train, ranks=2, argv=[*flags, *back_end.split()], steps=2, hooks=Sharded())[0]
    rounding = 1e-3 if "--bf16" in back_end else 1e-6
    assert two.losses == pytest.approx(one.losses, rel=rounding)
    for name, checksum in one.checksums.items():
        assert two.checksums[name].norm == pytest.approx(checksum.norm, rel=rounding), name


def shrink(argv: list[str]) -> dict[str, float]:
    """By how much the first step shrinks each parameter of which this rank has a part, when all gradients are 0."""
    import torch

    from tests.support.training import global_names

    on_cpus()
    built = Builder().build(argv)
    names = {id(parameter): name for name, parameter in global_names(built.model).items()}
    # Of a DTensor the memory on this rank.
    mine = {
        names[id(parameter)]: tensor.detach().to_local()
        for _, tensor, parameter in groups_of(built.optimizer)
        if tensor.detach().to_local().numel()
    }
    for _, tensor, _ in groups_of(built.optimizer):
        tensor.grad = torch.zeros_like(tensor)
    for values in mine.values():
        values.fill_(1.0)
    for child in getattr(built.optimizer, "chained_optimizers", [built.optimizer]):
        child.optimizer.step()
    assert all(values.min() == values.max() for values in mine.values())
    return {name: 1 - float(values.double().max()) for name, values in mine.items()}


@pytest.mark.parametrize("back_end", [TORCH, SHARDED, f"{SHARDED} --bf16", *NEXT])
def test_a_step_with_zero_gradients_shrinks_weights_by_the_rules_product(back_end: str, pool: Pool) -> None:
    """Under independent and sqrt lr * weight decay is 0.01 * 0.1 at any width, in every shard."""
    for rule, matrix in {"independent": 1e-3, "sqrt": 1e-3, "sqrt-decay": 1e-3 / 2, "standard": 1e-3 / 4}.items():
        words = [*STYLE, "--width-scaling", rule, "--base-hidden-size", "16", "--base-ffn-hidden-size", "16"]
        results = pool.run(shrink, ranks=2, argv=[*words, *back_end.split()])
        found = {name: value for result in results for name, value in result.items()}
        assert len(found) == 9
        for result in results:
            for name, value in result.items():
                wanted = 0 if "norm" in name else matrix
                if "embedding" in name:
                    wanted = 0 if rule == "sqrt-decay" else 1e-3
                assert value == pytest.approx(wanted, rel=1e-4, abs=2e-8), f"{rule}: {name}"


# --- audit -----------------------------------------------------------------------------------------------------------


class Tampered(Sharded):
    """Somebody changes the live optimizer in the second of three steps; the audit looks after each."""

    def __init__(self, how: str) -> None:
        self.how = how

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        if iteration != 2 or run.args.rank != 1:
            return
        (group,) = [g for g in run.optimizer.param_groups if math.isclose(g["wd_mult"], 8**0.5)]
        if self.how == "peak":
            group["max_lr"] *= 2
        elif self.how in ("dropped", "empty"):
            for one in run.optimizer.param_groups:
                held = [parameter for parameter in one["params"] if held_here(parameter).numel()]
                one["params"][:] = held[1:] if self.how == "dropped" else held
        elif self.how == "twice":
            group["params"].append(group["params"][0])


class Emptied(Tampered):
    def __init__(self) -> None:
        super().__init__("empty")

    def result(self, run: Run) -> list[int]:  # type: ignore[override]
        return [len(group["params"]) for group in run.optimizer.param_groups]


SAID = {
    "peak": r"layers\.\d\.mlp\.linear_fc2\.weight: the optimizer has max_lr = 0\.00707",
    "dropped": r"decoder\.\S* is in no param group",
    "twice": r"layers\.0\.mlp\.linear_fc2\.weight is in two param groups",
}


@pytest.mark.parametrize("back_end", [TORCH, SHARDED, *NEXT])
@pytest.mark.parametrize("how", SAID)
def test_the_audit_sees_what_one_rank_is_trained_with(back_end: str, how: str, pool: Pool) -> None:
    argv = [*COMMON, *RULE, *back_end.split(), "--audit-interval", "1"]
    with pytest.raises(RankFailure, match=rf"AuditError: rank 1 on .*{SAID[how]}"):
        pool.run(train, ranks=2, argv=argv, steps=3, hooks=Tampered(how))


def test_a_rank_need_not_have_what_it_has_no_part_of(pool: Pool) -> None:
    """Megatron-FSDP v2 leaves empty shards out of the groups, so that they are not the same on every rank."""
    argv = [*COMMON, *RULE, *SHARDED.split(), "--audit-interval", "1"]
    sizes = pool.run(train, ranks=2, argv=argv, steps=3, hooks=Emptied())
    assert sizes[0].extra != sizes[1].extra
