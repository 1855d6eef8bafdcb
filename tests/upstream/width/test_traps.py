"""What upstream does to an honest caller (megatron-core 0.19.2), one story per test."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.building import LLAMA_STYLE, Builder, live
from tests.support.param_groups import CASES, MODELS, argv, assert_same, build_all, expected
from tests.support.pool import Pool, RankFailure
from tests.support.training import TINY, Hooks, Run, train

NO_DECAY = CASES["no-decay"]

# --- Megatron's own muP ----------------------------------------------------------------------------------------------

MUP = f"{LLAMA_STYLE} --ffn-hidden-size 96 --use-mup --mup-base-hidden-size 16"
# rule: weight-decay factor of a matrix (m = 4), of the embedding, of the LM head.
MUP_DECAY = {
    "standard": (1, 1, 1),
    "independent": (4, 1, 1),
    "sqrt-decay": (2, 0, 1),
    "no-decay": (0, 0, 0),
    "custom --lr-width-exponent 1 --wd-width-exponent 0.25": (2**0.5, 1, 1),
}


@pytest.mark.parametrize("rule", MUP_DECAY)
def test_megatrons_mup_scales_lr_and_eps_and_we_add_the_weight_decay(rule: str, pool: Pool, tmp_path: Path):
    """--use-mup divides LR, min LR and eps of every hidden matrix by m = 4, not those of the LM head, and no decay."""
    words = f"{MUP} --width-scaling {rule} --base-hidden-size 16".split()
    ((values, file),) = pool.run(build_all, runs=[words], directory=str(tmp_path))[0]
    matrix, embedding, output = MUP_DECAY[rule]
    base = {"max_lr": 0.01, "min_lr": 0.001, "lr": 0.01, "eps": 1e-8}
    wanted: dict[str, dict[str, float]] = {}
    for name in values:
        if "norm" in name:
            wanted[name] = {**base, "weight_decay": 0}
        elif "embedding" in name:
            wanted[name] = {**base, "weight_decay": 0.1 * embedding}
        elif "output" in name:
            wanted[name] = {**base, "weight_decay": 0.1 * output}
        else:
            scaled = {key: value / 4 for key, value in base.items()}
            wanted[name] = {**scaled, "weight_decay": 0.1 * matrix}
    assert len(values) == 9
    assert_same(values, wanted, rule)
    assert {p["name"]: p["weight_decay"] for p in file["parameters"]} == pytest.approx(
        {name: value["weight_decay"] for name, value in wanted.items()}, rel=1e-12
    )


def test_megatrons_mup_leaves_embedding_and_gains_to_vector_lr(pool: Pool, tmp_path: Path):
    words = f"{MUP} --width-scaling independent --base-hidden-size 16 --vector-lr 0.03".split()
    ((values, file),) = pool.run(build_all, runs=[words], directory=str(tmp_path))[0]
    for name, value in values.items():
        vector = "norm" in name or "embedding" in name
        lr = 0.03 if vector else 0.01 if "output" in name else 0.0025
        assert value["max_lr"] == pytest.approx(lr, rel=1e-12), name
        assert value["min_lr"] == pytest.approx(lr / 10, rel=1e-12), name
        assert value["eps"] == pytest.approx(1e-8 if vector or "output" in name else 2.5e-9, rel=1e-12), name
    assert {p["name"]: p["lr"] for p in file["parameters"]} == pytest.approx(
        {name: value["max_lr"] for name, value in values.items()}, rel=1e-12
    )


def test_measuring_megatrons_mup_changes_nothing_and_is_allowed(pool: Pool, tmp_path: Path):
    """Without a rule of ours there is nothing to audit: hyperparameters.json shows what Megatron set."""
    ((values, _), (measured, file)) = pool.run(build_both, words=MUP.split(), directory=str(tmp_path))[0]
    assert values == measured
    written = {p["name"]: (p["lr"], p["eps"]) for p in file["parameters"]}
    assert written["decoder.layers.0.mlp.linear_fc2.weight"] == pytest.approx((0.0025, 2.5e-9), rel=1e-12)
    assert written["output_layer.weight"] == pytest.approx((0.01, 1e-8), rel=1e-12)


def build_both(words: list[str], directory: str) -> list[Any]:
    """The live values without any flag of ours, and with --metrics-dir."""
    builder = Builder()
    plain = live(builder.build(words))
    measured = live(builder.build([*words, "--metrics-dir", directory]))
    return [(plain, {}), (measured, json.loads(Path(directory, "hyperparameters.json").read_text()))]


def test_mup_knows_one_multiplier_only(pool: Pool):
    """Megatron gives linear_fc2 the ratio of the hidden sizes; our weight decay by its own would break the product."""
    words = f"{MUP} --width-scaling independent --base-hidden-size 16 --base-ffn-hidden-size 32".split()
    with pytest.raises(
        RankFailure, match=r"--use-mup with m = 3 for .*linear_fc2.* and m = 4 for .*--base-hidden-size"
    ):
        pool.run(build_all, runs=[words])


@pytest.mark.parametrize("optimizer", ["", "--use-distributed-optimizer --bf16"])
def test_decoupled_lr_without_a_rule_is_megatrons_business(optimizer: str, pool: Pool, tmp_path: Path):
    """--metrics-dir beside --decoupled-lr only reports it (with a rule it is refused: two rules for one LR)."""
    words = f"{LLAMA_STYLE} --ffn-hidden-size 96 --decoupled-lr 0.003 {optimizer}".split()
    ((values, _), (measured, file)) = pool.run(build_both, words=words, directory=str(tmp_path))[0]
    assert values == measured
    lrs = {p["name"]: p["lr"] for p in file["parameters"]}
    assert lrs.pop("embedding.word_embeddings.weight") == lrs.pop("output_layer.weight") == 0.003
    assert set(lrs.values()) == {0.01}


# --- param groups ----------------------------------------------------------------------------------------------------


def override_facts() -> dict[str, Any]:
    """What Megatron compares on resume, and how our overrides meet its standard one."""
    from megatron.core.optimizer import get_standard_config_overrides, optimizer
    from megatron.training.training import get_megatron_optimizer_config

    from megatron_patch.upstream.width.groups import IDENTIFIER_KEYS
    from megatron_patch.upstream.width.plan import config_overrides
    from tests.support.training import global_names

    built = Builder().build([*argv("tied", NO_DECAY), "--scale-adam-eps"])
    config, _ = get_megatron_optimizer_config(built.args)
    ours = config_overrides(built.plan)
    parameters = global_names(built.model)
    decayed_twice = [
        name
        for name, parameter in parameters.items()
        for key, override in ours.items()
        if "wd_mult" in override
        and key.matches(parameter, name)
        and any(k.matches(parameter, name) for k in get_standard_config_overrides(config))
    ]
    return {
        "theirs": set(optimizer.param_group_identifier_keys),
        "ours": set(IDENTIFIER_KEYS),
        "decayed_twice": decayed_twice,
        "matches": sorted(sum(key.matches(p, n) for key in ours) for n, p in parameters.items()),
        "names": [key.with_name_predicate.name for key in ours],
        "types": {type(value) for override in ours.values() for value in override.values()},
    }


def test_overrides_meet_megatrons_own_without_a_conflict(pool: Pool):
    """Two overrides that give one key different values are an error, None beside a float a TypeError, and two
    predicates with one name are one: so ours leave vectors alone, hold floats, and are named by what they say.
    """
    (facts,) = pool.run(override_facts)
    assert facts["decayed_twice"] == []
    assert facts["types"] == {float}
    assert set(facts["matches"]) == {0, 1}, "a parameter matches two of our overrides"
    assert len(set(facts["names"])) == len(facts["names"]) == 2  # matrices; embeddings


def test_megatron_still_does_not_compare_eps_on_resume(pool: Pool):
    """Why lr_mult is always set and equal keys are an error. Where this fails, upstream has closed the gap."""
    (facts,) = pool.run(override_facts)
    assert facts["theirs"] - {"optimizer"} == facts["ours"]
    assert "eps" not in facts["theirs"]


def build_with_override(words: Sequence[str], glob: str, override: dict[str, Any]) -> None:
    """Set up in a script that has an override of its own."""
    from megatron.core.optimizer.optimizer_config import ParamKey
    from megatron.training import training

    original = training.get_megatron_optimizer_config

    def with_another(args: Any) -> Any:
        config, overrides = original(args)
        return config, {**overrides, ParamKey(name=glob): override}

    training.get_megatron_optimizer_config = with_another
    Builder().build(words)


def test_groups_that_megatron_would_mix_up_on_resume_are_refused(pool: Pool):
    """A script gives one layer an eps of its own: a group that differs in eps only would get the other's on resume."""
    words = argv("llama", NO_DECAY)
    with pytest.raises(RankFailure, match=r"two param groups share lr_mult=0\.25, wd_mult=0"):
        pool.run(build_with_override, words=words, glob="*linear_fc1*", override={"eps": 1e-6})


