"""`WidthTransferScheduler` on top of Megatron's own scheduler, against arXiv 2510.19093, eqs. 14 and 15.

The setting of the paper's figure 7: 20,000 steps, m = 16, LR 0.004, weight decay 0.1, 10% linear warmup from 0, then
linear decay to 0; here with 8 samples per step, so that Megatron's `num_steps` is not the number of steps.
"""

import copy
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.pool import Pool, RankFailure
from tests.support.training import TINY, Hooks, Run, train

M, STEPS, BATCH, LR, DECAY = 16, 20_000, 8, 0.004, 0.1
FIG_7: dict[str, Any] = {
    "init_lr": 0.0,
    "max_lr": LR,
    "min_lr": 0.0,
    "lr_warmup_steps": 2_000 * BATCH,
    "lr_decay_steps": STEPS * BATCH,
    "lr_decay_style": "linear",
    "start_wd": DECAY,
    "end_wd": DECAY,
    "wd_incr_steps": STEPS * BATCH,
    "wd_incr_style": "constant",
    "use_checkpoint_opt_param_scheduler": False,
}
GROUPS: list[dict[str, Any]] = [
    # An embedding, and a matrix of m = 4 under the rule sqrt.
    {"max_lr": LR, "min_lr": 0.0, "wd_mult": 1.0, "lr_mult": 1.0},
    {"max_lr": LR / 2, "min_lr": 0.0, "wd_mult": 2.0, "lr_mult": 0.5, "width_dependent": 1.0},
]


def fig_7_lr(t: int) -> float:
    return LR * t / 2_000 if t <= 2_000 else LR * (STEPS - t) / 18_000


def exp_factor(t: int, length: int) -> float:
    """Eq. 14."""
    return M ** min(0.0, t / length - 1)


def decay_away_factors(lrs: Sequence[float], decays: Sequence[float]) -> list[float]:
    """Eq. 15, the product as the exponential of a sum of logarithms, each prefix summed exactly."""
    factors, total, lost = [], 0.0, 0.0
    for lr, decay in zip(lrs, decays, strict=True):
        factors.append((1 + (M * M - 1) * math.exp(2 * total)) ** -0.5)
        # Kahan's sum of log(1 - lr * decay)
        term = math.log1p(-lr * decay) - lost
        lost, total = (total + term) - total - term, total + term
    return factors


# --- jobs: the schedulers live where Megatron is imported ------------------------------------------------------------


