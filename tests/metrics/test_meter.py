"""One rank = many: the sums of the sharded, sliced, scattered model are those of the full matrices in float64."""

import pytest
import torch

from megatron_patch.metrics.meter import SLOTS
from megatron_patch.metrics.probes import sample_positions

from .ranks import on_ranks
from .sharded_model import LAYERS, LR, SAMPLED, TOKENS, WEIGHT_DECAY, full_model, measure, part_of_rows


def reference(dp: int) -> dict[str, dict[str, float]]:
    """Every number from the full matrices, in float64, one layer and part at a time."""
    expected = {}
    model = full_model(dp)
    positions = sample_positions(TOKENS, SAMPLED, seed=5)
    for layer in LAYERS:
        old, new, inputs = model[layer.name]
        x = inputs[:, positions].reshape(-1, layer.fan_in).T  # [C, B]
        for i, part in enumerate(layer.parts):
            mine = part_of_rows(layer) == i
            w = old[mine]
            dw = (new - (1 - LR * WEIGHT_DECAY) * old)[mine]
            expected[layer.name + part] = {
                "weight": float(w.square().sum()),
                "update": float(dw.square().sum()),
                "input": float(x.square().sum()),
                "weight_output": float((w @ x).square().sum()),
                "update_output": float((dw @ x).square().sum()),
                "tokens": dp * SAMPLED,
                "lr": LR,
                "weight_decay": WEIGHT_DECAY,
                "top_singular_value": float(torch.linalg.matrix_norm(w, 2)),
            }
    return expected


@pytest.mark.parametrize(
    ("tp", "dp", "sharded"), [(1, 1, False), (2, 1, False), (1, 2, False), (1, 2, True), (2, 2, False), (2, 2, True)]
)
def test_sums_of_many_ranks_are_those_of_full_matrices(tp: int, dp: int, sharded: bool) -> None:
    results = on_ranks(tp * dp, measure, tp, dp, sharded, True)
    expected = reference(dp)
    for result in results:
        assert not result["skipped"]
        assert sorted(result["rows"]) == sorted(expected)
        for name, sums in zip(result["rows"], result["table"], strict=True):
            for slot, value in zip(SLOTS, sums, strict=True):
                # fp32 arithmetic on exactly given fp32 numbers, summed in fp64; the metrics promise 1e-5. The singular
                # value is an iteration's, which promises 1e-3.
                tolerance = 1e-3 if slot == "top_singular_value" else 2e-6
                assert value == pytest.approx(expected[name][slot], rel=tolerance), (name, slot)
        assert result["held_bytes"] >= result["slice_bytes"]
