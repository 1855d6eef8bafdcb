"""Models and layouts whose every metric is compared with the float64 reference (tests/support/reference.py)."""

from typing import Any

from tests.support.reference import Model, Reference

STEPS = 3
SAMPLED = 10
LLAMA = Model()
GPT = Model(gated=False, norm="LayerNorm", bias=True, tied=True, groups=4)
MIXTURE = Model(experts=4, shared=24)
LATENT = Model(latent=(24, 16, 8, 4, 8))
TP2 = ("--tensor-model-parallel-size", "2")
TP4 = ("--tensor-model-parallel-size", "4")
PP2 = ("--pipeline-model-parallel-size", "2")
EP2 = ("--expert-model-parallel-size", "2")
SP = ("--sequence-parallel",)
DISTRIBUTED = ("--use-distributed-optimizer",)
ALLTOALL = ("--moe-token-dispatcher-type", "alltoall")
TWO_INSTANCES = ("--num-distributed-optimizer-instances", "2")
# As many places as there are tokens, so that none is dropped; half of an expert's input are tokens that chose others.
CAPACITY = ("--moe-expert-capacity-factor", "2.0", "--moe-pad-expert-input-to-capacity")
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
FULL_RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
METRICS = (
    "tokens",
    "weight_norm",
    "update_norm",
    "relative_update",
    "weight_alignment",
    "update_alignment",
    "alignment_ratio",
    "relative_representation_change",
)


def differences(
    model: Model, lines: dict[tuple[int, str], dict[str, Any]], data_ranks: int, context_ranks: int = 1
) -> dict[str, tuple[float, Any]]:
    """Return the largest relative difference from the reference and where it is, for each metric."""
    worst: dict[str, tuple[float, Any]] = {}
    expected_keys = set()
    steps = Reference(model).train(STEPS, data_ranks, SAMPLED, context_ranks)
    for iteration, expected in enumerate(steps, start=1):
        for layer, values in expected.items():
            expected_keys.add((iteration, layer))
            line = lines[iteration, layer]
            for metric in (*METRICS, "top_singular_value"):
                if metric not in values:
                    assert line[metric] is None
                    continue
                assert line[metric] is not None, (iteration, layer, metric)
                gap = abs(line[metric] - values[metric]) / values[metric] if values[metric] else abs(line[metric])
                worst[metric] = max(worst.get(metric, (0.0, None)), (gap, (iteration, layer)), key=lambda pair: pair[0])
    assert {key for key, line in lines.items() if line["kind"] != "expert_mean"} == expected_keys
    return worst


LAYOUTS = {
    "one": (LLAMA, 1, 1, ()),
    "one-recompute": (LLAMA, 1, 1, FULL_RECOMPUTE),
    "tp2": (LLAMA, 2, 1, TP2),
    "tp4-fewer-query-groups-than-ranks": (LLAMA, 4, 1, TP4),
    "tp2-sp": (LLAMA, 2, 1, (*TP2, *SP)),
    "dp2": (LLAMA, 2, 2, ()),
    "dp2-distributed": (LLAMA, 2, 2, DISTRIBUTED),
    "dp4-two-instances": (LLAMA, 4, 4, (*DISTRIBUTED, *TWO_INSTANCES)),
    "tp2-dp2-two-instances": (LLAMA, 4, 2, (*TP2, *DISTRIBUTED, *TWO_INSTANCES)),
    "moe-ep2-dp2-two-instances": (MIXTURE, 4, 4, (*EP2, *DISTRIBUTED, *TWO_INSTANCES)),
    "dp2-distributed-overlap": (LLAMA, 2, 2, (*DISTRIBUTED, *OVERLAP)),
    "pp2": (LLAMA, 2, 1, PP2),
    "pp2-interleaved": (Model(layers=4), 2, 1, (*PP2, "--num-layers-per-virtual-pipeline-stage", "1")),
    "tp2-pp2": (LLAMA, 4, 1, (*TP2, *PP2)),
    "tp2-dp2-distributed": (LLAMA, 4, 2, (*TP2, *DISTRIBUTED)),
    "gpt": (GPT, 1, 1, ()),
    "gpt-tp2-sp": (GPT, 2, 1, (*TP2, *SP)),
    "gpt-pp2-tied": (GPT, 2, 1, PP2),
    "gpt-dp2-distributed": (GPT, 2, 2, DISTRIBUTED),
    "moe": (MIXTURE, 1, 1, ()),
    "moe-ep2": (MIXTURE, 2, 2, EP2),
    "moe-ep2-allgather": (MIXTURE, 2, 2, (*EP2, "--moe-token-dispatcher-type", "allgather")),
    "moe-ep2-padded-to-capacity": (MIXTURE, 2, 2, (*EP2, *ALLTOALL, *CAPACITY)),
    "moe-tp2-sp-padded-to-capacity": (MIXTURE, 2, 1, (*TP2, *SP, *CAPACITY)),
    "moe-shared-experts-overlap": (MIXTURE, 1, 1, (*ALLTOALL, "--moe-shared-expert-overlap")),
    "moe-tp2-sp-shared-experts-overlap": (MIXTURE, 2, 1, (*TP2, *SP, *ALLTOALL, "--moe-shared-expert-overlap")),
    "moe-dp2-distributed": (MIXTURE, 2, 2, DISTRIBUTED),
    "moe-ep2-dp2-distributed": (MIXTURE, 4, 4, (*EP2, *DISTRIBUTED)),
    "moe-tp2-sp": (MIXTURE, 2, 1, (*TP2, *SP)),
    "moe-tp2-etp1": (MIXTURE, 2, 1, (*TP2, *SP, "--expert-tensor-parallel-size", "1")),
    "moe-tp2-ep2-sp": (MIXTURE, 4, 2, (*TP2, *SP, *EP2)),
    "mla": (LATENT, 1, 1, ()),
    "mla-dp2-distributed": (LATENT, 2, 2, DISTRIBUTED),
}
