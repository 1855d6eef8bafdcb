"""When the monitor measures, what it writes beside alignment.jsonl, and that it survives kills, skips and reruns."""

import contextlib
import io
import math
import re
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.errors import ConfigError
from tests.support.monitored import Monitored, read_lines
from tests.support.pool import Pool, RankFailure
from tests.support.reference import Model, Reference
from tests.support.training import TINY, Patched, Run, train

MODEL = Model()
KEYS = (
    "iteration layer kind fan_in fan_out m lr weight_decay tokens weight_norm update_norm relative_update "
    "weight_alignment update_alignment alignment_ratio relative_representation_change top_singular_value "
    "top_singular_value_error"
).split()


@dataclass
class Counting(Monitored):
    """Counts forward hooks in the model at the moment the loss is known."""

    hooks: dict[int, int] = field(default_factory=dict)

    def built(self, run: Run) -> None:
        super().built(run)
        inner = run.optimizer.zero_grad

        def zero_grad(*args: Any, **kwargs: Any) -> None:
            inner(*args, **kwargs)
            attached = sum(len(module._forward_hooks) for module in run.model[0].modules())
            self.hooks[run.args.curr_iteration + 1] = attached

        run.optimizer.zero_grad = zero_grad

    def stepped(self, run: Run, iteration: int, losses: dict[str, float]) -> None:
        assert not any(module._forward_hooks for module in run.model[0].modules())
        assert self.monitor.held_bytes == 0

    def result(self, run: Run) -> Any:
        return self.hooks


def test_hooks_exist_on_the_chosen_iterations_only(pool: Pool, tmp_path: Path) -> None:
    hooks = Counting(str(tmp_path), interval=2, spectral=3)
    attached = pool.run(train, argv=[*TINY, *MODEL.flags()], steps=6, hooks=hooks)[0].extra
    assert [iteration for iteration, number in attached.items() if number] == [2, 4, 6]
    lines = read_lines(tmp_path)
    assert {iteration for iteration, _ in lines} == {2, 3, 4, 6}
    for (iteration, _), line in lines.items():
        assert list(line) == KEYS
        assert (line["weight_alignment"] is not None) == (iteration % 2 == 0)
        assert (line["top_singular_value"] is not None) == (iteration % 3 == 0)


def test_layers_are_chosen_by_a_pattern(pool: Pool, tmp_path: Path) -> None:
    hooks = Monitored(str(tmp_path), layers=r"layers\.1\..*(/q|linear_fc2)$")
    pool.run(train, argv=[*TINY, *MODEL.flags()], steps=1, hooks=hooks)
    assert {layer for _, layer in read_lines(tmp_path)} == {
        "decoder.layers.1.self_attention.linear_qkv/q",
        "decoder.layers.1.mlp.linear_fc2",
    }


EXPERTS = "decoder.layers.1.mlp.experts.local_experts"
MIXTURE = Model(experts=4)
EP2 = ("--expert-model-parallel-size", "2")
EP2_TP2 = (*EP2, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "1")


@pytest.mark.parametrize(
    ("layers", "ranks", "flags"),
    [
        (r"layers\.1\.mlp\.experts\.local_experts\.3\.linear_fc2", 2, EP2),
        (r"layers\.1\.mlp\.experts\.local_experts\.0\.linear_fc2", 2, (*EP2, "--use-distributed-optimizer")),
        (r"layers\.0\..*linear_proj|experts\.local_experts\.3\.", 2, EP2_TP2),
        (r"layers\.0\..*(linear_proj|experts\.local_experts\.1)", 2, ("--pipeline-model-parallel-size", "2")),
        (r"shared_experts|local_experts\.[03]\.", 2, (*EP2, "--moe-token-dispatcher-type", "allgather")),
    ],
    ids=["last-rank", "first-rank", "tp2-etp1", "one-stage", "allgather"],
)
def test_ranks_without_what_others_measure_take_part_in_what_all_do(
    pool: Pool, tmp_path: Path, layers: str, ranks: int, flags: tuple[str, ...]
) -> None:
    argv = [*TINY, *MIXTURE.flags(), *flags]
    pool.run(train, ranks=ranks, argv=argv, steps=2, hooks=Monitored(str(tmp_path / "some"), layers=layers, spectral=1))
    pool.run(train, ranks=ranks, argv=argv, steps=2, hooks=Monitored(str(tmp_path / "all"), spectral=1))
    some, every = read_lines(tmp_path / "some"), read_lines(tmp_path / "all")
    assert {key for key in every if re.search(layers, key[1])} == set(some) != set()
    for key, line in some.items():
        for name, value in line.items():
            assert value == (
                pytest.approx(every[key][name], rel=1e-5) if isinstance(value, float) else every[key][name]
            )