def test_a_scripts_own_learning_rate_is_an_error_not_a_surprise(pool: Pool):
    """Two LRs for one parameter: Megatron refuses. An LR that only an unscaled parameter gets, the audit."""
    words = argv("llama", NO_DECAY)
    with pytest.raises(RankFailure, match="Conflicting overrides for max_lr"):
        pool.run(build_with_override, words=words, glob="*linear_fc1*", override={"max_lr": 0.5})
    with pytest.raises(RankFailure, match=r"word_embeddings\.weight: the optimizer has max_lr = 0\.5, but"):
        pool.run(build_with_override, words=words, glob="*word_embeddings*", override={"max_lr": 0.5})


def test_without_a_rule_a_scripts_own_groups_are_left_alone(pool: Pool, tmp_path: Path):
    """To measure is not to set: groups of the script's own, even ones that resume badly, are its business."""
    words = [*MODELS["llama"].flags.split(), "--metrics-dir", str(tmp_path)]
    pool.run(build_with_override, words=words, glob="*linear_fc1*", override={"eps": 1e-6})


def build_without_min_lr(words: Sequence[str]) -> list[float]:
    """The min_lr of every group where the caller leaves OptimizerConfig.min_lr at its default, None."""
    from megatron.training import training

    built = Builder().build(words)
    config, _ = training.get_megatron_optimizer_config(built.args)
    config.min_lr = None
    optimizer = training.get_megatron_optimizer(config, built.model)
    return [group["min_lr"] for group in optimizer.param_groups]


