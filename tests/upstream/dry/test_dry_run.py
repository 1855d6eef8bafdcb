"""The dry run against tables worked out by hand, real runs, and the largest configuration there is."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.errors import AuditError
from megatron_patch.theory.width import ParamSpec
from megatron_patch.upstream.dry.coverage import Held, Position, merge
from tests.support.building import COMMON
from tests.support.explaining import Ended, explain_all, explained
from tests.support.hybrids import MAMBA
from tests.support.param_groups import CASES, MODELS, argv, expected
from tests.support.pool import ROOT, Pool
from tests.support.training import MOE, TINY, Hooks, Run, train

CONFIGS = ROOT / "configs"


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_every_rule_by_hand(model: str, pool: Pool) -> None:
    """The same tables as for the live param groups of a real run, here of a single rank and of all of two by two."""
    layout = "--tensor-model-parallel-size 2 --sequence-parallel --world-size 4 --all-ranks" if model != "tied" else ""
    commands = [[*COMMON, "--json", *argv(model, case, layout)] for case in CASES.values()]
    for (name, case), ended in zip(CASES.items(), explained(pool, commands), strict=True):
        found = {entry["name"]: entry for entry in ended.json["parameters"]}
        wanted = expected(model, case)
        assert sorted(found) == sorted(wanted), name
        for parameter, (kind, m) in MODELS[model].table.items():
            entry, values = found[parameter], wanted[parameter]
            assert entry["class"] == {"qk": "vector"}.get(kind, kind), parameter
            assert entry["m"] == pytest.approx(m if "--base-hidden-size" in argv(model, case) else 1, rel=1e-12)
            for key, value in (("lr", "max_lr"), ("weight_decay", "weight_decay"), ("eps", "eps")):
                assert entry[key] == pytest.approx(values[value], rel=1e-12, abs=0), f"{name}: {key} of {parameter}"


class Recorded(Hooks):
    """Installs the package and keeps the LRs of every step."""

    def before_arguments(self) -> None:
        from megatron_patch.upstream.patch import Session, entry_hooks

        session = Session()
        session.add(tuple(h for h in entry_hooks(session) if "compile" not in h.target))

    def built(self, run: Run) -> None:
        self.lrs: list[list[float]] = []
        step = run.optimizer.step

        def noting() -> Any:
            self.lrs.append([group["lr"] for group in run.optimizer.param_groups])
            return step()

        run.optimizer.step = noting

    def result(self, run: Run) -> list[list[float]]:
        return self.lrs


RULE = "--width-scaling sqrt --base-hidden-size 16 --extra-warmup exp --extra-warmup-iters 4 --vector-lr 0.03".split()
RUNS = {
    "dense": (2, ["--tensor-model-parallel-size", "2", *RULE]),
    "experts": (2, [*MOE, "--expert-model-parallel-size", "2", "--untie-embeddings-and-output-weights", *RULE]),
    "hybrid": (2, ["--hybrid-layer-pattern", "M*-|M*-", "--pipeline-model-parallel-size", "2", *MAMBA, *RULE]),
    "scope": (1, [*RULE, "--extra-warmup-scope", "width-dependent"]),
    "mup": (1, ["--use-mup", "--mup-base-hidden-size", "16", "--width-scaling", "independent", *RULE[2:4]]),
    "growing batch": (1, [*RULE, "--step-batch-size-schedule", "0:2 128:4", "--train-iters", "50"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_real_run_agrees(name: str, pool: Pool, tmp_path: Path) -> None:
    """hyperparameters.json of a run says of every parameter what explain said, and every step has the LR it said."""
    ranks, flags = RUNS[name]
    tiny = list(TINY)
    if name == "growing batch":
        at = tiny.index("--global-batch-size")
        del tiny[at : at + 2]
    arguments = [*tiny, *flags, "--metrics-dir", str(tmp_path)]
    outcome = pool.run(train, ranks=ranks, argv=arguments, steps=6, hooks=Recorded())[0]
    real = json.loads((tmp_path / "hyperparameters.json").read_text())

    length = [] if "--train-iters" in flags else ["--train-iters", "6"]
    alone = [*length, "--world-size", str(ranks), "--json", "--schedule", "--all-ranks", "--cpu"]
    (ended,) = explained(pool, [[*arguments, *alone]])
    assert ended.json["parameters"] == real["parameters"]
    assert [ended.json[key] for key in ("rule", "exponents", "base")] == [
        real[key] for key in ("rule", "exponents", "base")
    ]
    peaks = {entry["lr"] for entry in real["parameters"]}
    assert len(outcome.extra) == 6
    for said, lrs in zip(ended.json["schedule"], outcome.extra, strict=False):
        scaled = {said["lr"] * peak / 0.01 for peak in peaks}
        if name == "scope":  # embeddings and vectors, here with 3 times the LR, have no extra warmup
            scaled = {said["lr"] / math.sqrt(2), 3 * said["lr"] / said["lr_factor"]}
        assert sorted(set(lrs)) == pytest.approx(sorted(scaled), rel=1e-12), said


def test_projections_into_the_latent_of_the_experts(pool: Pool) -> None:
    """Transformer Engine's alone, and shown where there is none; 24 of the proxy's 12, which the experts read, too."""
    flags = (
        "--hybrid-layer-pattern *E --moe-latent-size 24 --num-experts 2 --moe-ffn-hidden-size 48 --width-scaling sqrt"
    )
    bases = "--base-hidden-size 16 --base-moe-latent-size 12 --base-moe-ffn-hidden-size 48 --disable-bias-linear --json"
    (ended,) = explained(pool, [[*COMMON, *flags.split(), *bases.split()]])
    found = {entry["name"]: (entry["shape"], entry["m"]) for entry in ended.json["parameters"]}
    mlp = {name.removeprefix("decoder.layers.1.mlp."): entry for name, entry in found.items() if ".mlp." in name}
    assert mlp["fc1_latent_proj.weight"] == ([24, 64], 4.0)
    assert mlp["fc2_latent_proj.weight"] == ([64, 24], 2.0)
    assert mlp["experts.local_experts.1.linear_fc1.weight"] == ([48, 24], 2.0)
    assert mlp["experts.local_experts.1.linear_fc2.weight"] == ([24, 48], 1.0)
    assert mlp["router.weight"] == ([2, 64], 4.0)


def test_schedule_by_hand(pool: Pool) -> None:
    """Linear decay from 0.01 over 100 iterations; exp warmup of 10 from 1/4; a batch of 2 that grows to 8 samples."""
    flags = "--width-scaling independent --base-hidden-size 16 --extra-warmup exp --extra-warmup-iters 10 --min-lr 0"
    at = COMMON.index("--global-batch-size")
    command = [*COMMON[:at], *COMMON[at + 2 :], *flags.split(), "--json", "--schedule"]
    # From 256 tokens on, which are 16 samples, 8 a step.
    ramp = ["--step-batch-size-schedule", "0:2 256:8"]
    constant, growing = explained(pool, [[*command, "--global-batch-size", "8"], [*command, *ramp]])
    for step in constant.json["schedule"]:
        t = step["step"]
        factor = 4.0 ** min(0, t / 10 - 1)
        assert step["lr_factor"] == pytest.approx(factor, rel=1e-12)
        assert step["lr"] == pytest.approx(0.01 * (1 - t / 100) * factor, rel=1e-12)
    assert len(constant.json["schedule"]) == 100
    # 16 samples in 8 steps of 2, then 8 a step. Megatron takes 100 iterations of decay for 100 samples, since without
    # --global-batch-size it believes in a batch of one micro batch: the LR is 0 after 19 steps.
    samples = [2 * min(t, 8) + 8 * max(0, t - 8) for t in range(100)]
    for step, done in zip(growing.json["schedule"], samples, strict=True):
        assert step["lr"] / step["lr_factor"] == pytest.approx(0.01 * max(0, 1 - done / 100), rel=1e-12)


def test_model_predicts_the_first_updates(pool: Pool) -> None:
    """std 1/sqrt(64): a step of 0.005 in weights of 0.125."""
    flags = "--width-scaling sqrt --base-hidden-size 16 --init-scaling fan-in --untie-embeddings-and-output-weights"
    (ended,) = explained(pool, [[*COMMON, *flags.split(), "--json", "--schedule"]])
    assert ended.json["schedule"][0]["relative_update_prediction"] == pytest.approx(0.005 * math.sqrt(64), rel=1e-12)


@pytest.mark.parametrize(("world", "more"), [(1, ""), (4, "--tensor-model-parallel-size 2 --all-ranks")])
def test_muon_without_its_package(pool: Pool, world: int, more: str) -> None:
    """Square matrices of a model 4 times the base's width: m^-1/2 under Muon, m^-1 for the LM head under Adam."""
    flags = "--width-scaling independent --base-hidden-size 16 --untie-embeddings-and-output-weights --optimizer muon"
    layout = f"--muon-tp-mode duplicated --world-size {world} {more} --json --schedule --position-embedding-type rope"
    (ended,) = explained(pool, [[*COMMON, *flags.split(), *layout.split()]])
    keys = ("lr", "weight_decay", "eps", "optimizer")
    found = {g["class"]: tuple(g[key] for key in keys) for g in ended.json["groups"]}
    assert found == {
        "matrix": (0.005, 0.2, None, "muon"),
        "output": (0.0025, 0.4, 1e-8, "adam"),
        "embedding": (0.01, 0.1, 1e-8, "adam"),
        "vector": (0.01, 0.0, 1e-8, "adam"),
    }
    assert ended.json["exponents"] == [0.5, 0.5]


