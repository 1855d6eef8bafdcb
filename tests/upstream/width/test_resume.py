"""Resuming: to the last bit with the same flags; refused with a diff under other ones; allowed where asked for."""

import math
from pathlib import Path

import pytest

from tests.support.commands import commands
from tests.support.observed import Observed, ObservedWithPatch, bits
from tests.support.pool import Pool, RankFailure
from tests.support.training import TINY, Hooks, Outcome, train

HALF = 4  # steps before the checkpoint, and after it
SQRT = ["--width-scaling", "sqrt", "--base-hidden-size", "8"]  # m = 4 for the hidden size of TINY
TENSOR = ["--tensor-model-parallel-size", "2"]
SHARDED = ["--use-distributed-optimizer"]
# AdamW's decay is large enough for decay-away to move within a few steps.
COMMON = [*TINY, "--train-iters", str(2 * HALF), "--weight-decay", "2"]


def run_to(pool: Pool, steps: int, flags: list[str], *, ranks: int = 2, hooks: Hooks | None = None) -> Outcome:
    """Train until iteration `steps` and return what rank 0 saw."""
    outcome: Outcome = pool.run(
        train, ranks=ranks, argv=[*COMMON, *flags], steps=steps, hooks=hooks or ObservedWithPatch()
    )[0]
    return outcome


def saving(folder: Path) -> list[str]:
    return ["--save", str(folder), "--save-interval", str(HALF), "--ckpt-format", "torch_dist"]


def loading(folder: Path) -> list[str]:
    return ["--load", str(folder), "--ckpt-step", str(HALF)]


# --- the same flags --------------------------------------------------------------------------------------------------

WARMUPS = {
    "none": [],
    "exp": ["--extra-warmup", "exp", "--extra-warmup-iters", "6"],
    "decay-away": ["--extra-warmup", "decay-away"],
}


