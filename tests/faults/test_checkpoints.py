"""Checkpoints from before the patch, checkpoints of the patch in plain Megatron, and other layouts of ranks."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.faulty import FLAGS, LAST, LINES, SAVED, iterations, metrics
from tests.support.monitored import read_lines
from tests.support.pool import Pool, RankFailure
from tests.support.training import TINY, Hooks, Outcome, Patched, train

# Without clipping: the gradients' norm is a sum over the param groups, and other groups sum in another order.
PLAIN = [*TINY, "--weight-decay", "2", "--clip-grad", "0", "--train-iters", str(LAST)]
SAVE = ["--save-interval", str(SAVED), "--ckpt-format", "torch_dist"]
METRICS = ["--alignment-interval", "1", "--spectral-interval", "2"]
# The rule at the base model's own width: every m is 1.
AT_BASE = ["--width-scaling", "independent", "--base-hidden-size", "32"]
RULE = ["--width-scaling", "independent", "--base-hidden-size", "8"]


def run(pool: Pool, argv: list[str], steps: int, hooks: Hooks | None = None) -> Outcome:
    outcome: Outcome = pool.run(train, argv=[*PLAIN, *argv], steps=steps, hooks=hooks)[0]
    return outcome


# --- from before the patch -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A checkpoint that Megatron saved by itself, and its run to the end."""
    folder = tmp_path_factory.mktemp("old")
    return folder, run(pool, [*SAVE, "--save", str(folder)], LAST)


def note(pool: Pool) -> str:
    """What a run said of the checkpoint."""
    lines = [line for line in pool.printed[0].splitlines() if "a checkpoint from before megatron_patch" in line]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (METRICS, "it was trained with the same hyperparameters"),
        ([*AT_BASE, "--extra-warmup", "decay-away"], "at this width the rule gives every parameter what it was"),
    ],
    ids=["metrics", "rule at m = 1"],
)
def test_old_checkpoint_goes_on_as_it_would_have(
    pool: Pool, tmp_path: Path, old: tuple[Path, Outcome], flags: list[str], said: str
) -> None:
    folder, undisturbed = old
    load = ["--load", str(folder), "--ckpt-step", str(SAVED), "--metrics-dir", str(tmp_path)]
    outcome = run(pool, [*flags, *load], LAST, Patched())
    assert f"> --load {folder}: " in note(pool)
    assert said in note(pool)
    assert outcome.losses == undisturbed.losses[SAVED:]
    assert outcome.checksums == undisturbed.checksums
    if flags == METRICS:
        lines = [json.loads(line) for line in (tmp_path / "alignment.jsonl").read_text().splitlines()]
        assert {line["iteration"] for line in lines} == set(range(SAVED + 1, LAST + 1))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--override-width-scaling"], "its optimizer goes on with other hyperparameters (--width-scaling: none -> in"),
        (["--finetune"], "only its weights are used, and the optimizer starts anew"),
    ],
    ids=lambda value: value[0],
)
@pytest.mark.parametrize("warmup", [[], ["--extra-warmup", "exp", "--extra-warmup-iters", "4"]], ids=["plain", "exp"])
def test_old_checkpoint_under_a_rule(
    pool: Pool, old: tuple[Path, Outcome], flags: list[str], said: str, warmup: list[str]
) -> None:
    folder, undisturbed = old
    load = ["--load", str(folder), "--ckpt-step", str(SAVED)]
    outcome = run(pool, [*RULE, *warmup, *flags, *load], SAVED + 1, Patched())
    assert said in note(pool)
    if flags != ["--finetune"]:  # which begins the data anew
        assert outcome.losses[0] == undisturbed.losses[SAVED], "the first loss is that of the checkpoint's weights"


@pytest.mark.parametrize(
    "flags",
    [RULE, [*RULE, "--extra-warmup", "decay-away"], ["--base-hidden-size", "8", "--extra-warmup", "decay-away"]],
    ids=["rule", "rule and warmup", "warmup"],
)
def test_old_checkpoint_under_a_rule_needs_a_word(pool: Pool, old: tuple[Path, Outcome], flags: list[str]) -> None:
    folder, _ = old
    with pytest.raises(RankFailure) as caught:
        run(pool, [*flags, "--load", str(folder), "--ckpt-step", str(SAVED)], LAST, Patched())
    message = caught.value.errors[0].strip().splitlines()[-1]
    assert message.startswith(f"megatron_patch.errors.ConfigError: --load {folder}: expected the hyperparameters of")
    assert "add --override-width-scaling" in message


