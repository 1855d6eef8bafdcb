"""Rules, warmups, audit and resume where FSDP shards the parameters: torch's FSDP2 and Megatron-FSDP, on CPU ranks.

The wrappers are Megatron's own (tests/support/fsdp.py says what stands in). They are compared with tables worked out by
hand, with closed forms, and with Megatron without the patch on one rank.
"""

import math
import os
from pathlib import Path

import pytest

from megatron_patch.upstream.width.parameters import held_here
from tests.support.building import COMMON as ONE_LAYER
from tests.support.building import Builder, groups_of
from tests.support.explaining import explained
from tests.support.fsdp import MEGATRON, SECOND, SHARDED, TORCH, ByHand, Sharded, ShardedAlone, build_sharded, on_cpus
from tests.support.observed import ObservedWithPatch, bits
from tests.support.param_groups import CASES, MODELS, TWO_RANKS, argv, assert_same, build_all, expected_of, stacked
from tests.support.pool import Pool, RankFailure
from tests.support.training import TINY, Outcome, Run, train

FROM_0_20 = pytest.mark.skipif("MEGATRON_NEXT" not in os.environ, reason="Megatron-FSDP v2 is there from 0.20 on")
NEXT = [pytest.param(SECOND, id="v2", marks=FROM_0_20)]

# --- param groups ----------------------------------------------------------------------------------------------------

TENSOR = TWO_RANKS
EXPERTS = "--expert-model-parallel-size 2"
LAYOUTS = [
    ("llama", TORCH, 2),
    ("llama", f"{TORCH} --bf16", 2),
    ("llama", f"{TORCH} {TENSOR}", 4),
    ("moe", TORCH, 2),
    ("hybrid", TORCH, 2),
    ("llama", SHARDED, 2),
    ("llama", f"{SHARDED} --bf16", 2),
    ("llama", f"{SHARDED} {TENSOR}", 4),
    ("llama", f"{SHARDED} --num-distributed-optimizer-instances 2", 4),
    ("hybrid", SHARDED, 2),
    ("tied", SHARDED, 2),
    ("tied", f"{MEGATRON} --data-parallel-sharding-strategy optim", 2),
    ("moe", f"{SHARDED} {EXPERTS}", 4),
    ("moe", f"{SHARDED} {TENSOR} {EXPERTS} --expert-tensor-parallel-size 1", 4),
]


def two_layers(model: str, more: str) -> list[str]:
    """The command line of a model of two layers; a hybrid one has its own number."""
    return argv(model, CASES["custom"], f"{'' if model == 'hybrid' else '--num-layers 2'} {more}")


def by_hand(model: str) -> dict[str, dict[str, float]]:
    table = MODELS[model].table if model == "hybrid" else stacked(model, 2)
    return expected_of(table, model, CASES["custom"])


@pytest.mark.parametrize(("model", "layout", "ranks"), LAYOUTS)
def test_every_parameter_gets_what_it_gets_unsharded(model: str, layout: str, ranks: int, pool: Pool, tmp_path: Path):
    """Values by hand; shapes, fan-ins and classes as one rank has them. A wrong shape would show in m."""
    run = two_layers(model, f"--global-batch-size {ranks}")
    one, several = str(tmp_path / "one"), str(tmp_path / "several")
    ((_, whole),) = pool.run(build_all, runs=[run], directory=one)[0]
    results = pool.run(build_sharded, ranks=ranks, runs=[[*run, *layout.split()]], directory=several)
    union: dict[str, dict[str, float]] = {}
    for ((values, _),) in results:
        for name, value in values.items():
            assert union.setdefault(name, value) == value, name
    assert_same(union, by_hand(model), layout)
    ((_, file),) = results[0]
    assert file["parameters"] == whole["parameters"]


