"""--use-checkpoint-args brings our flags back as it does Megatron's model arguments; the command line wins."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from megatron_patch.config import BASE_DIMENSIONS
from megatron_patch.upstream import flags
from megatron_patch.upstream.width import audit
from tests.support.observed import ObservedWithPatch, bits
from tests.support.pool import Pool
from tests.support.training import TINY, train

STEPS = 2
SQRT = ["--width-scaling", "sqrt", "--base-hidden-size", "8", "--extra-warmup", "decay-away"]
# How a run measures, where it writes, and what it is allowed: each run's own.
NOT_RESTORED = {
    "alignment_interval",
    "alignment_tokens",
    "alignment_layers",
    "spectral_interval",
    "metrics_dir",
    "no_report",
    "reference_run",
    "reference_factor",
    "reference_count",
    "override_width_scaling",
    "cpu",
    "allow_untested_megatron",
    "allow_rank_differences",
    "audit_interval",
    "deepspeed",
    "deepspeed_config",
}


def parsed(*argv: str) -> Namespace:
    return flags.add_arguments(ArgumentParser(allow_abbrev=False)).parse_args(argv)


def test_every_flag_is_restored_or_the_runs_own() -> None:
    restored = {name for leader, followers in flags._RESTORED.items() for name in (leader, *followers)}
    assert restored | NOT_RESTORED == set(vars(parsed()))
    assert not restored & NOT_RESTORED


def test_what_is_restored_is_compared() -> None:
    """A flag that decides LR, weight decay or eps is looked at on every resume, so that none changes unseen."""
    restored = [name for leader, followers in flags._RESTORED.items() for name in (leader, *followers)]
    elsewhere = {"init_scaling", "extra_warmup_iters", "extra_warmup_fraction"}
    megatrons = {"use_mup", "lr", "min_lr", "start_weight_decay", "end_weight_decay", "adam_eps", "optimizer"}
    megatrons |= {"muon_scale_mode", "muon_extra_scale_factor", "muon_scalar_optimizer"}
    compared = dict(audit.CHECKPOINT_KEYS)
    assert set(compared) == set(restored) - elsewhere | megatrons
    assert {f"base_{name}" for name in BASE_DIMENSIONS} <= set(compared)
    defaults = vars(parsed())
    assert {name: compared[name] for name in compared if name not in megatrons} == {
        name: defaults[name] for name in compared if name not in megatrons
    }


WARM = "--extra-warmup exp --extra-warmup-iters 5 --base-hidden-size 8".split()


@pytest.mark.parametrize(
    ("saved", "given", "expected"),
    [
        (SQRT, [], SQRT),
        (SQRT, ["--width-scaling", "sqrt"], SQRT),
        (SQRT, ["--base-hidden-size=16"], [*SQRT, "--base-hidden-size", "16"]),
        (SQRT, ["--width-scaling=none"], ["--extra-warmup", "decay-away"]),
        (SQRT, ["--extra-warmup", "none"], SQRT[:4]),
        (
            "--width-scaling custom --base-hidden-size 8 --lr-width-exponent 1 --wd-width-exponent 2".split(),
            SQRT,
            SQRT,
        ),
        (WARM, ["--extra-warmup-fraction", "0.5"], [*WARM[:2], *WARM[4:], "--extra-warmup-fraction", "0.5"]),
        (["--vector-lr", "0.1", "--scale-adam-eps"], [], ["--vector-lr", "0.1", "--scale-adam-eps"]),
        (["--vector-lr", "0.1"], ["--vector-lr", "0.2"], ["--vector-lr", "0.2"]),
        (["--alignment-interval", "3", "--metrics-dir", "x", "--cpu"], [], []),
        ([], SQRT, SQRT),
    ],
)
def test_values(saved: list[str], given: list[str], expected: list[str]) -> None:
    args = parsed(*given)
    changed = flags.restore_from_checkpoint(args, parsed(*saved), given)
    assert args == parsed(*expected)
    assert parsed(*given, *" ".join(changed).split()) == args, "what is said is what was done"


def test_a_checkpoint_from_before_us_changes_nothing() -> None:
    args = parsed(*SQRT)
    assert flags.restore_from_checkpoint(args, Namespace(hidden_size=3), SQRT) == []
    assert args == parsed(*SQRT)


def test_a_resumed_run_needs_none_of_the_flags_again(pool: Pool, tmp_path: Path) -> None:
    """The rule and the warmup come from the checkpoint; the losses are those of an undisturbed run, to the last bit."""
    common = [*TINY, "--train-iters", str(2 * STEPS), "--weight-decay", "2"]
    save = ["--save", str(tmp_path), "--save-interval", str(STEPS), "--ckpt-format", "torch_dist"]
    through = pool.run(train, argv=[*common, *SQRT, *save], steps=2 * STEPS, hooks=ObservedWithPatch())[0]
    load = ["--load", str(tmp_path), "--ckpt-step", str(STEPS), "--use-checkpoint-args"]
    resumed = pool.run(train, argv=[*common, *load], steps=2 * STEPS, hooks=ObservedWithPatch())[0]
    said = [line for line in pool.printed[0].splitlines() if line.startswith("> --use-checkpoint-args")]
    restored = "--width-scaling sqrt --base-hidden-size 8 --extra-warmup decay-away"
    assert said == [f"> --use-checkpoint-args: {restored} from the checkpoint"]
    assert bits(resumed.losses) == bits(through.losses[STEPS:])
    assert resumed.extra.peaks == through.extra.peaks
    assert resumed.checksums == through.checksums