# --- in plain Megatron -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [METRICS, ["--base-hidden-size", "8", "--extra-warmup", "exp", "--extra-warmup-iters", "3"]]
)
def test_plain_megatron_goes_on_where_the_groups_are_its_own(pool: Pool, tmp_path: Path, flags: list[str]) -> None:
    """Measured only, or warmed up to the end: it reads the checkpoint and does as the patch would have done."""
    run_flags = [*flags, *SAVE, "--save", str(tmp_path)]
    undisturbed = run(pool, run_flags, LAST, Patched())
    outcome = run(pool, ["--load", str(tmp_path), "--ckpt-step", str(SAVED)], LAST)
    assert outcome.losses == undisturbed.losses[SAVED:]
    assert outcome.checksums == undisturbed.checksums


def test_plain_megatron_refuses_a_rule_and_takes_the_weights(pool: Pool, tmp_path: Path) -> None:
    """Its own error: the checkpoint has param groups that the run lacks. Without them it starts from the weights."""
    undisturbed = run(pool, [*RULE, *SAVE, "--save", str(tmp_path)], SAVED + 1, Patched())
    load = ["--load", str(tmp_path), "--ckpt-step", str(SAVED)]
    with pytest.raises(RankFailure, match=r"\nValueError: .*param_groups"):
        run(pool, load, LAST)
    outcome = run(pool, [*load, "--no-load-optim"], SAVED + 1)
    assert outcome.losses == undisturbed.losses[SAVED:]


# --- other layouts ---------------------------------------------------------------------------------------------------

LAYOUTS = {
    "one rank": (1, []),
    "data parallel": (2, ["--micro-batch-size", "2", "--alignment-tokens", "64"]),
    "pipeline parallel": (2, ["--pipeline-model-parallel-size", "2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_on_another_layout(pool: Pool, tmp_path: Path, whole: tuple[Path, Outcome], layout: str) -> None:
    """From 2 tensor-parallel ranks: what is kept is as it was, what comes differs by the order of fp32 sums.

    The bound of 1e-4 is that of sums over at most 4096 numbers with 24 bits, four steps on; losses agree to 1e-5.
    """
    ranks, flags = LAYOUTS[layout]
    there, undisturbed = whole
    shutil.copytree(there / "transfer", tmp_path / "transfer")
    load = ["--load", str(there), "--ckpt-step", str(SAVED), "--metrics-dir", str(tmp_path / "transfer")]
    argv = [*FLAGS, *flags, *load]
    outcome: Outcome = pool.run(train, ranks=ranks, argv=argv, steps=LAST, hooks=Patched())[0]
    assert outcome.losses == pytest.approx(undisturbed.losses[SAVED:], rel=1e-5)
    assert outcome.grad_norms == pytest.approx(undisturbed.grad_norms[SAVED:], rel=1e-4)
    for name, checksum in undisturbed.checksums.items():
        assert outcome.checksums[name].norm == pytest.approx(checksum.norm, rel=1e-4), name
    for name in LINES:
        assert iterations(tmp_path, name) == iterations(there, name)
        mine, theirs = (read_lines(place / "transfer", name.removesuffix(".jsonl")) for place in (tmp_path, there))
        assert set(mine) == set(theirs)
        for key, line in mine.items():
            if key[0] <= SAVED:
                assert line == theirs[key]
                continue
            for field, value in line.items():
                expected = theirs[key][field]
                rel = 1e-3 if "singular" in field else 1e-4
                same = value == (pytest.approx(expected, rel=rel) if isinstance(expected, float) else expected)
                assert same or field == "kind", (key, field, value, expected)
    assert metrics(tmp_path, "run.json")["status"] == "finished"
    evaluations = [metrics(place, "run.json")["evaluations"] for place in (tmp_path, there)]
    assert [e["iteration"] for e in evaluations[0]] == [e["iteration"] for e in evaluations[1]]
    for mine_, theirs_ in zip(*evaluations, strict=True):
        assert mine_["set"] == theirs_["set"]
        assert mine_["lm loss"] == pytest.approx(theirs_["lm loss"], rel=1e-5)
    hyper = [{**metrics(place, "hyperparameters.json"), "iteration": 0} for place in (tmp_path, there)]
    assert hyper[0] == hyper[1]