def test_explain_says_what_the_live_groups_hold(pool: Pool) -> None:
    """At its own command line, with the layout of many ranks."""
    layouts = [(model, f"{layout} --world-size {ranks} --all-ranks") for model, layout, ranks in LAYOUTS]
    commands = [
        ["--json", *ONE_LAYER, *two_layers(model, f"--global-batch-size 4 {layout}")] for model, layout in layouts
    ]
    for (model, layout), ended in zip(layouts, explained(pool, commands), strict=True):
        found = {entry["name"]: entry for entry in ended.json["parameters"]}
        wanted = by_hand(model)
        assert sorted(found) == sorted(wanted), layout
        for name, values in wanted.items():
            for key, value in (("lr", "max_lr"), ("weight_decay", "weight_decay"), ("eps", "eps")):
                assert found[name][key] == pytest.approx(values[value], rel=1e-12, abs=0), f"{layout}: {key} of {name}"


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
CLASSES = ["embedding", "matrix_m4", "matrix_m8", "output", "vector"]
COMMON = [*TINY, *STYLE, "--weight-decay", "2"]
OVERLAPPED = f"{SHARDED} --overlap-grad-reduce --overlap-param-gather"
BACK_ENDS = [TORCH, SHARDED, OVERLAPPED, f"{MEGATRON} --data-parallel-sharding-strategy optim"]


@pytest.mark.parametrize("back_end", [*BACK_ENDS, *NEXT])
def test_two_ranks_train_as_megatron_alone_does_with_the_same_groups(back_end: str, pool: Pool) -> None:
    """The rule's LRs and weight decays, given to an unpatched Megatron on one rank parameter by parameter."""
    # Main's v2 takes the norm of two ranks' gradients for 2**0.5 times what it is, with or without the patch.
    flags = [*COMMON, *(["--clip-grad", "0"] if back_end == SECOND else [])]
    (alone,) = pool.run(train, argv=flags, steps=5, hooks=ByHand(MATRICES))
    results = pool.run(train, ranks=2, argv=[*flags, *RULE, *back_end.split()], steps=5, hooks=Sharded())
    # Every class, whatever the rank that writes the log has a part of.
    logged = [line.split("weight decay:")[1] for line in pool.printed[1].splitlines() if "lr / weight decay:" in line]
    assert [[word.split()[0] for word in line.split("|")[:-1]] for line in logged] == [CLASSES] * 5
    (plain,) = pool.run(train, argv=flags, steps=5)
    for one in results:
        assert one.losses == pytest.approx(alone.losses, rel=1e-6)
        assert back_end == SECOND or one.grad_norms == pytest.approx(alone.grad_norms, rel=1e-5)
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
    flags = [*COMMON, *RULE, *WARMUPS[warmup], *(["--clip-grad", "0"] if back_end == SECOND else [])]
    (one,) = pool.run(train, argv=flags, steps=4, hooks=ObservedWithPatch())
    ranks = pool.run(train, ranks=2, argv=[*flags, *back_end.split()], steps=4, hooks=Sharded())
    # Megatron-FSDP v2 drops a group of which a rank has no part.
    both = [set(first) | set(second) for first, second in zip(*(two.extra.rates for two in ranks), strict=True)]
    assert both == [set(rates) for rates in one.extra.rates]
    assert ranks[0].losses == ranks[1].losses == pytest.approx(one.losses, rel=1e-6)


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


# --- checkpoints -----------------------------------------------------------------------------------------------------

HALF = 3
# Megatron-FSDP's checkpoints of gated MLPs want the wrapper that --bf16 brings.
SAVED = [*COMMON, "--bf16", "--train-iters", str(2 * HALF), *SHARDED.split()]


def saving(folder: Path) -> list[str]:
    return ["--save", str(folder), "--save-interval", str(HALF)]


def loading(folder: Path) -> list[str]:
    return ["--load", str(folder), "--ckpt-step", str(HALF)]


@pytest.mark.parametrize("warmup", ["exp", "decay-away"])
def test_resumed_is_the_same_to_the_last_bit(warmup: str, pool: Pool, tmp_path: Path) -> None:
    flags = [*SAVED, *RULE, *WARMUPS[warmup]]
    through = pool.run(train, ranks=2, argv=[*flags, *saving(tmp_path)], steps=2 * HALF, hooks=Sharded())
    resumed = pool.run(train, ranks=2, argv=[*flags, *loading(tmp_path)], steps=2 * HALF, hooks=Sharded())
    for before, after in zip(through, resumed, strict=True):
        assert bits(after.losses) == bits(before.losses[HALF:])
        assert after.checksums == before.checksums
        assert after.extra.rates == before.extra.rates[HALF:]
        assert after.extra.adam_steps == {HALF}
        assert len({tuple(rates) for rates in before.extra.rates}) == 2 * HALF + 1  # in the middle of the warmup


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A checkpoint of two ranks with a rule, and what the run did."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, pool.run(train, ranks=2, argv=[*SAVED, *RULE, *saving(folder)], steps=HALF, hooks=Sharded())[0]


