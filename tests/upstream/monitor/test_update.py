"""The update comes from the fp32 master weights: exact where a difference of bf16 weights is noise."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.monitored import Monitored, read_lines
from tests.support.pool import Pool, RankFailure
from tests.support.reference import Model, one_layer
from tests.support.training import TINY, Run, train

MODEL = Model()
SMALL_LR = ("--lr", "2e-5", "--bf16")


def keep_first(inputs: dict[str, Any], name: str, module: Any, args: Any, output: Any) -> None:
    inputs.setdefault(name, args[0].detach())


@dataclass
class Witness(Monitored):
    """Also writes down, by itself, the weights around one optimizer step and the inputs before it."""

    step: int = 2
    seen: dict[str, Any] = field(default_factory=dict)

    def built(self, run: Run) -> None:
        super().built(run)
        import torch
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

        inner = run.optimizer.step
        inputs: dict[str, Any] = {}
        modules = {
            name.replace("module.", ""): module
            for name, module in run.model[0].named_modules()
            if isinstance(module, ColumnParallelLinear | RowParallelLinear)
        }
        for name, module in modules.items():
            module.register_forward_hook(partial(keep_first, inputs, name))

        def step() -> Any:
            if run.args.curr_iteration + 1 != self.step:
                inputs.clear()
                return inner()
            before = {n: (m.weight.detach().double(), self._master(run, m.weight)) for n, m in modules.items()}
            result = inner()
            after = {n: (m.weight.detach().double(), self._master(run, m.weight)) for n, m in modules.items()}
            for name in modules:
                gathered: list[Any] = [None] * torch.distributed.get_world_size()
                torch.distributed.all_gather_object(gathered, inputs[name].float())
                self.seen[name] = (*before[name], *after[name], torch.stack(gathered).double())
            return result

        run.optimizer.step = step

    @staticmethod
    def _master(run: Run, parameter: Any) -> Any:
        """Return the whole fp32 weight, float64, gathered the slow way."""
        import torch

        if not getattr(parameter, "main_param_sharded", False):
            return getattr(parameter, "main_param", parameter).detach().double().clone()
        whole = torch.zeros(parameter.numel(), dtype=torch.float64)
        for child in run.optimizer.chained_optimizers:
            if parameter in child.model_param_gbuf_map:
                own = child._get_model_param_range_map(parameter)["param"]
                whole[own.start : own.end] = parameter.main_param.double()
        torch.distributed.all_reduce(whole)
        return whole.view_as(parameter)

    def result(self, run: Run) -> Any:
        """Return by layer the metrics from the masters, and ‖dW‖ from the difference of the weights themselves."""
        import torch

        from megatron_patch.metrics.sample import sample_positions

        lr, decay = run.args.lr, run.args.weight_decay
        answer = {}
        for name, (w, master, new_w, new_master, inputs) in self.seen.items():
            positions = sample_positions(MODEL.length * 2, self.tokens or 0, self.step)
            x = torch.cat([piece.reshape(-1, piece.shape[-1])[positions] for piece in inputs]).T
            exact = one_layer(w, new_master - (1 - lr * decay) * master, x)
            naive = one_layer(w, new_w - (1 - lr * decay) * w, x)
            answer[name] = exact, naive
        return answer


WHOLE = {"linear_qkv": "/q", "linear_fc1": "/gate"}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("flags", [(), ("--use-distributed-optimizer",)], ids=["whole", "sliced"])
def test_bf16_update_agrees_with_float64_where_the_difference_of_weights_does_not(
    pool: Pool, tmp_path: Path, ranks: int, flags: tuple[str, ...]
) -> None:
    argv = [*TINY, *MODEL.flags(), *SMALL_LR, *flags]
    outcome = pool.run(train, ranks=ranks, argv=argv, steps=2, hooks=Witness(str(tmp_path)))[0]
    lines = read_lines(tmp_path)
    naive_errors = []
    for name, (exact, naive) in outcome.extra.items():
        if name.rpartition(".")[2] in WHOLE:
            continue  # the witness does not split fused layers
        line = lines[2, name]
        for metric in ("update_norm", "relative_update", "update_alignment", "relative_representation_change"):
            assert line[metric] == pytest.approx(exact[metric], rel=1e-5), (name, metric)
        assert line["weight_alignment"] == pytest.approx(exact["weight_alignment"], rel=1e-5)
        naive_errors.append(abs(naive["update_norm"] / exact["update_norm"] - 1))
    assert len(naive_errors) == 5  # linear_proj and linear_fc2 of two layers, and the LM head
    # Most weights do not move at all in bf16, and the others by a whole unit in the last place.
    assert min(naive_errors) > 0.1, naive_errors


def test_parts_of_fused_layers_add_up_to_the_whole_in_bf16(pool: Pool, tmp_path: Path) -> None:
    argv = [*TINY, *MODEL.flags(), *SMALL_LR, "--use-distributed-optimizer"]
    outcome = pool.run(train, ranks=2, argv=argv, steps=2, hooks=Witness(str(tmp_path)))[0]
    lines = read_lines(tmp_path)
    for name, (exact, _) in outcome.extra.items():
        parts = {"linear_qkv": ("/q", "/k", "/v"), "linear_fc1": ("/gate", "/up")}.get(name.rpartition(".")[2])
        if parts:
            norm = sum(lines[2, name + part]["update_norm"] ** 2 for part in parts) ** 0.5
            assert norm == pytest.approx(exact["update_norm"], rel=1e-5)


@pytest.mark.parametrize("flags", [("--bf16",), ("--bf16", "--use-distributed-optimizer")], ids=["whole", "sliced"])
def test_a_step_with_learning_rate_zero_reports_null(pool: Pool, tmp_path: Path, flags: tuple[str, ...]) -> None:
    argv = [*TINY, *MODEL.flags(), "--lr-warmup-iters", "2", *flags]  # the first step's LR is 0
    pool.run(train, ranks=2, argv=argv, steps=2, hooks=Monitored(str(tmp_path)))
    for (iteration, _), line in read_lines(tmp_path).items():
        update = [line[key] for key in ("update_norm", "relative_update", "update_alignment", "alignment_ratio")]
        if iteration == 1:
            assert line["lr"] == 0.0
            assert update == [None] * 4
            assert line["weight_alignment"] is not None
        else:
            assert None not in update


@dataclass
class Precise(Monitored):
    """Makes the distributed optimizer look as with --use-precision-aware-optimizer: no fp32 weights of its own."""

    def built(self, run: Run) -> None:
        for child in run.optimizer.chained_optimizers:
            child.shard_fp32_from_float16_groups = [
                [None for _ in group] for group in child.shard_fp32_from_float16_groups
            ]
        super().built(run)


def test_an_optimizer_without_fp32_weights_is_refused(pool: Pool, tmp_path: Path) -> None:
    argv = [*TINY, *MODEL.flags(), "--bf16", "--use-distributed-optimizer"]
    with pytest.raises(RankFailure, match="--use-precision-aware-optimizer keeps no fp32 weights"):
        pool.run(train, argv=argv, steps=1, hooks=Precise(str(tmp_path), scatter=False))
