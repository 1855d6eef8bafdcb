"""Checkpoints of a run on the engine: resumed, it goes on as if it had not been stopped."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.engine import RUN, Watched, ds_json
from tests.support.pool import Pool, RankFailure
from tests.support.training import Outcome, train

STEPS, HALF = 6, 3
TP2 = ("--tensor-model-parallel-size", "2")
WARMUP = ("--extra-warmup", "decay-away")


def whole_and_resumed(
    pool: Pool, folder: Path, stage: int, ranks: int, *flags: str, **ds: Any
) -> tuple[list[Outcome], list[Outcome]]:
    """A run in one piece, and the second half of one in two."""
    engine = ds_json(folder, stage, **ds)
    argv = [*RUN, *WARMUP, *flags, *engine, "--train-iters", str(STEPS)]
    whole = pool.run(train, ranks=ranks, argv=argv, steps=STEPS, hooks=Watched())
    kept = ["--save", str(folder / "save"), "--save-interval", str(HALF)]
    pool.run(train, ranks=ranks, argv=[*argv, *kept], steps=HALF, hooks=Watched())
    resumed = pool.run(train, ranks=ranks, argv=[*argv, "--load", str(folder / "save")], steps=STEPS, hooks=Watched())
    return whole, resumed


@pytest.mark.parametrize(
    ("stage", "flags"),
    [(0, ()), (1, TP2), (2, ()), (3, ()), (3, TP2)],
    ids=["0-dp2", "1-tp2", "2-dp2", "3-dp2", "3-tp2"],
)
def test_resumed_is_uninterrupted_to_the_last_bit(
    pool: Pool, tmp_path: Path, stage: int, flags: tuple[str, ...]
) -> None:
    whole, resumed = whole_and_resumed(pool, tmp_path, stage, 2, *flags)
    for a, b in zip(whole, resumed, strict=True):
        assert b.losses == a.losses[HALF:]
        assert b.grad_norms == a.grad_norms[HALF:]
        assert b.extra[0] == a.extra[0][HALF:]
        assert all(np.array_equal(a.extra[1][name], b.extra[1][name]) for name in a.extra[1])


def convert(folder: str) -> None:
    """In a worker: what ``python -m deepspeed.checkpoint.ds_to_universal`` does."""
    from deepspeed.checkpoint import ds_to_universal

    sys.argv = ["ds_to_universal", "--input_folder", f"{folder}/deepspeed", "--output_folder", f"{folder}/universal"]
    ds_to_universal.main(ds_to_universal.parse_arguments())


LLAMA = (
    *("--swiglu", "--ffn-hidden-size", "64", "--untie-embeddings-and-output-weights", "--disable-bias-linear"),
    *("--normalization", "RMSNorm"),
)
UNIVERSAL = {"checkpoint": {"load_universal": True}}


def saved(pool: Pool, folder: Path, ranks: int, *flags: str) -> list[str]:
    """Train half of a run and save it; the flags that load it."""
    half = ["--save", str(folder / "save"), "--save-interval", str(HALF), "--train-iters", str(STEPS)]
    pool.run(train, ranks=ranks, argv=[*RUN, *WARMUP, *flags, *half], steps=HALF, hooks=Watched())
    return ["--load", str(folder / "save"), "--train-iters", str(STEPS)]


@pytest.mark.parametrize(
    ("stages", "before", "after"),
    [
        ((1, 1), (2, ()), (1, ())),
        ((1, 2), (1, ()), (2, ())),
        ((2, 1), (2, TP2), (1, ())),
        ((2, 2), (1, ()), (2, TP2)),
        ((1, 1), (2, (*TP2, *LLAMA)), (1, LLAMA)),
        ((3, 3), (2, ()), (1, ())),
        ((3, 3), (1, ()), (2, ())),
        ((3, 3), (2, TP2), (1, ())),
    ],
    ids=[
        "dp2-dp1",
        "dp1-dp2-stage-1-to-2",
        "tp2-tp1",
        "tp1-tp2",
        "tp2-tp1-llama",
        "stage-3-dp2-dp1",
        "stage-3-dp1-dp2",
        "stage-3-tp2-tp1",
    ],
)
def test_a_universal_checkpoint_goes_on_at_another_number_of_ranks(
    pool: Pool, tmp_path: Path, stages: tuple[int, int], before: tuple[int, Any], after: tuple[int, Any]
) -> None:
    (ranks, flags), (ranks_after, flags_after) = before, after
    load = saved(pool, tmp_path, ranks, *flags, *ds_json(tmp_path, stages[0]))
    pool.run(convert, distributed=False, folder=str(tmp_path / f"save/iter_{HALF:07d}"))
    straight = [*RUN, *WARMUP, *flags, "--train-iters", str(STEPS)]
    whole = pool.run(train, ranks=ranks, argv=straight, steps=STEPS, hooks=Watched())[0]
    resumed = pool.run(
        train,
        ranks=ranks_after,
        argv=[*RUN, *WARMUP, *flags_after, *ds_json(tmp_path, stages[1], **UNIVERSAL), *load],
        steps=STEPS,
        hooks=Watched(),
    )
    for one in resumed:
        print(max(abs(x - y) for x, y in zip(whole.losses[HALF:], one.losses, strict=True)))
        assert one.losses == pytest.approx(whole.losses[HALF:], abs=2e-6)
        assert one.grad_norms == pytest.approx(whole.grad_norms[HALF:], rel=1e-5)
        assert one.extra[0] == whole.extra[0][HALF:]


def refused(pool: Pool, ranks: int, argv: list[str]) -> str:
    with pytest.raises(RankFailure) as caught:
        pool.run(train, ranks=ranks, argv=argv, steps=STEPS, hooks=Watched())
    return str(caught.value)


def test_what_cannot_be_loaded_is_refused_in_one_line(pool: Pool, tmp_path: Path) -> None:
    engine = ds_json(tmp_path, 1)
    load = saved(pool, tmp_path, 2, *engine)
    said = refused(pool, 1, [*RUN, *WARMUP, *engine, *load])
    assert "expected as many data-parallel ranks as saved it (2), or a universal checkpoint; make it: python -m" in said
    said = refused(pool, 2, [*RUN, *WARMUP, *ds_json(tmp_path, 1, **UNIVERSAL), *load])
    assert "universal, the engine's part of the checkpoint; make it: python -m deepspeed.checkpoint" in said
    for stage in (0, 3):  # of which DeepSpeed would take the weights alone, or nothing
        said = refused(pool, 2, [*RUN, *WARMUP, *ds_json(tmp_path, stage), *load])
        assert f"expected a checkpoint of ZeRO stage {stage}; go on at stage 1 or 2, at which it was saved" in said
    said = refused(pool, 2, [*RUN, *WARMUP, *load])
    assert "expected a checkpoint of a run without --deepspeed" in said
    assert "add --deepspeed, or give another checkpoint" in said
    said = refused(pool, 2, [*RUN, *WARMUP, *engine, *load, "--lr", "2e-2"])
    assert "--lr: 0.01 -> 0.02" in said
    (tmp_path / "megatrons").mkdir()
    load = saved(pool, tmp_path / "megatrons", 2)
    assert "drop --deepspeed, or give another" in refused(pool, 2, [*RUN, *WARMUP, *engine, *load])


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_resumed_run_clips_as_it_says_itself(pool: Pool, tmp_path: Path, stage: int) -> None:
    """As Megatron's optimizer does; DeepSpeed would go on with the largest norm of the run that saved."""
    other = ["--clip-grad", "0.05"]
    resumed = []
    for name, engine in (("megatron", []), ("engine", ds_json(tmp_path, stage))):
        (tmp_path / name).mkdir()
        load = saved(pool, tmp_path / name, 2, *engine)
        argv = [*RUN, *WARMUP, *engine, *other, *load]
        resumed.append(pool.run(train, ranks=2, argv=argv, steps=STEPS, hooks=Watched())[0])
    megatron, engines = resumed
    assert min(megatron.grad_norms) > 0.5, "both values clip"
    assert engines.losses == pytest.approx(megatron.losses, abs=1e-6)
    for name, weights in megatron.extra[1].items():
        if not name.endswith("linear_qkv.bias"):
            assert np.linalg.norm(engines.extra[1][name] - weights) < 1e-5 * np.linalg.norm(weights), name