def test_muons_updates_are_predicted_by_its_scale(pool: Pool) -> None:
    """A step of lr 0.005 with b = sqrt(1.9 / 0.1) at momentum 0.9, in weights of 1/8; unit_rms_norm: b / 8, lr 0.01."""
    flags = "--width-scaling sqrt --base-hidden-size 16 --init-scaling fan-in --untie-embeddings-and-output-weights"
    runs = [
        [*COMMON, *flags.split(), *f"--optimizer muon --muon-scale-mode {mode} --json --schedule".split()]
        for mode in ("spectral", "shape_scaling")
    ]
    spectral, shaped = explained(pool, runs)
    b = math.sqrt(1.9 / 0.1)
    first = "relative_update_prediction"
    # The largest matrix is linear_fc1 (or fc2, of fan-in 256): both start with RMS 1/sqrt(C).
    assert spectral.json["schedule"][0][first] == pytest.approx(b * 0.005 * math.sqrt(64), rel=1e-12)
    assert shaped.json["schedule"][0][first] == pytest.approx(b / 8 * 0.01 * math.sqrt(64), rel=1e-12)


def test_megatrons_own_mup(pool: Pool) -> None:
    """--use-mup alone: LR and eps of matrices over 4, of no LM head, no weight decay changed; and m is shown."""
    flags = "--use-mup --mup-base-hidden-size 16 --untie-embeddings-and-output-weights --json"
    (ended,) = explained(pool, [[*COMMON, *flags.split()]])
    found = {g["class"]: (g["m"], g["lr"], g["weight_decay"], g["eps"]) for g in ended.json["groups"]}
    assert found == {
        "matrix": (4.0, 0.0025, 0.1, 2.5e-9),
        "output": (4.0, 0.01, 0.1, 1e-8),
        "embedding": (1.0, 0.01, 0.1, 1e-8),
        "vector": (1.0, 0.01, 0.0, 1e-8),
    }
    assert any(line.startswith("--use-mup alone is the rule standard") for line in ended.json["warnings"])


