"""A model's layers by kind, and what of their measurements can be shown."""

import re

from megatron_patch.files.lines import FADED, AlignmentLine
from megatron_patch.runs.run import Run


def ratio(measured: float | None, predicted: float | None) -> float | None:
    return measured / predicted if measured is not None and predicted else None


def measurable_updates(run: Run) -> set[tuple[int, str]]:
    """Return iteration and layer of the lines of alignment.jsonl whose update is not too small to be measured."""
    peaks: dict[str, float] = {}
    for line in run.alignment:
        peaks[line.layer] = max(line.lr, peaks.get(line.layer, 0.0))
    return {(line.iteration, line.layer) for line in run.alignment if line.lr >= FADED * peaks[line.layer]}


def lines_by_kind(run: Run) -> list[AlignmentLine]:
    """Return the lines of alignment.jsonl that count for a kind of layer: of experts, only the means over them."""
    return [line for line in run.alignment if ".experts." not in line.layer or line.kind == "expert_mean"]


def layer_kind(layer: str) -> str:
    """Return what layers of one kind are called in pictures.

    >>> layer_kind("decoder.layers.3.self_attention.linear_qkv/q"), layer_kind("decoder.layers.3.mlp.linear_fc1/gate")
    ('q', 'gate')
    >>> layer_kind("decoder.layers.3.mlp.linear_fc2"), layer_kind("output_layer")
    ('fc2', 'output')
    >>> layer_kind("decoder.layers.0.mlp.experts.linear_fc1.mean/up"), layer_kind("x.mlp.shared_experts.linear_fc2")
    ('experts up', 'shared fc2')
    """
    module, _, part = layer.partition("/")
    words = [word for word in module.split(".") if not re.fullmatch(r"\d+|mean|weight\d+", word)]
    last = words[-1].removeprefix("linear_").removeprefix("self_").removesuffix("_layer")
    owner = {"experts": "experts ", "shared_experts": "shared "}
    return "".join(owner.get(word, "") for word in words) + (part or last)