def test_no_min_lr_is_none_at_all(pool: Pool):
    """OptimizerConfig.min_lr is None for who does not come from the command line; None times a factor is an error."""
    (found,) = pool.run(build_without_min_lr, words=argv("llama", NO_DECAY))
    assert {value or 0.0 for value in found} == {0.0}


# --- layers ----------------------------------------------------------------------------------------------------------


def frozen(words: Sequence[str], part: str) -> None:
    """Set up with everything frozen but the parameters whose name contains `part`."""
    from megatron_patch.upstream.width import planned
    from tests.support.training import global_names

    original = planned.describe

    def after_freezing(model: Any, *rest: Any) -> Any:
        for name, parameter in global_names(model).items():
            parameter.requires_grad_(part in name)
        return original(model, *rest)

    planned.describe = after_freezing
    Builder().build(words)


def test_a_rule_that_scales_nothing_is_an_error(pool: Pool):
    """Megatron accepts an override that matches no parameter in silence, and the run looks as if it were scaled."""
    words = argv("llama", NO_DECAY)
    with pytest.raises(RankFailure, match="--width-scaling no-decay scales no parameter: the model has vector only"):
        pool.run(frozen, words=words, part="norm")
    pool.run(frozen, words=words, part="linear_fc")  # frozen layers are no problem as such


def misnamed(words: Sequence[str], attribute: str, value: int) -> None:
    """Set up with a model that has another dimension than its config says."""
    from megatron_patch.upstream.width import planned

    original = planned.describe

    def after_meddling(model: Any, config: Any, *rest: Any) -> Any:
        setattr(config, attribute, value)
        return original(model, config, *rest)

    planned.describe = after_meddling
    Builder().build(words)