@dataclass
class Frozen(Monitored):
    """Freezes every matrix of the transformer layers of one pipeline stage."""

    def before_arguments(self) -> None:
        super().before_arguments()
        from megatron.core.models.gpt import GPTModel

        build = GPTModel.__init__

        def frozen(model: Any, *args: Any, **kwargs: Any) -> None:
            build(model, *args, **kwargs)
            if not model.pre_process:
                for name, parameter in model.named_parameters():
                    parameter.requires_grad = not (name.startswith("decoder.layers") and parameter.dim() == 2)

        GPTModel.__init__ = frozen


def test_a_stage_with_nothing_to_measure_takes_part_in_what_all_do(pool: Pool, tmp_path: Path) -> None:
    argv = [*TINY, *MODEL.flags(), "--pipeline-model-parallel-size", "2"]
    hooks = Frozen(str(tmp_path), layers="decoder", spectral=1, scatter=False)
    pool.run(train, ranks=2, argv=argv, steps=2, hooks=hooks)
    lines, sublayers = read_lines(tmp_path), read_lines(tmp_path, "sublayers")
    assert {layer.split(".")[2] for _, layer in (*lines, *sublayers)} == {"0"}


def chunked(layers: str, directory: str, argv: list[str]) -> None:
    """Train with buckets so small that each layer is a chunk of its own or nearly."""
    from megatron_patch.metrics import meter, reduce

    reduce.BUCKET_ELEMENTS = meter.BUCKET_ELEMENTS = 700
    train(argv=argv, steps=1, hooks=Monitored(directory, layers=layers))


def test_chunks_of_layers_do_not_depend_on_experts_that_a_peer_does_not_have(pool: Pool, tmp_path: Path) -> None:
    layers = r"linear_proj|linear_qkv|local_experts\.3\."
    pool.run(chunked, ranks=2, layers=layers, directory=str(tmp_path), argv=[*TINY, *MIXTURE.flags(), *EP2_TP2])
    assert any("local_experts.3" in layer for _, layer in read_lines(tmp_path))


def test_a_pattern_is_searched_in_the_names_of_means_and_a_mean_is_over_all_experts(pool: Pool, tmp_path: Path) -> None:
    argv = [*TINY, *MIXTURE.flags(), *EP2]
    pool.run(train, ranks=2, argv=argv, steps=1, hooks=Monitored(str(tmp_path / "all"), spectral=1))
    hooks = Monitored(str(tmp_path / "mean"), layers=r"1\..*local_experts\.mean", spectral=1)
    pool.run(train, ranks=2, argv=argv, steps=1, hooks=hooks)
    for name in ("alignment", "equilibrium"):
        every, means = read_lines(tmp_path / "all", name), read_lines(tmp_path / "mean", name)
        assert {layer for _, layer in means} == {f"{EXPERTS}.mean.linear_{x}" for x in ("fc1/gate", "fc1/up", "fc2")}
        assert all(every[key] == line for key, line in means.items())
        assert set(every) == set(read_lines(tmp_path / "all"))