def make(settings: dict[str, Any], warmup: dict[str, Any] | None, groups: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Megatron's scheduler or ours, and the groups it writes to."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from megatron_patch.upstream.width.scheduler import ExtraWarmup, WidthTransferScheduler

    optimizer = SimpleNamespace(param_groups=copy.deepcopy(groups))
    if warmup is None:
        return OptimizerParamScheduler(optimizer, **settings), optimizer.param_groups
    return WidthTransferScheduler(optimizer, warmup=ExtraWarmup(m=M, **warmup), **settings), optimizer.param_groups


def record(
    warmup: dict[str, Any] | None, settings: dict[str, Any], increments: Sequence[int]
) -> dict[str, list[list[float]]]:
    """LR and weight decay of each group, and our factor, as the steps 0, 1, ... use them."""
    settings = {**FIG_7, **settings}
    scheduler, groups = make(settings, warmup, [{**g, "min_lr": settings["min_lr"] * g["lr_mult"]} for g in GROUPS])
    seen: dict[str, list[Any]] = {"lr": [], "weight_decay": [], "factor": []}
    for increment in increments:
        seen["lr"].append([group["lr"] for group in groups])
        seen["weight_decay"].append([group["weight_decay"] for group in groups])
        seen["factor"].append(scheduler.factor() if warmup else 1.0)
        scheduler.step(increment)
    return seen


def resume(warmup: dict[str, Any], at: int, steps: int) -> tuple[list[Any], list[Any]]:
    """The LRs after step `at` of an uninterrupted run, and of one that is saved and loaded there."""
    scheduler, groups = make(FIG_7, warmup, GROUPS)
    for _ in range(at):
        scheduler.step(BATCH)
    fresh, fresh_groups = make(FIG_7, warmup, GROUPS)
    fresh.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    seen: tuple[list[Any], list[Any]] = [], []
    for _ in range(steps):
        for lrs, one in zip(seen, (groups, fresh_groups), strict=True):
            lrs.append([(group["lr"], group["weight_decay"]) for group in one])
        scheduler.step(BATCH)
        fresh.step(BATCH)
    return seen


def load(saved: dict[str, Any] | None, loading: dict[str, Any], at: int = 1_000) -> tuple[float, float, str]:
    """(LR of the first group over Megatron's, factor, saved keys) after loading a checkpoint of step `at`."""
    source, _ = make(FIG_7, saved, GROUPS)
    plain, plain_groups = make(FIG_7, None, GROUPS)
    for _ in range(at):
        source.step(BATCH)
        plain.step(BATCH)
    target, groups = make(FIG_7, loading, GROUPS)
    state = source.state_dict()
    target.load_state_dict(state)
    return groups[0]["lr"] / plain_groups[0]["lr"], target.factor(), " ".join(sorted(state))


# --- tests -----------------------------------------------------------------------------------------------------------


def test_exp_has_the_papers_values(pool: Pool):
    """Eq. 14 with T_W = 10,000 steps (80,000 samples): 1/16, 1/4, 1, and all in between."""
    (seen,) = pool.run(record, warmup={"kind": "exp", "steps": 10_000}, settings={}, increments=[BATCH] * STEPS)
    assert [seen["factor"][t] for t in (0, 5_000, 10_000, 19_999)] == [0.0625, 0.25, 1.0, 1.0]
    for t in range(STEPS):
        wanted = fig_7_lr(t) * exp_factor(t, 10_000)
        assert seen["lr"][t] == pytest.approx([wanted, wanted / 2], rel=1e-12, abs=0), t
    assert seen["weight_decay"][7_777] == [0.1, 0.2]


def test_decay_away_has_the_papers_values(pool: Pool):
    """Eq. 15: the state is a product of 20,000 factors, and steps count, not samples."""
    (seen,) = pool.run(record, warmup={"kind": "decay-away"}, settings={}, increments=[BATCH] * STEPS)
    assert [seen["factor"][t] for t in (0, 5_000, 10_000)] == pytest.approx([0.0625, 0.270236, 0.747678], abs=5e-7)
    factors = decay_away_factors([fig_7_lr(t) for t in range(STEPS)], [DECAY] * STEPS)
    for t in range(STEPS):
        wanted = fig_7_lr(t) * factors[t]
        assert seen["lr"][t] == pytest.approx([wanted, wanted / 2], rel=1e-9, abs=0), t


STYLES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "constant": {},
    "inverse-square-root": {},
    "WSD": {"wsd_decay_steps": 400 * BATCH, "lr_wsd_decay_style": "minus_sqrt"},
}


@pytest.mark.parametrize("style", STYLES)
def test_every_schedule_is_megatrons_times_the_factor(style: str, pool: Pool):
    """Whatever Megatron's schedule does (floor, plateau, initial LR), the factor multiplies all of it."""
    settings = {"lr_decay_style": style, "min_lr": 0.0002, "lr_warmup_steps": 100 * BATCH, **STYLES[style]}
    settings["lr_decay_steps"] = settings["wd_incr_steps"] = 2_000 * BATCH
    increments = [BATCH] * 2_200  # 200 steps beyond the end of the decay
    runs = {
        kind: pool.run(record, warmup=warmup, settings=settings, increments=increments)[0]
        for kind, warmup in {
            "megatron": None,
            "exp": {"kind": "exp", "steps": 1_500},
            "decay-away": {"kind": "decay-away"},
        }.items()
    }
    plain = [lrs[0] for lrs in runs["megatron"]["lr"]]
    assert len(set(plain)) > (50 if style == "constant" else 300)
    factors = {
        "exp": [exp_factor(t, 1_500) for t in range(2_200)],
        "decay-away": decay_away_factors(plain, [DECAY] * 2_200),
    }
    for kind, wanted in factors.items():
        for t in range(2_200):
            expected = [lr * wanted[t] for lr in runs["megatron"]["lr"][t]]
            assert runs[kind]["lr"][t] == pytest.approx(expected, rel=1e-11, abs=0), f"{kind} at {t}"


