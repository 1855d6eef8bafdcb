"""The sizes that a command line leaves to Megatron: what it makes of them, at any hidden size.

A size that is given, `--ffn-hidden-size 96`, says nothing of the proxy's: its base is a flag, or the ratio of the
hidden sizes. One that is left out is what Megatron makes of the same command line at the proxy's hidden size, and that
is not always the same ratio: `--swiglu` rounds the MLP to a multiple of 64, and `--kv-lora-rank` is 32 at any width.
"""

from collections.abc import Collection, Mapping
from typing import Any

from megatron_patch.config.pattern import DELTA_NET, LATENT, MLP, MOE, has_layer

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
    experts = bool(arguments.get("num_experts")) and has_layer(arguments, MOE) is not False
    if "ffn_hidden_size" in left_out:
        # In Megatron's own order of operations.
        swiglu = int((4 * hidden_size * 2 / 3) / 64) * 64
        found["ffn_hidden_size"] = swiglu if arguments.get("swiglu") else 4 * hidden_size
    if experts and "moe_ffn_hidden_size" in left_out:
        size = ffn_hidden_size or found.get("ffn_hidden_size")
        if size is not None:
            found["moe_ffn_hidden_size"] = size
    if not _has_dense_mlp(arguments, experts):
        found.pop("ffn_hidden_size", None)
    latent = arguments.get("multi_latent_attention") or has_layer(arguments, LATENT)
    if latent and "kv_lora_rank" in left_out:
        found["kv_lora_rank"] = int(arguments["kv_lora_rank"])
    heads, size_of_one = "linear_num_value_heads", "linear_value_head_dim"
    delta_net = arguments.get("experimental_attention_variant") == "gated_delta_net"
    if (delta_net or has_layer(arguments, DELTA_NET)) and {heads, size_of_one} <= set(left_out):
        found["linear_attention_inner_size"] = int(arguments[heads]) * int(arguments[size_of_one])
    return found


def _has_dense_mlp(arguments: Mapping[str, Any], experts: bool) -> bool:
    """Whether some layer has an MLP instead of experts.

    A hybrid model says so in its pattern; of a GPT's frequencies, 1 is experts everywhere, and a list has a 1 for each
    layer with experts.
    """
    hybrid = has_layer(arguments, MLP)
    if hybrid is not None:
        return hybrid
    frequency = arguments.get("moe_layer_freq")
    if isinstance(frequency, (list, tuple)):
        return not experts or not all(frequency)
    return not experts or frequency not in (None, 1)