@pytest.mark.parametrize(
    ("layout", "warmup"),
    [(TENSOR, "none"), (TENSOR, "exp"), (TENSOR, "decay-away"), (SHARDED, "decay-away"), ([*SHARDED, "--bf16"], "exp")],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_resumed_is_the_same_to_the_last_bit(pool: Pool, tmp_path: Path, layout: list[str], warmup: str) -> None:
    flags = [*layout, *SQRT, *WARMUPS[warmup]]
    through = run_to(pool, 2 * HALF, [*flags, *saving(tmp_path)])
    resumed = run_to(pool, 2 * HALF, [*flags, *loading(tmp_path)])
    assert len(through.losses) == 2 * HALF
    assert bits(resumed.losses) == bits(through.losses[HALF:])
    assert bits(resumed.grad_norms) == bits(through.grad_norms[HALF:])
    assert resumed.checksums == through.checksums
    assert resumed.extra.rates == through.extra.rates[HALF:]
    assert resumed.extra.adam_steps == {HALF}
    # The checkpoint was really in the middle of something.
    assert len({tuple(rates) for rates in through.extra.rates}) == 2 * HALF + 1
    assert resumed.extra.start != through.extra.start


# --- other flags -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A checkpoint of one rank, and the run that left it."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_to(pool, HALF, [*SQRT, *saving(folder)], ranks=1)


def refusal(pool: Pool, flags: list[str], hooks: Hooks | None = None) -> str:
    """The last line of the traceback with which a run on one rank fails."""
    with pytest.raises(RankFailure) as caught:
        run_to(pool, 2 * HALF, flags, ranks=1, hooks=hooks)
    return caught.value.errors[0].strip().splitlines()[-1]


CHANGES: list[tuple[str, list[str], str]] = [
    ("lr", [*SQRT, "--lr", "0.02"], "--lr: 0.01 -> 0.02"),
    ("base", ["--width-scaling", "sqrt", "--base-hidden-size", "16"], "--base-hidden-size: 8 -> 16"),
    ("rule", ["--width-scaling", "standard", "--base-hidden-size", "8"], "--width-scaling: sqrt -> standard"),
    (
        "exponents",
        "--width-scaling custom --base-hidden-size 8 --lr-width-exponent 0.5 --wd-width-exponent 1".split(),
        "--width-scaling: sqrt -> custom; --lr-width-exponent: None -> 0.5; --wd-width-exponent: None -> 1.0",
    ),
    ("decay", [*SQRT, "--weight-decay", "1"], "--start-weight-decay: 2.0 -> 1.0; --end-weight-decay: 2.0 -> 1.0"),
    ("vectors", [*SQRT, "--vector-lr", "0.03"], "--vector-lr: None -> 0.03"),
    ("warmup", [*SQRT, "--extra-warmup", "decay-away"], "--extra-warmup: none -> decay-away"),
]


@pytest.mark.parametrize(("flags", "difference"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_other_hyperparameters_are_refused(
    pool: Pool, saved: tuple[Path, Outcome], flags: list[str], difference: str
) -> None:
    folder, _ = saved
    assert refusal(pool, [*flags, *loading(folder)]) == (
        f"megatron_patch.errors.ConfigError: --load {folder}: expected the hyperparameters of the checkpoint "
        f"(checkpoint -> this run: {difference}); give the checkpoint's values, or add --override-width-scaling to go "
        "on with the new ones"
    )


def test_a_new_optimizer_may_have_any_hyperparameters(pool: Pool, saved: tuple[Path, Outcome]) -> None:
    folder, before = saved
    outcome = run_to(pool, 2 * HALF, [*SQRT, "--lr", "0.02", "--no-load-optim", *loading(folder)], ranks=1)
    assert outcome.extra.start == {name: checksum.digest for name, checksum in before.checksums.items()}
    assert outcome.extra.moments == 0
    assert max(peak for peak, _ in outcome.extra.peaks) == 0.02


def test_refusal_through_the_command(pool: Pool, tmp_path: Path) -> None:
    """One line, exit code 2, and the checkpoint is as it was."""
    argv = ["--cpu", "--mock-data", *COMMON, "--eval-iters", "0"]
    save = ["--save", "saved", "--save-interval", "1", "--exit-interval", "1"]
    environment = {"PYTHONWARNINGS": "ignore"}
    first, other = (
        pool.run(commands, distributed=False, argvs=[words], cwd=str(tmp_path), environment=environment)[0][0]
        for words in (
            [*argv, *SQRT, *save],
            [*argv, *SQRT, *save, "--load", "saved", "--base-hidden-size", "16"],
        )
    )
    assert (first.code, first.error) == (0, "")
    assert (other.code, other.error) == (2, "")
    errors = [line for line in other.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "(checkpoint -> this run: --base-hidden-size: 8 -> 16)" in errors[0]
    assert "Traceback" not in other.err
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"


# --- other flags, on purpose -----------------------------------------------------------------------------------------

# One for each class that Megatron keeps parameters in, as (ranks, flags).
BACK_ENDS: dict[str, tuple[int, list[str]]] = {
    "fp32": (1, []),
    "fp32, tensor parallel": (2, TENSOR),
    "bf16": (1, ["--bf16"]),
    "fp32, distributed optimizer": (2, SHARDED),
    "bf16, distributed optimizer": (2, [*SHARDED, "--bf16"]),
}


def peaks(base_lr: float, lr_factor: float, decay_factor: float) -> set[tuple[float, float]]:
    """(peak LR, weight decay multiplier) that a rule gives: matrices, embeddings, vectors. TINY ties the LM head."""
    return {(base_lr * lr_factor, decay_factor), (base_lr, 1.0), (base_lr, 0.0)}


def close(found: list[tuple[float, float]], expected: set[tuple[float, float]]) -> bool:
    """Whether the groups are those expected, each at least once and no other."""
    return all(
        any(all(math.isclose(a, b, rel_tol=1e-12) for a, b in zip(group, other, strict=True)) for other in others)
        for one, others in ((found, expected), (expected, found))
        for group in one
    )


@pytest.mark.parametrize("back_end", ["fp32, tensor parallel", "bf16", "bf16, distributed optimizer"])
def test_override_goes_on_with_the_new_numbers(pool: Pool, tmp_path: Path, back_end: str) -> None:
    """Weights and moments are the checkpoint's, LR and weight decay are this run's; the audit inside agrees."""
    ranks, layout = BACK_ENDS[back_end]
    before = run_to(pool, HALF, [*layout, *SQRT, *saving(tmp_path)], ranks=ranks)
    assert close(before.extra.peaks, peaks(0.01, 4**-0.5, 4**0.5))
    same = run_to(pool, HALF + 1, [*layout, *SQRT, *loading(tmp_path)], ranks=ranks)
    changed = "--width-scaling independent --base-hidden-size 4 --lr 0.02 --override-width-scaling".split()
    after = run_to(pool, 2 * HALF, [*layout, *changed, *loading(tmp_path)], ranks=ranks)
    assert close(after.extra.peaks, peaks(0.02, 1 / 8, 8.0))
    assert after.extra.start == same.extra.start == {n: c.digest for n, c in before.checksums.items()}
    assert after.extra.moments == same.extra.moments > 0
    assert after.extra.adam_steps == same.extra.adam_steps == {HALF}
    # Warmup is over after 2 of 100 steps, so the first LR after the load is that of Megatron's schedule: linear decay
    # over the remaining 98 from the peak to the minimum (whose multiplier is the peak's).
    fraction = (HALF - 2) / 98
    decays = {round(float.fromhex(decay), 12) for _, decay in after.extra.rates[0]}
    assert decays == {16.0, 2.0, 0.0}
    for (peak, _), (lr, _) in zip(after.extra.peaks, after.extra.rates[0], strict=True):
        low = 1e-3 * peak / 0.02
        assert float.fromhex(lr) == pytest.approx(low + (peak - low) * (1 - fraction), rel=1e-12)
    # The first loss is the weights' alone, the next ones are not.
    assert after.losses[0] == same.losses[0]
    assert len(after.losses) == HALF
    assert all(math.isfinite(loss) for loss in after.losses)


def test_override_starts_a_warmup_at_the_checkpoint(pool: Pool, saved: tuple[Path, Outcome]) -> None:
    folder, _ = saved
    flags = [*SQRT, "--extra-warmup", "exp", "--extra-warmup-iters", "4", "--override-width-scaling", *loading(folder)]
    warmed = run_to(pool, 2 * HALF, flags, ranks=1)
    plain = run_to(pool, 2 * HALF, [*SQRT, *loading(folder)], ranks=1)
    for step, (with_factor, without) in enumerate(zip(warmed.extra.rates, plain.extra.rates, strict=True)):
        for (lr, decay), (plain_lr, plain_decay) in zip(with_factor, without, strict=True):
            assert float.fromhex(lr) == pytest.approx(float.fromhex(plain_lr) * 4 ** min(0.0, step / 4 - 1), rel=1e-12)
            assert decay == plain_decay


# --- with and without the patch --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A checkpoint that Megatron saved by itself."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run_to(pool, HALF, saving(folder), ranks=1, hooks=Observed())


def test_checkpoint_from_before_the_patch(pool: Pool, plain: tuple[Path, Outcome]) -> None:
    folder, before = plain
    message = refusal(pool, [*SQRT, *loading(folder)])
    assert message.startswith(f"megatron_patch.errors.ConfigError: --load {folder}: expected")
    assert "(checkpoint -> this run: --width-scaling: none -> sqrt; --base-hidden-size: None -> 8)" in message

    after = run_to(pool, 2 * HALF, [*SQRT, "--override-width-scaling", *loading(folder)], ranks=1)
    assert close(after.extra.peaks, peaks(0.01, 4**-0.5, 4**0.5))
    assert after.extra.start == {name: checksum.digest for name, checksum in before.checksums.items()}
    assert after.extra.moments > 0
    assert after.extra.adam_steps == {HALF}


def test_checkpoint_from_before_the_patch_without_a_rule(pool: Pool, plain: tuple[Path, Outcome]) -> None:
    """Nothing is asked for, so nothing is different."""
    folder, _ = plain
    stock = run_to(pool, 2 * HALF, loading(folder), ranks=1, hooks=Observed())
    patched = run_to(pool, 2 * HALF, loading(folder), ranks=1)
    assert bits(patched.losses) == bits(stock.losses)
    assert patched.checksums == stock.checksums


@pytest.mark.parametrize("hooks", [Observed(), ObservedWithPatch()], ids=["plain Megatron", "the patch without flags"])
def test_checkpoint_with_a_rule_where_nobody_applies_it(pool: Pool, saved: tuple[Path, Outcome], hooks: Hooks) -> None:
    """Megatron itself stops, as the checkpoint has param groups that the run lacks; it goes on with no wrong LR."""
    folder, _ = saved
    message = refusal(pool, loading(folder), hooks)
    assert message.startswith("ValueError: ")
    assert "param_groups" in message


@pytest.mark.parametrize("back_end", ["fp32", "bf16", "fp32, distributed optimizer"])
def test_override_where_the_groups_are_other_ones(pool: Pool, tmp_path: Path, back_end: str) -> None:
    """From plain Megatron to a rule and back, by way of --override-width-scaling: two param groups, three, two.

    Every parameter keeps its moments: a step with an LR of 0 for all the steps before would show in the weights.
    """
    # Without clipping: the gradients' norm is a sum over the groups, and other groups sum in another order.
    ranks, layout = BACK_ENDS[back_end]
    layout = [*layout, "--clip-grad", "0"]
    there, back = tmp_path / "there", tmp_path / "back"
    before = run_to(pool, HALF, [*layout, *saving(there)], ranks=ranks, hooks=Observed())
    same = run_to(pool, HALF + 1, [*layout, *loading(there)], ranks=ranks, hooks=Observed())
    override = [*layout, "--override-width-scaling"]
    ruled = run_to(pool, HALF + 1, [*override, *SQRT, *loading(there), *saving(back)], ranks=ranks)
    assert close(ruled.extra.peaks, peaks(0.01, 4**-0.5, 4**0.5))
    assert ruled.extra.start == same.extra.start == {n: c.digest for n, c in before.checksums.items()}
    assert ruled.extra.moments == pytest.approx(same.extra.moments, rel=1e-12)
    assert ruled.extra.adam_steps == {HALF}
    # One step from the same weights and moments: embeddings and vectors, which the rule leaves alone, move alike.
    assert ruled.losses == same.losses
    moved = {name for name in same.checksums if ruled.checksums[name] != same.checksums[name]}
    assert moved == {name for name in same.checksums if name.endswith(("linear_qkv.weight", "linear_proj.weight"))} | {
        name for name in same.checksums if name.endswith(("linear_fc1.weight", "linear_fc2.weight"))
    }
    plain_again = run_to(pool, HALF + 2, [*override, "--load", str(back)], ranks=ranks)
    assert close(plain_again.extra.peaks, {(0.01, 1.0), (0.01, 0.0)})
    assert plain_again.extra.start == {n: c.digest for n, c in ruled.checksums.items()}
    assert plain_again.extra.adam_steps == {HALF + 1}


def test_override_of_a_checkpoint_that_keeps_its_state_in_groups(pool: Pool, tmp_path: Path) -> None:
    """--ckpt-format torch stores moments by their place in the groups: under other groups they would go astray."""
    torch = [*saving(tmp_path), "--ckpt-format", "torch", "--load", str(tmp_path)]
    before = run_to(pool, 1, [*SQRT, *torch], ranks=1)
    assert "(checkpoint -> this run: --lr: 0.01 -> 0.02)" in refusal(pool, [*SQRT, *torch, "--lr", "0.02"])
    message = refusal(pool, [*SQRT, *torch, "--lr", "0.02", "--override-width-scaling"])
    assert message.startswith(
        f"megatron_patch.errors.ConfigError: --override-width-scaling with {tmp_path}: expected a checkpoint of "
        "--ckpt-format torch_dist"
    )
    after = run_to(pool, 2, [*SQRT, *torch, "--override-width-scaling"], ranks=1)  # nothing to override
    assert after.extra.start == {name: checksum.digest for name, checksum in before.checksums.items()}
    assert after.extra.adam_steps == {1}