def test_batch_size_ramp_up_counts_steps(pool: Pool):
    """With a growing batch `num_steps` says nothing about the number of steps; a call that adds nothing is no step."""
    increments = [2] * 100 + [0] + [4] * 100 + [0, 0] + [8] * 100
    steps_before = [sum(1 for i in increments[:t] if i) for t in range(len(increments))]
    settings = {"lr_warmup_steps": 0, "lr_decay_steps": 2_000, "wd_incr_steps": 2_000}
    (plain,) = pool.run(record, warmup=None, settings=settings, increments=increments)
    lrs = [lr[0] for lr in plain["lr"]]
    (exp,) = pool.run(record, warmup={"kind": "exp", "steps": 250}, settings=settings, increments=increments)
    (away,) = pool.run(record, warmup={"kind": "decay-away"}, settings=settings, increments=increments)
    stepped = [t for t, i in enumerate(increments) if i]
    factors = decay_away_factors([lrs[t] for t in stepped], [DECAY] * len(stepped))
    for t in range(len(increments)):
        assert exp["lr"][t][0] == pytest.approx(lrs[t] * exp_factor(steps_before[t], 250), rel=1e-12), t
        if increments[t]:
            assert away["lr"][t][0] == pytest.approx(lrs[t] * factors[steps_before[t]], rel=1e-12), t


def test_weight_decay_schedule_enters_with_the_value_of_each_step(pool: Pool):
    """lambda in eq. 15 is the one that the step used, and the base one, not the group's."""
    settings = {"start_wd": 0.01, "end_wd": 0.5, "wd_incr_style": "linear", "lr_warmup_steps": 0}
    settings |= {"lr_decay_steps": 1_000 * BATCH, "wd_incr_steps": 1_000 * BATCH}
    (seen,) = pool.run(record, warmup={"kind": "decay-away"}, settings=settings, increments=[BATCH] * 1_000)
    lrs = [LR * (1 - t / 1_000) for t in range(1_000)]
    decays = [0.01 + 0.49 * t / 1_000 for t in range(1_000)]
    factors = decay_away_factors(lrs, decays)
    for t in range(1_000):
        assert seen["weight_decay"][t] == pytest.approx([decays[t], 2 * decays[t]], rel=1e-12), t
        assert seen["lr"][t][0] == pytest.approx(lrs[t] * factors[t], rel=1e-11), t


@pytest.mark.parametrize("kind", ["exp", "decay-away"])
def test_scope_width_dependent_leaves_the_other_groups_alone(kind: str, pool: Pool):
    """Embeddings and vectors keep Megatron's schedule; what depends on width has the factor."""
    warmup = {"kind": kind, "scope": "width-dependent", "steps": 1_000 if kind == "exp" else 0}
    (seen,) = pool.run(record, warmup=warmup, settings={}, increments=[BATCH] * 600)
    lrs = [fig_7_lr(t) for t in range(600)]
    factors = [exp_factor(t, 1_000) for t in range(600)] if kind == "exp" else decay_away_factors(lrs, [DECAY] * 600)
    for t in range(600):
        assert seen["lr"][t] == pytest.approx([lrs[t], lrs[t] / 2 * factors[t]], rel=1e-12, abs=0), t


def test_initial_lr_keeps_the_ratio_of_the_groups(pool: Pool):
    """Megatron starts every group at the one --lr-warmup-init, and the ratios are wrong until its warmup ends."""
    (seen,) = pool.run(record, warmup={}, settings={"init_lr": 0.001}, increments=[BATCH] * 2_001)
    for t in (0, 1, 1_000, 2_000):
        wanted = 0.001 + 0.003 * t / 2_000
        assert seen["lr"][t] == pytest.approx([wanted, wanted / 2], rel=1e-12), t


def test_minimum_lr_keeps_the_ratio_of_the_groups(pool: Pool):
    """The floor of a group is its own min_lr: at the end of the decay a matrix is not back at the embeddings' LR."""
    groups = [{**g, "min_lr": 0.0004 * g["lr_mult"]} for g in GROUPS]
    (lrs,) = pool.run(lr_at_end, groups=groups)
    assert lrs == pytest.approx([0.0004, 0.0002], rel=1e-12)


def lr_at_end(groups: list[dict[str, Any]]) -> list[float]:
    scheduler, live = make({**FIG_7, "min_lr": 0.0004}, {"kind": "exp", "steps": 10}, groups)
    for _ in range(20):
        scheduler.step(STEPS * BATCH)
    return [group["lr"] for group in live]


@pytest.mark.parametrize("at", [1, 999, 5_000])
@pytest.mark.parametrize("warmup", [{"kind": "exp", "steps": 10_000}, {"kind": "decay-away"}], ids=lambda w: w["kind"])
def test_resume_is_exact(warmup: dict[str, Any], at: int, pool: Pool):
    """Megatron's own load replays the past as one step of all samples, which must not count as a step of ours."""
    ((uninterrupted, resumed),) = pool.run(resume, warmup=warmup, at=at, steps=1_000)
    assert resumed == uninterrupted


