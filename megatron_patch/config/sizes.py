"""The sizes that a command line leaves to Megatron: what it makes of them, at any hidden size.

A size that is given, `--ffn-hidden-size 96`, says nothing of the proxy's: its base is a flag, or the ratio of the
hidden sizes. One that is left out is what Megatron makes of the same command line at the proxy's hidden size, and that
is not always the same ratio: `--swiglu` rounds the MLP to a multiple of 64, and `--kv-lora-rank` is 32 at any width.
"""

from collections.abc import Collection, Mapping
from typing import Any

SIZE_FLAGS = (
    "ffn_hidden_size",
    "moe_ffn_hidden_size",
    "kv_lora_rank",
    "linear_num_value_heads",
    "linear_value_head_dim",
)
"""Megatron's flags for sizes that it chooses itself, by another rule than the ratio of the hidden sizes."""


def chosen_by_megatron(
    arguments: Mapping[str, Any], left_out: Collection[str], hidden_size: int, ffn_hidden_size: int | None = None
) -> dict[str, int]:
    """Return the fan-ins, by key of `BASE_DIMENSIONS`, that Megatron chooses for a model of another hidden size.

    Args:
        arguments: Megatron's, validated, by attribute name.
        left_out: those of `SIZE_FLAGS` that nobody has given.
        hidden_size: of that model.
        ffn_hidden_size: of that model, where it is known; experts that are given no width of their own have it too.

    Returns:
        Of the dimensions that the model has, those that Megatron has chosen.

    Source: Megatron-LM 0.19, `validate_args` in megatron/training/arguments.py.
    """
    found: dict[str, int] = {}
    experts = bool(arguments.get("num_experts"))
    if "ffn_hidden_size" in left_out:
        # In Megatron's own order of operations.
        swiglu = int((4 * hidden_size * 2 / 3) / 64) * 64
        found["ffn_hidden_size"] = swiglu if arguments.get("swiglu") else 4 * hidden_size
    if experts and "moe_ffn_hidden_size" in left_out:
        size = ffn_hidden_size or found.get("ffn_hidden_size")
        if size is not None:
            found["moe_ffn_hidden_size"] = size
    if experts and not _has_dense_mlp(arguments.get("moe_layer_freq")):
        found.pop("ffn_hidden_size", None)
    if arguments.get("multi_latent_attention") and "kv_lora_rank" in left_out:
        found["kv_lora_rank"] = int(arguments["kv_lora_rank"])
    heads, size_of_one = "linear_num_value_heads", "linear_value_head_dim"
    if arguments.get("experimental_attention_variant") == "gated_delta_net" and {heads, size_of_one} <= set(left_out):
        found["linear_attention_inner_size"] = int(arguments[heads]) * int(arguments[size_of_one])
    return found


def _has_dense_mlp(moe_layer_frequency: Any) -> bool:
    """Whether some layer has an MLP instead of experts: 1 is experts everywhere, a list has a 1 for each such layer."""
    if isinstance(moe_layer_frequency, (list, tuple)):
        return not all(moe_layer_frequency)
    return moe_layer_frequency not in (None, 1)