@pytest.mark.parametrize(
    ("model", "attribute", "layer", "fan_in"),
    [
        ("llama", "ffn_hidden_size", r"layers\.0\.mlp\.linear_fc2", 96),
        ("llama", "kv_channels", r"layers\.0\.self_attention\.linear_proj", 96),
        ("llama", "hidden_size", r"layers\.0\.self_attention\.linear_qkv", 64),
        ("moe", "moe_ffn_hidden_size", r"experts\.local_experts\.0\.linear_fc2", 48),
        ("mla", "q_lora_rank", r"linear_q_up_proj", 24),
    ],
)
def test_a_layer_that_is_not_what_its_name_says_is_an_error(
    model: str, attribute: str, layer: str, fan_in: int, pool: Pool
):
    """A base fan-in that belongs to another dimension would give a plausible and wrong m."""
    words = argv(model, NO_DECAY)
    with pytest.raises(RankFailure, match=rf"{layer}\.weight has the global fan-in {fan_in}, but .* of this model is"):
        pool.run(misnamed, words=words, attribute=attribute, value=100)


@pytest.mark.parametrize(
    "base", ["--base-q-lora-rank 8", "--base-moe-ffn-hidden-size 8", "--base-linear-attention-inner-size 8"]
)
def test_a_base_size_of_a_dimension_that_the_model_lacks(base: str, pool: Pool):
    """A --base flag that nothing reads is a mistake of the user's, who believes that it is honoured."""
    flag = base.split()[0]
    with pytest.raises(RankFailure, match=f"{flag} 8: expected a model with a "):
        pool.run(build_all, runs=[[*argv("llama", NO_DECAY), *base.split()]])


def unknown_layer(words: Sequence[str]) -> list[tuple[str, float, str]]:
    """(Name, m) of a layer of another name, and what was printed about it."""
    import torch

    from megatron_patch.upstream.width import planned
    from tests.support.training import global_names

    original, said = planned.describe, []

    def after_adding(model: Any, *rest: Any) -> Any:
        mlp = model[0].module.decoder.layers[0].mlp
        weight = global_names(model)["decoder.layers.0.mlp.linear_fc1.weight"]
        del mlp.linear_fc1.weight
        mlp.novelty = torch.nn.Module()
        mlp.novelty.weight = weight
        return original(model, *rest)

    import megatron.training

    planned.describe = after_adding
    megatron.training.print_rank_0 = said.append
    built = Builder().build(words)
    novelty = next(p.spec for p in built.plan.parameters if "novelty" in p.spec.name)
    return [(novelty.name, novelty.m, next(line for line in said if "novelty" in line))]


def test_an_unknown_layer_is_assumed_to_read_the_residual_stream_and_the_run_says_so(pool: Pool):
    """Neither silently unscaled nor silently scaled."""
    (((name, m, said),),) = pool.run(unknown_layer, words=argv("llama", NO_DECAY))
    assert (name, m) == ("decoder.layers.0.mlp.novelty.weight", 4)
    assert said.startswith("WARNING")
    assert "novelty.weight is no layer megatron_patch knows; m = 4" in said


# --- schedule --------------------------------------------------------------------------------------------------------


def over_time(words: Sequence[str], field: str, at: Sequence[int]) -> list[dict[str, float]]:
    """A live value of every parameter after the given numbers of steps of two samples each."""
    built = Builder().build(words)
    found, made = [], 0
    for steps in at:
        while made < steps:
            built.scheduler.step(2)
            made += 1
        found.append({name: values[field] for name, values in live(built).items()})
    return found


def test_initial_and_minimum_lr_are_scaled_like_the_peak(pool: Pool):
    """Megatron's --lr-warmup-init is one number for all groups, and so is --min-lr: unscaled, the ratio of the LRs
    drifts from 1 at the start through m^-a at the peak back to 1 in the end.
    """
    words = argv("llama", CASES["independent"], "--lr-warmup-iters 10 --lr-warmup-init 0.002")
    (found,) = pool.run(over_time, words=words, field="lr", at=[0, 5, 10, 55, 100])
    peaks = {name: values["max_lr"] for name, values in expected("llama", CASES["independent"]).items()}
    # 0.002 -> 0.01 in 10 steps, 0.01 -> 0.001 from step 10 to 100: half of it at step 55.
    for step, lrs in zip((0.002, 0.006, 0.01, 0.0055, 0.001), found, strict=True):
        assert lrs == pytest.approx({name: peak / 0.01 * step for name, peak in peaks.items()}, rel=1e-12)


