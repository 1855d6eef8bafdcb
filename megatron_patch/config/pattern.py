"""Patterns of hybrid models, ``M*-M*-|M*-M*-/*-``: which of their layers are those of a GPT, and how deep they are.

A symbol is a layer with one branch beside the residual stream; a layer of a GPT has two, attention and MLP. So layer i
of a GPT is the i-th attention layer and the i-th MLP or MoE layer of a hybrid model, as in Megatron's own translation
of checkpoints (megatron/core/dist_checkpointing/gpt_checkpoint_interop.py, 0.19).
"""

import re
from collections.abc import Mapping
from typing import Any

ATTENTION = "*+DG"
"""Symbols of layers that have a ``self_attention``: plain, MLA, sparse, gated delta net."""
MLP = "-"
MOE = "E"
LATENT = "+D"
DELTA_NET = "G"

_LAYER = re.compile(r"(?P<stack>(^|\.)decoder\.layers\.)(?P<index>\d+)\.(?P<rest>.*)")
_PREDICTED = re.compile(r"(?P<stack>(^|\.)mtp\.layers\.\d+\.mtp_model_layer\.)layers\.(?P<index>\d+)\.(?P<rest>.*)")


def pattern_of(arguments: Mapping[str, Any]) -> str | None:
    """Return the pattern in a namespace of Megatron's arguments; None for a GPT."""
    found = arguments.get("hybrid_layer_pattern") or arguments.get("hybrid_override_pattern")
    return str(found) if found else None


def main_layers(pattern: str) -> str:
    """Return the layers of the decoder, a symbol each.

    >>> main_layers("M*-|M*E/*-/*-")
    'M*-M*E'
    """
    return pattern.partition("/")[0].replace("|", "")


def depth(arguments: Mapping[str, Any]) -> float | None:
    """Return how many blocks of attention and MLP the decoder is as deep as: a GPT's layers, half a hybrid model's.

    >>> depth({"num_layers": 2}), depth({"hybrid_layer_pattern": "*-*-"}), depth({"hybrid_layer_pattern": "M*-"})
    (2.0, 2.0, 1.5)
    """
    pattern, layers = pattern_of(arguments), arguments.get("num_layers")
    if pattern is not None:
        return len(main_layers(pattern)) / 2
    return None if layers is None else float(layers)


def has_layer(arguments: Mapping[str, Any], symbols: str) -> bool | None:
    """Return whether a hybrid model has one of the layers, predicted ones included; None for a GPT."""
    pattern = pattern_of(arguments)
    return None if pattern is None else not set(pattern).isdisjoint(symbols)


def as_in_gpt(name: str, pattern: str | None) -> str:
    """Return the name that a weight of a hybrid model has in the GPT of the same weights; for a GPT, its own.

    Mamba layers, which no GPT has, are counted among themselves.

    >>> [as_in_gpt(f"decoder.layers.{name}.weight", "M*-M*-") for name in ("1.self_attention.linear_qkv", "5.mlp.fc1")]
    ['decoder.layers.0.self_attention.linear_qkv.weight', 'decoder.layers.1.mlp.fc1.weight']
    >>> as_in_gpt("decoder.layers.3.mixer.in_proj.weight", "M*-M*-"), as_in_gpt("decoder.final_norm.weight", "*-")
    ('decoder.layers.1.mixer.in_proj.weight', 'decoder.final_layernorm.weight')
    >>> as_in_gpt("mtp.layers.0.mtp_model_layer.layers.1.mlp.linear_fc1", "*-/*-")
    'mtp.layers.0.mtp_model_layer.mlp.linear_fc1'
    """
    if pattern is None:
        return name
    predicted = pattern.partition("/")[2].partition("/")[0]
    for found, layers in ((_LAYER.search(name), main_layers(pattern)), (_PREDICTED.search(name), predicted)):
        if found is None or int(found["index"]) >= len(layers):
            continue
        place = _place(layers, int(found["index"]))
        stack = name[: found.start()] + found["stack"]
        if layers is predicted:
            return f"{stack}{found['rest']}" if place == 0 else f"{stack}layers.{place}.{found['rest']}"
        return f"{stack}{place}.{found['rest']}"
    return re.sub(r"(^|\.)decoder\.final_norm\.", r"\1decoder.final_layernorm.", name)


def _place(layers: str, index: int) -> int:
    """Return how many layers of the same kind come before one."""
    kinds = (ATTENTION, MLP + MOE)
    kind = next((kind for kind in kinds if layers[index] in kind), layers[index])
    return sum(symbol in kind for symbol in layers[:index])