def test_without_a_warmup_the_state_is_megatrons(pool: Pool):
    """A checkpoint of a run without an extra warmup has no key that Megatron alone would not write."""
    ((ratio, factor, keys),) = pool.run(load, saved=None, loading={})
    assert (ratio, factor) == (1.0, 1.0)
    ((_, _, ours),) = pool.run(load, saved={}, loading={})
    assert ours == keys


def test_checkpoint_without_warmup_state(pool: Pool):
    """Refused, since nobody knows how far the warmup was; with the override it starts at this checkpoint."""
    with pytest.raises(RankFailure, match="--extra-warmup exp: expected a checkpoint that was saved with it"):
        pool.run(load, saved=None, loading={"kind": "exp", "steps": 10})
    accepted = {"kind": "exp", "steps": 2_000, "accept_other_checkpoints": True}
    ((ratio, factor, _),) = pool.run(load, saved=None, loading=accepted)
    assert ratio == pytest.approx(factor) == pytest.approx(1 / 16)


def test_checkpoint_with_another_length(pool: Pool):
    """Refused: the LR would jump. With the override the new length holds, from the step where the run is."""
    saved = {"kind": "exp", "steps": 4_000}
    with pytest.raises(RankFailure, match=r"= 2000 steps: expected 4000 steps, as in the checkpoint"):
        pool.run(load, saved=saved, loading={"kind": "exp", "steps": 2_000})
    accepted = {"kind": "exp", "steps": 2_000, "accept_other_checkpoints": True}
    ((ratio, _, _),) = pool.run(load, saved=saved, loading=accepted)
    assert ratio == pytest.approx(16 ** (1_000 / 2_000 - 1), rel=1e-12)


def length_of(fraction: float, train_iters: int) -> int | None:
    from megatron_patch.config import WarmupConfig

    return WarmupConfig(kind="exp", fraction=fraction).steps(train_iters)


@pytest.mark.parametrize(
    ("fraction", "iters", "steps"),
    [(0.5, 20_000, 10_000), (0.07, 100, 7), (0.1, 3, 1), (0.0, 100, 0), (1.0, 100, 100), (0.29, 100, 29)],
)
def test_length_as_a_fraction(fraction: float, iters: int, steps: int, pool: Pool):
    """Rounded up, but 0.07 * 100 in floating point is more than 7 and must not become 8."""
    assert pool.run(length_of, fraction=fraction, train_iters=iters) == [steps]


# --- in Megatron's own training loop ---------------------------------------------------------------------------------


class SkipsTheThird(Hooks):
    """Installs the package; the third optimizer step fails as one with an fp16 overflow does."""

    def before_arguments(self) -> None:
        from megatron_patch.upstream.patch import Session, entry_hooks

        session = Session()
        session.add(tuple(h for h in entry_hooks(session) if "compile" not in h.target))

    def built(self, run: Run) -> None:
        self.lrs: list[float] = []
        step, self.calls = run.optimizer.step, 0

        def sometimes() -> Any:
            self.calls += 1
            self.lrs.append(max(group["lr"] for group in run.optimizer.param_groups))
            return (False, 0.0, None) if self.calls == 3 else step()

        run.optimizer.step = sometimes

    def result(self, run: Run) -> list[float]:
        return self.lrs


def test_training_loop_with_ramp_up_and_a_skipped_step(pool: Pool):
    """Batches of 2, 2, 4, 4, 4, 4 samples, the third update skipped: the factor advances once per update made."""
    at = TINY.index("--global-batch-size")
    flags = (
        "--width-scaling sqrt --base-hidden-size 16 --extra-warmup exp --extra-warmup-iters 4 --lr 0.01 --min-lr 0.01 "
        "--lr-decay-style constant --lr-warmup-iters 0 --micro-batch-size 2 --train-iters 50"
    ).split()
    growing = ["--step-batch-size-schedule", "0:2 128:4"]  # from 128 tokens, which are 4 samples
    argv = [*TINY[:at], *TINY[at + 2 :], *flags, *growing]
    (outcome,) = pool.run(train, argv=argv, steps=6, hooks=SkipsTheThird())
    # m = 2; the factors of the updates 0, 1, 2 (skipped), 2, 3, 4.
    assert outcome.extra == pytest.approx([0.01 * 2**e for e in (-1, -0.75, -0.5, -0.5, -0.25, 0)], rel=1e-12)