def test_weight_decay_schedule_keeps_the_ratios(pool: Pool):
    """0.02 -> 0.1 over the run; the decay of the embeddings is given for its end and follows the same course."""
    words = argv(
        "llama",
        CASES["independent"],
        "--embedding-weight-decay 0.05 "
        "--weight-decay-incr-style linear --start-weight-decay 0.02 --end-weight-decay 0.1",
    )
    (found,) = pool.run(over_time, words=words, field="weight_decay", at=[0, 50, 100])
    for step, decays in zip((0.02, 0.06, 0.1), found, strict=True):
        for name, (kind, m) in MODELS["llama"].table.items():
            factor = {"vector": 0, "embedding": 0.5}.get(kind, m)
            assert decays[name] == pytest.approx(step * factor, rel=1e-12), name


def test_a_step_that_would_decay_a_weight_away_is_refused_before_training(pool: Pool):
    """independent keeps the product of the base, 4 * 0.3 = 1.2, for every matrix."""
    words = f"{LLAMA_STYLE} --ffn-hidden-size 96 --width-scaling independent --base-hidden-size 16".split()
    with pytest.raises(RankFailure, match=r"--weight-decay 0\.3: expected .* it is 1\.2"):
        pool.run(build_all, runs=[[*words, "--lr", "4", "--weight-decay", "0.3"]])


def test_embedding_decay_needs_a_base_to_be_a_multiple_of(pool: Pool):
    """Megatron keeps weight decays as multiples of one number: of 0 there is only 0."""
    words = argv("llama", CASES["independent"], "--weight-decay 0 --embedding-weight-decay")
    with pytest.raises(RankFailure, match=r"--embedding-weight-decay 0\.1: expected a --weight-decay above 0"):
        pool.run(build_all, runs=[[*words, "0.1"]])
    (((values, _),),) = pool.run(build_all, runs=[[*words, "0"]])
    assert {value["weight_decay"] for value in values.values()} == {0.0}


def width_dependent_factors(words: Sequence[str]) -> dict[str, float]:
    """The live LR over the peak of every parameter, with no Megatron schedule in between."""
    return {name: values["lr"] / values["max_lr"] for name, values in live(Builder().build(words)).items()}


@pytest.mark.parametrize(
    ("rule", "factors"),
    [
        ("sqrt", {"linear": 0.25, "output": 0.25}),
        # The LM head keeps its LR and decay, so it does not depend on width.
        ("sqrt --no-scale-output-layer", {"linear": 0.25, "output": 1}),
        # A dimension that did not grow: nothing of it is scaled, and its group must not collide with the embedding's.
        ("sqrt --base-ffn-hidden-size 96", {"linear": 0.25, "output": 0.25, "linear_fc2": 1}),
        # Only the weight decay depends on width: reason enough.
        ("custom --lr-width-exponent 0 --wd-width-exponent 1", {"linear": 0.25, "output": 0.25}),
    ],
)
def test_scope_of_the_extra_warmup_is_what_the_rule_scales(rule: str, factors: dict[str, float], pool: Pool):
    """--extra-warmup-scope width-dependent starts at 1/m = 1/4 where LR or decay depends on width, elsewhere at 1."""
    words = (
        f"{LLAMA_STYLE} --ffn-hidden-size 96 --width-scaling {rule} --base-hidden-size 16 "
        "--extra-warmup exp --extra-warmup-iters 10 --extra-warmup-scope width-dependent"
    ).split()
    (found,) = pool.run(width_dependent_factors, words=words)
    for name, value in found.items():
        wanted = [factor for part, factor in factors.items() if part in name]
        assert value == pytest.approx(wanted[-1] if wanted else 1, rel=1e-12), name


def test_the_proxy_itself_may_have_the_scope(pool: Pool):
    """At m = 1 nothing depends on width; a sweep runs proxy and target with the same flags."""
    words = (
        f"{LLAMA_STYLE} --ffn-hidden-size 96 --width-scaling no-decay --base-hidden-size 64 "
        "--extra-warmup exp --extra-warmup-iters 10 --extra-warmup-scope width-dependent"
    ).split()
    (found,) = pool.run(width_dependent_factors, words=words)
    assert found == pytest.approx(dict.fromkeys(found, 1), rel=1e-12)


# --- resume ----------------------------------------------------------------------------------------------------------