CHANGES = {
    "--lr: 0.01 -> 0.02": [*RULE, "--lr", "0.02"],
    "--width-scaling: sqrt -> independent": [*RULE, "--width-scaling", "independent"],
    "--extra-warmup: none -> decay-away": [*RULE, "--extra-warmup", "decay-away"],
}


@pytest.mark.parametrize("difference", CHANGES)
def test_other_hyperparameters_are_refused(difference: str, pool: Pool, saved: tuple[Path, Outcome]) -> None:
    argv = [*SAVED, *CHANGES[difference], *loading(saved[0])]
    with pytest.raises(RankFailure) as caught:
        pool.run(train, ranks=2, argv=argv, steps=2 * HALF, hooks=Sharded())
    assert (
        f"ConfigError: --load {saved[0]}: expected the hyperparameters of the checkpoint (checkpoint -> this run: "
        f"{difference}); give the checkpoint's values, or add --override-width-scaling"
    ) in caught.value.errors[0]


def test_override_goes_on_with_the_new_numbers(pool: Pool, saved: tuple[Path, Outcome]) -> None:
    """Weights and moments are the checkpoint's, LR and weight decay this run's; then back to Megatron's own groups."""
    folder, before = saved
    (same, _), (after, _), (plain, _) = (
        pool.run(train, ranks=2, argv=[*SAVED, *flags, *loading(folder)], steps=HALF + 1, hooks=Sharded())
        for flags in (
            RULE,
            [*RULE, "--width-scaling", "independent", "--lr", "0.02", "--override-width-scaling"],
            ["--override-width-scaling"],
        )
    )
    for one in (same, after, plain):
        assert one.extra.start == {name: checksum.digest for name, checksum in before.checksums.items()}
        assert one.extra.moments == same.extra.moments > 0
        assert one.extra.adam_steps == {HALF}
        assert one.losses == same.losses
    wanted = {(0.02, 1.0), (0.02, 0.0), (0.02 / 4, 4.0), (0.02 / 8, 8.0)}
    assert {tuple(round(value, 12) for value in group) for group in after.extra.peaks} == wanted
    assert set(plain.extra.peaks) == {(0.01, 1.0), (0.01, 0.0)}
    assert after.checksums != same.checksums != plain.checksums


def test_a_warmup_may_start_at_a_checkpoint_that_has_none(pool: Pool, saved: tuple[Path, Outcome]) -> None:
    flags = [*SAVED, *RULE, "--extra-warmup", "exp", "--extra-warmup-iters", "2", "--override-width-scaling"]
    warmed = pool.run(train, ranks=2, argv=[*flags, *loading(saved[0])], steps=2 * HALF, hooks=Sharded())[0]
    plain = pool.run(train, ranks=2, argv=[*SAVED, *RULE, *loading(saved[0])], steps=2 * HALF, hooks=Sharded())[0]
    for step, (with_factor, without) in enumerate(zip(warmed.extra.rates, plain.extra.rates, strict=True)):
        for (lr, decay), (plain_lr, plain_decay) in zip(with_factor, without, strict=True):
            assert float.fromhex(lr) == pytest.approx(float.fromhex(plain_lr) * 4 ** min(0.0, step / 2 - 1), rel=1e-12)
            assert decay == plain_decay


@pytest.mark.parametrize(
    ("form", "error"), {"torch_dist": "does not match any model", "torch_dcp": "is_loading"}.items()
)
def test_megatrons_own_fsdp2_checkpoints_have_no_optimizer(form: str, error: str, pool: Pool, tmp_path: Path) -> None:
    """Without the patch as well: nothing can be resumed. Fails when Megatron can; then resume is to be tested here."""
    argv = [*COMMON, "--train-iters", "4", *TORCH.split(), "--ckpt-format", form, "--save-interval", "2"]
    with pytest.raises(RankFailure, match=error):
        save_and_resume(pool, [*argv, "--save", str(tmp_path), "--load", str(tmp_path)])


def save_and_resume(pool: Pool, argv: list[str]) -> None:
    for last in (2, 4):
        pool.run(train, ranks=2, argv=argv, steps=last, hooks=ShardedAlone())