KEPT = ("--save-interval", "2", "--save-retain-interval", "4", "--train-iters", str(STEPS))


@pytest.mark.parametrize("stage", [1, 3])
def test_old_checkpoints_are_deleted_whole_and_a_chosen_one_is_loaded(pool: Pool, tmp_path: Path, stage: int) -> None:
    """--save-retain-interval, --ckpt-step and --use-checkpoint-args, as with Megatron's own checkpoints."""
    engine = ds_json(tmp_path, stage)
    argv = [*RUN, *WARMUP, *engine, *KEPT, "--save", str(tmp_path / "save")]
    whole = pool.run(train, ranks=2, argv=argv, steps=STEPS, hooks=Watched())[0]
    kept = sorted(path.name for path in (tmp_path / "save").glob("iter_*"))
    assert kept == ["iter_0000004", "iter_0000006"]
    assert all((tmp_path / "save" / name / "deepspeed").is_dir() for name in kept)

    # Nothing of the model, the rule or the warmup is given again.
    shape = {"--num-layers", "--hidden-size", "--num-attention-heads", "--max-position-embeddings"}
    rule = {"--width-scaling", "--base-hidden-size", "--vector-lr", "--extra-warmup"}
    words = [*RUN, *WARMUP]
    pairs = list(zip(words[::2], words[1::2], strict=True))
    assert shape | rule <= {flag for flag, _ in pairs}
    rest = [word for flag, value in pairs if flag not in shape | rule for word in (flag, value)]
    again = [*rest, *engine, "--train-iters", str(STEPS), "--load", str(tmp_path / "save"), "--ckpt-step", "4"]
    resumed = pool.run(train, ranks=2, argv=[*again, "--use-checkpoint-args"], steps=STEPS, hooks=Watched())[0]
    assert resumed.losses == whole.losses[4:]
    assert resumed.extra[0] == whole.extra[0][4:]