RESUMED = (
    "--hidden-size 32 --ffn-hidden-size 96 --lr-decay-style linear --lr 0.01 --min-lr 0.001 --lr-decay-iters 8 "
    "--lr-warmup-iters 2 --weight-decay 0.1 --adam-eps 1e-8"
)
RULE = "--width-scaling standard --base-hidden-size 8 --base-ffn-hidden-size 48 --scale-adam-eps"
# Matrices of one weight decay that differ in LR and eps alone: m = 4, and m = 2 for linear_fc2.
RESUMED_VALUES = {"linear_fc2.weight": (0.005, 0.0005, 5e-9), "weight": (0.0025, 0.00025, 2.5e-9)}


class Watched(Hooks):
    """Installs the package and keeps what the optimizer was going to use when the run (re)started."""

    def before_arguments(self) -> None:
        from megatron_patch.upstream.patch import Session, entry_hooks

        session = Session()
        session.add(tuple(h for h in entry_hooks(session) if "compile" not in h.target))

    def built(self, run: Run) -> None:
        self.values = live(run)

    def result(self, run: Run) -> Any:
        steps = [int(state["step"]) for state in run.optimizer.chained_optimizers[0].optimizer.state.values()]
        return self.values, set(steps)


def saving(folder: Path, *more: str) -> list[str]:
    """A run of four iterations that saves into `folder` when it stops, and goes on from there."""
    return [*TINY, *split(RESUMED, f"--train-iters 4 --save {folder} --load {folder} --save-interval 100", *more)]


def loading(folder: Path, *more: str) -> list[str]:
    """The same run, but what it loads stays as it is."""
    return [*TINY, *split(RESUMED, f"--train-iters 4 --load {folder}", *more)]


def split(*flags: str) -> list[str]:
    return " ".join(flags).split()


@pytest.mark.parametrize(
    ("ranks", "optimizer"), [(1, ""), (2, "--use-distributed-optimizer --bf16")], ids=["fp32", "distributed-bf16"]
)
def test_resume_keeps_groups_apart_that_differ_in_lr_and_eps_only(
    ranks: int, optimizer: str, pool: Pool, tmp_path: Path
):
    """Before 0.19 Megatron gave both groups the LR of the last one, and it still ignores eps; the losses are the proof
    that nothing else was mixed up either.
    """
    whole = pool.run(train, ranks=ranks, argv=saving(tmp_path / "a", RULE, optimizer), steps=4, hooks=Watched())
    folder = tmp_path / "b"
    pool.run(train, ranks=ranks, argv=saving(folder, RULE, optimizer), steps=2, hooks=Watched())
    rest = pool.run(train, ranks=ranks, argv=saving(folder, RULE, optimizer), steps=4, hooks=Watched())
    assert len(whole[0].losses) == 4
    assert rest[0].losses == whole[0].losses[2:]
    assert {n: c.digest for n, c in rest[0].checksums.items()} == {n: c.digest for n, c in whole[0].checksums.items()}
    seen = set()
    for outcome in rest:
        values, steps = outcome.extra
        assert steps == {4}
        for name, value in values.items():
            seen.add(name)
            lr, min_lr, eps = 0.01, 0.001, 1e-8
            if "linear" in name and name.endswith("weight"):
                lr, min_lr, eps = RESUMED_VALUES["linear_fc2.weight" if "linear_fc2" in name else "weight"]
            assert (value["max_lr"], value["min_lr"], value["eps"]) == pytest.approx((lr, min_lr, eps), rel=1e-12), name
            # After two steps of two samples the warmup is over: the coming step has the peak LR.
            assert value["lr"] == pytest.approx(lr, rel=1e-12), name
    assert {"decoder.layers.1.mlp.linear_fc2.weight", "embedding.word_embeddings.weight"} <= seen


