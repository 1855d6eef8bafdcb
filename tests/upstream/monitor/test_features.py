"""Metrics beside what real runs switch on: multi-token prediction, and experts padded for quantised GEMMs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.layouts import METRICS, MIXTURE, SAMPLED, STEPS, differences
from tests.support.monitored import Monitored, read_lines
from tests.support.pool import Pool
from tests.support.training import TINY, Patched, Run, train


@dataclass
class PaddedForQuantisation(Monitored):
    """A stand-in: this padding needs fp8, hence a GPU. The dispatcher's own code for it runs, in multiples of 16."""

    def built(self, run: Run) -> None:
        from megatron.core.transformer.moe import token_dispatcher
        from megatron.core.utils import get_model_config

        token_dispatcher.get_align_size_for_quantization = lambda config: 16
        dispatchers = [m.token_dispatcher for m in run.model[0].modules() if hasattr(m, "token_dispatcher")]
        for config in (get_model_config(run.model[0]), *(dispatcher.config for dispatcher in dispatchers)):
            config.moe_router_padding_for_quantization = True
        super().built(run)


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_that_fill_up_an_expert_do_not_count(pool: Pool, tmp_path: Path, ranks: int) -> None:
    flags = f"--moe-token-dispatcher-type alltoall --expert-model-parallel-size {ranks}"
    hooks = PaddedForQuantisation(str(tmp_path), tokens=SAMPLED)
    pool.run(train, ranks=ranks, argv=[*TINY, *MIXTURE.flags(), *flags.split()], steps=STEPS, hooks=hooks)
    lines = read_lines(tmp_path)
    for line in lines.values():
        line["top_singular_value"] = 1.0  # not measured here
    worst = differences(MIXTURE, lines, ranks)
    assert max(worst[metric][0] for metric in METRICS) < 1e-5, worst


MTP = (
    "--untie-embeddings-and-output-weights --mtp-num-layers 2 --lr 0.01 --lr-warmup-iters 0 --weight-decay 0.1 "
    "--position-embedding-type rope"
).split()


@dataclass
class Head(Patched):
    """Keeps what every call of the LM head in the first microbatch multiplied, and its weight around each step."""

    inputs: list[list[Any]] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)

    def built(self, run: Run) -> None:
        (head,) = [m for name, m in run.model[0].named_modules() if name.endswith("output_layer")]
        zero_grad, step = run.optimizer.zero_grad, run.optimizer.step

        def begin(*args: Any, **kwargs: Any) -> Any:
            self.inputs.append([])
            return zero_grad(*args, **kwargs)

        def stepped(*args: Any, **kwargs: Any) -> Any:
            old = head.weight.detach().double().clone()
            result = step(*args, **kwargs)
            self.weights.append((old, head.weight.detach().double().clone()))
            return result

        def called(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self.inputs[-1].append(args[0].detach().double().flatten(0, 1).clone())

        run.optimizer.zero_grad, run.optimizer.step = begin, stepped
        head.register_forward_hook(called, with_kwargs=True)

    def result(self, run: Run) -> Any:
        return self.inputs, self.weights


def test_each_call_of_the_head_by_multi_token_prediction_has_a_line(pool: Pool, tmp_path: Path) -> None:
    """Two depths and the model itself, in float64 from what the head was called with: three calls, three inputs."""
    argv = [*TINY, *MTP, "--alignment-interval", "1", "--alignment-tokens", "64", "--metrics-dir", str(tmp_path)]
    (outcome,) = pool.run(train, argv=argv, steps=2, hooks=Head())
    lines = read_lines(tmp_path)
    inputs, weights = outcome.extra
    for iteration, (calls, (old, new)) in enumerate(zip(inputs, weights, strict=True), start=1):
        assert len(calls) == 2 * 3  # two microbatches
        line = lines[iteration, "output_layer"]
        update = new - (1 - line["lr"] * line["weight_decay"]) * old
        for name, x in zip(("output_layer/mtp0", "output_layer/mtp1", "output_layer"), calls[:3], strict=True):
            line = lines[iteration, name]
            assert line["tokens"] == 64
            assert line["weight_norm"] == pytest.approx(float(old.norm()), rel=1e-6)
            assert line["update_norm"] == pytest.approx(float(update.norm()), rel=1e-4)
            alignment = float((x @ old.T).norm() / (old.norm() * x.norm()))
            assert line["weight_alignment"] == pytest.approx(alignment, rel=1e-5), name
            alignment = float((x @ update.T).norm() / (update.norm() * x.norm()))
            assert line["update_alignment"] == pytest.approx(alignment, rel=1e-4), name
    distinct = {
        lines[1, name]["weight_alignment"] for name in ("output_layer/mtp0", "output_layer/mtp1", "output_layer")
    }
    assert len(distinct) == 3


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"),
        (4, "--tensor-model-parallel-size 2 --use-distributed-optimizer"),
    ],
)
def test_multi_token_prediction_on_many_ranks_is_that_of_one(
    pool: Pool, tmp_path: Path, ranks: int, flags: str
) -> None:
    """All tokens are looked at: with two data-parallel ranks each has one of a microbatch's two sequences."""
    micro = ("1", "32") if ranks == 4 else ("2", "64")
    common = [*TINY, *MTP, "--alignment-interval", "1", "--spectral-interval", "2"]
    one, many = str(tmp_path / "one"), str(tmp_path / "many")
    pool.run(train, argv=[*common, "--metrics-dir", one, "--alignment-tokens", "64"], steps=2, hooks=Patched())
    argv = [*common, "--micro-batch-size", micro[0], "--alignment-tokens", micro[1], "--metrics-dir", many]
    pool.run(train, ranks=ranks, argv=[*argv, *flags.split()], steps=2, hooks=Patched())
    truth, lines = read_lines(one), read_lines(many)
    assert set(lines) == set(truth)
    assert any(layer.startswith("mtp.layers.1.") for _, layer in lines)
    for key, expected in truth.items():
        for metric in METRICS:
            assert lines[key][metric] == pytest.approx(expected[metric], rel=2e-3), (key, metric)


def test_the_head_has_its_lines_on_the_last_of_two_stages(pool: Pool, tmp_path: Path) -> None:
    """What is in a pipeline is not what one rank has: Megatron draws the initial weights of MTP layers anew."""
    argv = [*TINY, *MTP, "--alignment-interval", "1", "--metrics-dir", str(tmp_path)]
    pool.run(train, ranks=2, argv=[*argv, "--pipeline-model-parallel-size", "2"], steps=1, hooks=Patched())
    lines = read_lines(tmp_path)
    heads = {layer for _, layer in lines if "output_layer" in layer}
    assert heads == {"output_layer", "output_layer/mtp0", "output_layer/mtp1"}
    assert all(line[metric] is not None for line in lines.values() for metric in METRICS)