# --- all ranks -------------------------------------------------------------------------------------------------------

EXPERTS = (
    "--num-layers 4 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --disable-bias-linear --swiglu "
    "--untie-embeddings-and-output-weights --sequence-parallel --width-scaling independent --base-hidden-size 16 "
    "--global-batch-size 8"
)
LAYOUTS = {
    "2 x 2 x 2": (f"{EXPERTS} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", 8, 8),
    "experts whole": (f"{EXPERTS} --tensor-model-parallel-size 4 --expert-tensor-parallel-size 1", 8, 4),
    "interleaved": (
        "--num-layers 4 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
        "--microbatch-group-size-per-virtual-pipeline-stage 2 --context-parallel-size 2 --global-batch-size 8",
        4,
        2,
    ),
    "uneven": (
        "--num-layers 4 --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout E|ttttL --swiglu "
        "--untie-embeddings-and-output-weights",
        2,
        2,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_cover_the_model_once(name: str, pool: Pool) -> None:
    """What all ranks hold is what a single rank holds that has the whole model."""
    flags, world, distinct = LAYOUTS[name]
    layout = ["--expert-model-parallel-size", "2"] if "--num-experts" in flags else []
    whole = [word for word in flags.split() if word != "--sequence-parallel"]
    for option in [word for word in whole if "parallel" in word or "virtual" in word]:
        at = whole.index(option)
        del whole[at : at + 2]
    shared = [*COMMON, "--vocab-size", "255"]  # with one more, a multiple of 32 times 1, 2 or 4 ranks
    all_ranks = [*shared, *flags.split(), *layout, "--world-size", str(world), "--all-ranks"]
    split, one, shown = explained(pool, [[*all_ranks, "--json"], [*shared, *whole, "--json"], all_ranks])
    assert split.json["parameters"] == one.json["parameters"]
    assert split.json["groups"] == one.json["groups"]
    assert f"all {world} ranks, {distinct} of them built" in shown.out


def held(name: str, position: Position, **changes: Any) -> tuple[Position, Held]:
    """A matrix of 8 x 4 that two tensor-parallel ranks hold by rows; everything else of it may be changed."""
    spec = ParamSpec(name, (8, 4), "matrix", 4, 2.0, "hidden_size")
    values = {"class": "matrix", "shape": [8, 4], "fan_in": 4, "m": 2.0, "lr": 0.1, "weight_decay": 0.2, "eps": 1e-8}
    values["optimizer"] = "adam"
    known = Held(spec, (4, 4), split=True, is_expert=False, assumed=False, values=values)
    if "lr" in changes:
        values["lr"] = changes.pop("lr")
    return position, replace(known, **changes)


A, B = (Position(rank=r, tensor=r, pipeline=0, expert=0, expert_tensor=0) for r in (0, 1))
WHOLE = {"w": (8, 4)}


def merged(*parameters: tuple[Position, Held], whole: dict[str, tuple[int, ...]] = WHOLE) -> list[Held]:
    return merge([(position, [parameter]) for position, parameter in parameters], whole)


def test_halves_make_a_whole() -> None:
    (found,) = merged(held("w", A), held("w", B))
    assert found.spec.name == "w"
    # A second pair of the same ranks is replicas, as is a copy of a parameter that is not split.
    merged(held("w", A), held("w", B), held("w", replace(A, rank=2, expert=1)), held("w", replace(B, rank=3, expert=1)))
    merged(*(held("w", position, split=False, local_shape=(8, 4)) for position in (A, B)))


TAMPERED: dict[str, tuple[list[tuple[Position, Held]], dict[str, tuple[int, ...]], str]] = {
    "another LR": ([held("w", A), held("w", B, lr=0.3)], WHOLE, r"lr 0.1.* on rank 0 and .*lr 0.3.* on rank 1"),
    "a missing half": ([held("w", A)], WHOLE, "the 1 distinct slices hold 16 of 32 elements"),
    "the same half twice": ([held("w", A), held("w", replace(A, rank=1))], WHOLE, "hold 16 of 32"),
    "a slice too large": ([held("w", A), held("w", B, local_shape=(5, 4))], WHOLE, "hold 36 of 32"),
    "unequal copies": ([held("w", A), held("w", replace(A, rank=1), local_shape=(2, 4))], WHOLE, "different sizes"),
    "a missing parameter": ([held("w", A), held("w", B)], WHOLE | {"v": (3,)}, r"v of shape \[3\] is held by no rank"),
    "one too many": ([held("w", A), held("w", B), held("v", A)], WHOLE, "v on rank 0 is no parameter of the whole"),
    "another shape": ([held("w", A), held("w", B)], {"w": (8, 8)}, r"has the shape \[8, 8\], but .* \[8, 4\]"),
    "two stages": ([held("w", A), held("w", replace(B, pipeline=1))], WHOLE, r"more than one pipeline stage: \[0, 1\]"),
    "two owners": (
        [held("w", A, is_expert=True), held("w", replace(A, rank=1, expert=1, expert_tensor=1), is_expert=True)],
        WHOLE,
        r"more than one expert-parallel rank: \[0, 1\]",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_ranks_are_found(name: str) -> None:
    parameters, whole, message = TAMPERED[name]
    with pytest.raises(AuditError, match=message):
        merged(*parameters, whole=whole)


def tampered() -> list[Ended]:
    """In a worker: two ranks of which the second builds a model with another LR, as a broken rule would."""
    from megatron_patch.upstream.dry import run as dry_run

    original = dry_run.make_plan

    def make_plan(parameters: Any, width: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        if torch.distributed.get_rank() == 1:
            config.lr *= 2
        return original(parameters, width, config, *args, **kwargs)

    dry_run.make_plan = make_plan
    flags = "--width-scaling sqrt --base-hidden-size 16 --tensor-model-parallel-size 2 --all-ranks"
    return explain_all([[*COMMON, *flags.split()]])


def test_ranks_that_disagree_end_with_an_error(pool: Pool) -> None:
    ((ended,),) = pool.run(tampered, distributed=False)
    assert (ended.code, ended.out) == (2, "")
    assert "on rank 0 and " in ended.err and "on rank 1" in ended.err and ended.err.count("\n") == 1


# --- machines that are not here --------------------------------------------------------------------------------------


def test_flags_of_gpus(pool: Pool) -> None:
    """What the CPU platform refuses to train is explained all the same, and one line says how."""
    fp8 = "--bf16 --fp8-format hybrid --fp8-recipe tensorwise --width-scaling sqrt --base-hidden-size 16"
    commands = [
        f"{fp8} --context-parallel-size 2 --world-size 4",
        f"--bf16 {EXPERTS} --moe-grouped-gemm --moe-permute-fusion --tensor-model-parallel-size 2 "
        "--moe-token-dispatcher-type alltoall --attention-backend flash",
        "--bf16 --use-distributed-optimizer --use-precision-aware-optimizer --main-grads-dtype bf16",
        "--transformer-impl local --no-persist-layer-norm",
        "--bf16 --mtp-num-layers 1 --position-embedding-type rope --width-scaling sqrt --base-hidden-size 16",
    ]
    ended = explained(pool, [[*COMMON, *command.split(), "--json"] for command in commands])
    notes = [[line for line in e.json["warnings"] if line.startswith("no GPU here:")] for e in ended]
    assert [len(found) for found in notes] == [1, 1, 1, 0, 1]
    names = {entry["name"] for entry in ended[1].json["parameters"]}
    assert "decoder.layers.3.mlp.experts.local_experts.3.linear_fc2.weight" in names
    assert any("eh_proj" in entry["name"] and entry["m"] == 4 for entry in ended[4].json["parameters"])


def test_an_unknown_vocabulary_is_assumed(pool: Pool) -> None:
    at = COMMON.index("--tokenizer-type")
    rest = [*COMMON[:at], *COMMON[at + 4 :], "--tokenizer-type", "SentencePieceTokenizer", "--json"]
    missing, given = explained(pool, [[*rest, "--tokenizer-model", "absent.model"], [*rest, "--vocab-size", "1000"]])
    shapes = [
        [e["shape"] for e in ended.json["parameters"] if e["class"] == "embedding"][-1] for ended in (missing, given)
    ]
    assert shapes == [[32_000, 64], [1024, 64]]
    assert any("a vocabulary of 32,000 is assumed" in line for line in missing.json["warnings"])
    assert not any("vocabulary" in line for line in given.json["warnings"])


def test_nothing_is_written_and_no_script_is_run(pool: Pool, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('was run')")
    (tmp_path / "flags.yaml").write_text("width-scaling: sqrt\nbase-hidden-size: 16\nalignment-interval: 5\n")
    outputs = ["--save", "checkpoints", "--save-interval", "1", "--tensorboard-dir", "tb"]
    ended = explained(
        pool,
        [
            ["--config", "flags.yaml", "script.py", *COMMON, *outputs],
            ["--config", "flags.yaml", "script.py", *COMMON],
        ],
        cwd=str(tmp_path),
    )
    assert [(e.code, e.err) for e in ended] == [(0, "")] * 2
    assert "rule sqrt" in ended[0].out and "fan-in 64 / 16" in ended[0].out
    assert "a run also needs --metrics-dir" not in ended[0].out
    assert "a run also needs --metrics-dir" in ended[1].out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flags.yaml", "script.py"]


A_FLAG = "a flag of Megatron or of megatron_patch: explain never runs SCRIPT.py, which may have its own"
MISTAKES = {
    "--lrr 3": f"--lrr 3: expected {A_FLAG}; did you mean --lr? --ignore-unknown leaves it out",
    "--enable-gpt-oss": f"--enable-gpt-oss given: expected {A_FLAG}; --ignore-unknown leaves it out",
    "more": "more given: expected a flag; put the script first",
    "--lr abc": "--lr abc: expected a number; correct the value",
    "--width-scaling square": "--width-scaling square: expected one of 'none', 'standard', 'independent'",
    "--width-scaling sqrt": "--base-hidden-size not given: expected the hidden size of the proxy",
    "--rank 4": "--rank 4: expected 0 to 0, with 1 ranks; give --world-size too",
    "--world-size 3 --tensor-model-parallel-size 2": "Megatron refuses these arguments: world size (3) is not",
    "--num-attention-heads 5": "Megatron refuses --hidden-size 64, --num-attention-heads 5: it wants args.hidden_size",
    "--train-iters 0": "Megatron refuses --train-samples not given: either train-iters or",
    # What is refused with our flags, Megatron may refuse for a reason of the machine that is not there.
    "--alignment-interval 9 --use-megatron-fsdp": "--use-megatron-fsdp True: expected no FSDP, whose shards",
    "--optimizer adaptive_muon": "--optimizer adaptive_muon: expected one of adam, sgd, muon, soap, lion",
    "--cpu --hybrid-layer-pattern G-": "--hybrid-layer-pattern G-: expected the layers M, *, - and E with --cpu",
    "--hybrid-layer-pattern G-": "Megatron refuses these arguments: --hybrid-layer-pattern: gated delta nets (G) and",
    "--hybrid-layer-pattern M-X": "Megatron refuses these arguments: In main pattern, 'X' is not a valid layer symbol",
    "--cpu --fp8-format hybrid": "--fp8-format hybrid: expected no such flag with --cpu",
    "--width-scaling sqrt --base-hidden-size 16 --base-q-lora-rank 8": "--base-q-lora-rank 8: expected a model with",
}


def test_mistakes_are_one_line_each(pool: Pool) -> None:
    ended = explained(pool, [[*COMMON, *words.split()] for words in MISTAKES])
    for (words, message), e in zip(MISTAKES.items(), ended, strict=True):
        assert (e.code, e.out, e.err.count("\n")) == (2, "", 1), f"{words}: {e.err}"
        assert e.err.startswith(f"error: {message}"), e.err


def test_what_the_tool_sets_is_never_the_users_mistake(pool: Pool) -> None:
    """Megatron wants CUDA_DEVICE_MAX_CONNECTIONS to be 1 for tensor parallelism and not to be 1 for FSDP."""
    fsdp = "--use-megatron-fsdp --ckpt-format fsdp_dtensor --use-distributed-optimizer"
    tensor = "--tensor-model-parallel-size 2 --sequence-parallel"
    for ended in explained(pool, [[*COMMON, *words.split()] for words in (fsdp, tensor)]):
        assert (ended.code, ended.err) == (0, "")


def test_flags_of_the_scripts_own_can_be_left_out(pool: Pool) -> None:
    (ended,) = explained(pool, [[*COMMON, "--json", "--ignore-unknown", "--own-flag", "3", "--lr", "0.5"]])
    assert "left out, since no parser here knows it: --own-flag 3" in ended.json["warnings"]
    assert {p["lr"] for p in ended.json["parameters"]} == {0.5}


# --- size ------------------------------------------------------------------------------------------------------------


def test_70_billion_parameters_in_4_gib(tmp_path: Path) -> None:
    """One of 512 ranks, as a user calls it; about 16 s of processor time, limited for what grows with the weights."""
    words = ["--config", str(CONFIGS / "target_70b_h100_bf16.yaml"), "--world-size", "512", "--rank", "37", "--json"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_patch", "explain", *words], cwd=ROOT, stdout=out, stderr=err
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - started
    assert process.returncode == 0, (tmp_path / "err").read_text()
    found = json.loads((tmp_path / "out").read_text())
    # Tensor-parallel rank 5 of the first of four stages: the embedding, and 20 of the 80 layers in chunks of 5.
    layers = {int(e["name"].split(".")[2]) for e in found["parameters"] if e["name"].startswith("decoder.")}
    assert sorted(layers) == [first + i for first in (0, 20, 40, 60) for i in range(5)]
    (matrix,) = (g for g in found["groups"] if g["class"] == "matrix")
    per_layer = 8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672
    assert (matrix["m"], matrix["parameters"], matrix["numel"]) == (32.0, 80, 20 * per_layer)
    assert matrix["lr"] == pytest.approx(2e-3 / math.sqrt(32))
    assert matrix["weight_decay"] == pytest.approx(0.01 * math.sqrt(32))
    seconds, gib = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20
    print(f"70B: {seconds:.0f} s of processor time, {wall:.0f} s on the clock, {gib:.2f} GiB")
    assert seconds < 900
    assert gib < 4