@pytest.mark.parametrize(
    ("changed", "message", "layer", "field", "value"),
    [
        ("--min-lr 0.0005", r"--min-lr: 0\.001 -> 0\.0005", "linear_fc2", "min_lr", 0.00025),
        ("--base-ffn-hidden-size 24", "--base-ffn-hidden-size: 48 -> 24", "linear_fc2", "max_lr", 0.0025),
        ("--adam-eps 1e-6", "--adam-eps: 1e-08 -> 1e-06", "linear_fc2", "eps", 5e-7),
        ("--adam-eps 1e-6", "--adam-eps: 1e-08 -> 1e-06", "linear_fc1", "eps", 2.5e-7),
    ],
)
def test_resume_with_other_numbers(
    changed: str, message: str, layer: str, field: str, value: float, pool: Pool, checkpoint: Path
):
    """Megatron keeps what a group was saved with, eps in silence; we name the flag and both values, and with
    --override-width-scaling the new number holds. The other flags are in test_resume.py.
    """
    words = loading(checkpoint, RULE, changed)
    with pytest.raises(RankFailure, match=rf"checkpoint -> this run: {message}\)"):
        pool.run(train, argv=words, steps=3, hooks=Watched())
    (accepted,) = pool.run(train, argv=[*words, "--override-width-scaling"], steps=3, hooks=Watched())
    values, steps = accepted.extra
    assert steps == {3}, "Adam started anew"
    assert values[f"decoder.layers.0.mlp.{layer}.weight"][field] == pytest.approx(value, rel=1e-12)


@pytest.fixture(scope="module")
def checkpoint(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of iteration 2 under the rule."""
    folder = tmp_path_factory.mktemp("rule")
    pool.run(train, argv=saving(folder, RULE), steps=2, hooks=Watched())
    return folder


def test_metrics_can_be_switched_on_in_the_middle_of_a_run(pool: Pool, tmp_path: Path):
    """To measure is not to set: a checkpoint by a Megatron that never heard of us goes on to the last bit."""
    folder = tmp_path / "plain"
    pool.run(train, argv=saving(folder), steps=2)
    (unpatched,) = pool.run(train, argv=loading(folder), steps=4)
    (measured,) = pool.run(train, argv=loading(folder, f"--metrics-dir {tmp_path}"), steps=4, hooks=Watched())
    assert measured.losses == unpatched.losses
    assert measured.checksums == unpatched.checksums


# --- refusals, with the flags as Megatron's own parser spells them ---------------------------------------------------


def refusals(runs: list[str]) -> list[tuple[str, str]]:
    """(Kind of error, the flag it names) for each command line."""
    import os

    from megatron_patch.errors import ConfigError

    os.environ.update(WORLD_SIZE="2")  # nothing is started: for flags that need two ranks
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)  # FSDP refuses what tensor parallelism needs
    builder, found = Builder(), []
    for run in runs:
        try:
            builder.parse("--width-scaling sqrt --base-hidden-size 16".split(), run.split())
        except ConfigError as error:
            found.append(("ConfigError", error.flag))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        else:
            found.append(("accepted", ""))
    return found


REFUSED = {
    "--optimizer sgd": "--optimizer",
    "--optimizer adaptive_muon": "--optimizer",
    "--optimizer-cpu-offload --use-precision-aware-optimizer --use-distributed-optimizer": "--optimizer-cpu-offload",
    "--tensor-parallel-num-weight-shards 2": "--tensor-parallel-num-weight-shards",
    "--num-experts 4 --expert-tensor-parallel-num-weight-shards 2": "--expert-tensor-parallel-num-weight-shards",
    "--decoupled-lr 0.001 --untie-embeddings-and-output-weights": "--decoupled-lr",
    "--use-mup --mup-base-hidden-size 16": "--use-mup",
    "--optimizer-cuda-graph --weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1": (
        "--weight-decay-incr-style"
    ),
}
ACCEPTED = [
    "--use-megatron-fsdp --ckpt-format fsdp_dtensor",
    "--use-torch-fsdp2 --ckpt-format torch_dist --untie-embeddings-and-output-weights",
    "--optimizer-cuda-graph",
    *(
        f"--cuda-graph-impl {graph} --te-rng-tracker --extra-warmup decay-away"
        for graph in ("transformer_engine", "local")
    ),
]


def test_what_takes_another_way_to_the_parameters_is_refused_by_name(pool: Pool):
    """After Megatron's own validation, so an attribute that is spelt wrong, or renamed upstream, shows here."""
    (found,) = pool.run(refusals, runs=list(REFUSED), distributed=False)
    assert dict(zip(REFUSED, found, strict=True)) == {run: ("ConfigError", flag) for run, flag in REFUSED.items()}


def test_what_the_rules_do_go_with_is_accepted(pool: Pool):
    (found,) = pool.run(refusals, runs=ACCEPTED, distributed=False)
    assert dict(zip(ACCEPTED, found, strict=True)) == dict.fromkeys(ACCEPTED, ("accepted", ""))