def test_an_interval_longer_than_the_run_is_said(pool: Pool, tmp_path: Path) -> None:
    hooks = Monitored(str(tmp_path), interval=2, spectral=1000)
    printed = pool.run(said, argv=[*TINY, *MODEL.flags()], hooks=hooks)[0]
    warnings = [line for line in printed.splitlines() if "nothing is measured" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("WARNING: --spectral-interval 1000: no iteration from 1 to ")


def said(argv: list[str], hooks: Monitored) -> str:
    """Return what a run prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(argv=argv, steps=2, hooks=hooks)
    return printed.getvalue()


def test_a_learning_rate_below_the_resolution_of_fp32_reports_no_update(pool: Pool, tmp_path: Path) -> None:
    pool.run(train, argv=[*TINY, *MODEL.flags(), "--lr", "1e-10"], steps=2, hooks=Monitored(str(tmp_path)))
    keys = ("update_norm", "relative_update", "update_alignment", "alignment_ratio", "relative_representation_change")
    for line in read_lines(tmp_path).values():
        assert [line[key] for key in keys] == [None] * 5
        assert line["weight_alignment"] is not None


def test_a_pattern_that_matches_nothing_is_refused(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="--alignment-layers nosuchlayer"):
        pool.run(train, argv=[*TINY, *MODEL.flags()], steps=1, hooks=Monitored(str(tmp_path), layers="nosuchlayer"))


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_a_killed_and_resumed_run_ends_with_the_files_of_an_uninterrupted_one(
    pool: Pool, tmp_path: Path, dropout: str
) -> None:
    argv = [*TINY, *MODEL.flags(), "--train-iters", "6", "--use-distributed-optimizer"]
    argv += ["--alignment-interval", "1", "--spectral-interval", "2", "--ckpt-format", "torch_dist"]
    argv += ["--save-interval", "3", "--attention-dropout", dropout, "--hidden-dropout", dropout]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pool.run(train, ranks=2, argv=[*argv, "--save", str(whole)], steps=6, hooks=Patched())
    argv += ["--save", str(killed), "--load", str(killed)]
    pool.run(train, ranks=2, argv=argv, steps=3, hooks=Patched())
    with open(killed / "transfer" / "alignment.jsonl", "a", encoding="utf-8") as file:  # as far as the killed run got
        file.write(
            '{"iteration": 4, "layer": "decoder.layers.0.mlp.linear_fc2", "weight_norm": 1.0}\n{"iteration": 5, '
        )
    pool.run(train, ranks=2, argv=argv, steps=6, hooks=Patched())
    for name in ("alignment.jsonl", "equilibrium.jsonl", "sublayers.jsonl"):
        assert (killed / "transfer" / name).read_bytes() == (whole / "transfer" / name).read_bytes(), name


def test_a_run_whose_weights_become_nan_goes_on_and_its_metrics_are_null(pool: Pool, tmp_path: Path) -> None:
    argv = [*TINY, *MODEL.flags(), "--lr", "1e18", "--clip-grad", "0", "--weight-decay", "0"]
    argv += ["--no-check-for-nan-in-loss-and-grad"]
    pool.run(train, argv=argv, steps=3, hooks=Monitored(str(tmp_path), spectral=1))
    lines = read_lines(tmp_path)
    assert {iteration for iteration, _ in lines} == {1, 2, 3}
    for (iteration, _), line in lines.items():
        measured = [line[key] for key in ("weight_norm", "top_singular_value", "top_singular_value_error")]
        assert (None in measured) == (iteration == 3), line
        assert not any(isinstance(value, float) and not math.isfinite(value) for value in line.values())


@dataclass
class Skipping(Monitored):
    """Lets the optimizer of one rank say that it skipped its second step, as at an overflow."""

    def built(self, run: Run) -> None:
        inner = run.optimizer.step

        def step() -> Any:
            succeeded, *rest = inner()
            return (succeeded and not (run.args.curr_iteration == 1 and run.args.rank == 0), *rest)

        run.optimizer.step = step
        super().built(run)


def test_a_skipped_update_is_null_on_every_line(pool: Pool, tmp_path: Path) -> None:
    argv = [*TINY, *MODEL.flags(), "--pipeline-model-parallel-size", "2"]
    pool.run(train, ranks=2, argv=argv, steps=3, hooks=Skipping(str(tmp_path)))
    for (iteration, _), line in read_lines(tmp_path).items():
        assert (line["update_norm"] is None) == (iteration == 2)
        assert line["weight_alignment"] is not None


@pytest.mark.parametrize(
    ("model", "ranks", "flags"),
    [
        (MODEL, 1, ()),
        (MODEL, 2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
        (Model(norm="LayerNorm", bias=True, gated=False, groups=4), 2, ("--tensor-model-parallel-size", "2")),
        (Model(experts=4, shared=24), 1, ()),
    ],
    ids=["one", "tp2-sp", "bias-tp2", "moe"],
)
def test_sublayer_gain_is_that_of_the_reference(
    pool: Pool, tmp_path: Path, model: Model, ranks: int, flags: tuple[str, ...]
) -> None:
    from megatron_patch.metrics.sample import sample_positions

    pool.run(train, ranks=ranks, argv=[*TINY, *model.flags(), *flags], steps=1, hooks=Monitored(str(tmp_path)))
    reference = Reference(model)
    next(reference.train(1, 1, 10))
    positions = sample_positions(model.length * 2, 10, 1)
    lines = read_lines(tmp_path, "sublayers")
    assert {layer for _, layer in lines} == set(reference.recorder.outputs)
    for name, output in reference.recorder.outputs.items():
        first = {"self_attention": "linear_qkv", "mlp": "router" if model.experts else "linear_fc1"}
        inputs = reference.recorder.inputs[f"{name}.{first[name.rpartition('.')[2]]}"]
        rms = [float(t[:, :2].reshape(-1, model.hidden)[positions].square().mean().sqrt()) for t in (inputs, output)]
        line = lines[1, name]
        assert line["input_rms"] == pytest.approx(rms[0], rel=1e-5)
        assert line["output_rms"] == pytest.approx(rms[1], rel=1e-5)
        assert line["gain"] == pytest.approx(rms[1] / rms[0], rel=1e-5)


def test_weight_rms_stands_beside_the_recurrence_run_on_the_live_schedule(pool: Pool, tmp_path: Path) -> None:
    from megatron_patch.theory.equilibrium import trajectory

    argv = [*TINY, *MODEL.flags(), "--lr-decay-style", "linear", "--lr-decay-iters", "4", "--lr-warmup-iters", "2"]
    pool.run(train, ranks=2, argv=argv, steps=4, hooks=Monitored(str(tmp_path), spectral=1))
    lines, equilibrium = read_lines(tmp_path), read_lines(tmp_path, "equilibrium")
    layers = {layer for _, layer in lines}
    for layer in layers:
        schedule = [(lines[i, layer]["lr"], lines[i, layer]["weight_decay"]) for i in range(1, 5)]
        assert schedule[0][0] == 0.0 < schedule[1][0]
        predicted = trajectory(schedule, rho_0=equilibrium[1, layer]["weight_rms"])
        for i, step in enumerate(predicted, start=1):
            line = equilibrium[i, layer]
            assert line["predicted_weight_rms"] == pytest.approx(step.rho, rel=1e-6)
            lr, weight_decay = schedule[i - 1]
            if lr:
                assert line["predicted_relative_update"] == pytest.approx(step.relative_update, rel=1e-6)
                scale = (lr / weight_decay) ** 0.5 * MODEL.hidden**0.75
                expected = lines[i, layer]["top_singular_value"] / scale
                assert line["normalised_top_singular_value"] == pytest.approx(expected)
            else:
                assert line["predicted_relative_update"] is None


FINE = {"num_experts": None, "moe_token_dispatcher_type": "alltoall", "tensor_model_parallel_size": 1}


@pytest.mark.parametrize(
    ("bad", "flag"),
    [
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl"),
        ({"use_transformer_engine_op_fuser": True}, "--use-transformer-engine-op-fuser"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        ({"gtp_weight_remat_size": 2}, "--tensor-parallel-num-weight-shards"),
        ({"optimizer_cuda_graph": True}, "--optimizer-cuda-graph"),
        ({"moe_latent_size": 8, "moe_token_dispatcher_type": "flex"}, "--moe-latent-size"),
        ({"num_experts": 4, "tensor_model_parallel_size": 2, "sequence_parallel": False}, "--sequence-parallel"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(bad: dict[str, Any], flag: str) -> None:
    from megatron_patch.upstream.flags import validate
    from tests.support.flags import parser

    def metrics_beside(settings: dict[str, Any]) -> Namespace:
        ours = parser().parse_args(["--alignment-interval", "1", "--metrics-dir", "x"])
        return Namespace(**vars(ours), optimizer="adam", **settings)

    validate(metrics_beside(FINE))
    with pytest.raises(ConfigError, match=flag):
        validate(metrics_beside({**FINE, **bad}))