@pytest.mark.parametrize(
    ("how", "stage"), [("--finetune", 0), ("--finetune", 3), ("--no-load-optim", 1), ("--no-load-optim", 3)]
)
def test_weights_alone_can_be_loaded(pool: Pool, tmp_path: Path, stage: int, how: str) -> None:
    """Into a run with another rule and another LR, whose optimizer starts anew."""
    engine = ds_json(tmp_path, stage)
    load = saved(pool, tmp_path, 2, *engine)
    given = pool.run(train, ranks=2, argv=[*RUN, *WARMUP, *engine], steps=HALF, hooks=Watched())[0].extra[1]
    again = [*RUN, *engine, *load, how, "--lr", "1e-30", "--min-lr", "0", "--vector-lr", "1e-30"]
    kept = pool.run(train, ranks=2, argv=[*again, "--no-load-rng"], steps=STEPS, hooks=Watched())[0]
    assert all(np.allclose(kept.extra[1][name], given[name], atol=1e-7) for name in given)
    assert len(kept.losses) == (STEPS if how == "--finetune" else STEPS - HALF)


@pytest.mark.parametrize(
    ("stage", "ds"),
    [(1, {}), (1, {"data_types": {"grad_accum_dtype": "fp32"}}), (3, {})],
    ids=["1", "1-fp32-sums", "3"],
)
def test_bf16_resumed_is_uninterrupted_to_the_last_bit(
    pool: Pool, tmp_path: Path, stage: int, ds: dict[str, Any]
) -> None:
    whole, resumed = whole_and_resumed(pool, tmp_path, stage, 2, "--bf16", "--attention-softmax-in-fp32", **ds)
    for a, b in zip(whole, resumed, strict=True):
        assert b.losses == a.losses[HALF:]
        assert all(np.array_equal(a.extra[1][name], b.extra[1][name]) for name in a.extra[1])


def test_stage_1_goes_on_as_stage_2(pool: Pool, tmp_path: Path) -> None:
    one, two = ds_json(tmp_path, 1), ds_json(tmp_path, 2)
    load = saved(pool, tmp_path, 2, *one)
    whole = pool.run(
        train, ranks=2, argv=[*RUN, *WARMUP, *one, "--train-iters", str(STEPS)], steps=STEPS, hooks=Watched()
    )
    resumed = pool.run(train, ranks=2, argv=[*RUN, *WARMUP, *two, *load], steps=STEPS, hooks=Watched())
    assert resumed[0].losses == pytest.approx(whole[0].losses[HALF:], abs=1e-6)
    assert resumed[0].grad_norms == pytest.approx(whole[0].grad_norms[HALF:], rel=1e-6)
