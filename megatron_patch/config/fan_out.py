"""The fan-out of Megatron's own weights in the base model, by the weight's name.

Adam's rules need the fan-in alone. Muon's update depends on both sizes of the matrix it orthogonalises.
"""

import re
from collections.abc import Mapping

FIXED = "fixed"
"""A fan-out that is the same at every width."""

# First match on the parameter's global name wins; what is not listed writes the residual stream.
_FAN_OUT_DIMENSIONS: tuple[tuple[str, str], ...] = (
    (r"\.router\.|\.gate_weight$", FIXED),
    (r"\.shared_experts\.linear_fc1\.", "moe_shared_expert_intermediate_size"),
    (r"\.experts\..*linear_fc1\.", "moe_ffn_hidden_size"),
    (r"\.experts\..*linear_fc2\.", "moe_latent_size"),
    (r"\.fc1_latent_proj\.", "moe_latent_size"),
    (r"\.linear_fc1\.", "ffn_hidden_size"),
    (r"\.(linear_qkv|linear_q|linear_kv|linear_q_proj|linear_q_up_proj|linear_kv_up_proj)\.", "kv_projection_size"),
    (r"\.linear_q_down_proj\.", "q_lora_rank"),
    (r"\.linear_kv_down_proj\.", "kv_lora_rank"),
    (r"attention\.in_proj\.", "linear_attention_inner_size"),
    (r"mixer\.in_proj\.", "mamba_inner_size"),
)


def base_fan_out(name: str, fan_out: int, dimensions: Mapping[str, int], bases: Mapping[str, float]) -> float:
    """Return the fan-out that a weight has in the base model.

    Fused blocks (qkv, a gated fc1) keep their proportions; a weight whose size no dimension is known for follows the
    hidden sizes' ratio.

    Args:
        name: the parameter's, in the whole model.
        fan_out: K of this model.
        dimensions: the model's sizes by config name, hidden_size among them.
        bases: the base model's.

    >>> base_fan_out("decoder.layers.0.mlp.linear_fc1.weight", 512, {"hidden_size": 64, "ffn_hidden_size": 256},
    ...              {"hidden_size": 16, "ffn_hidden_size": 32})
    64.0
    >>> base_fan_out("decoder.layers.0.mlp.router.weight", 8, {"hidden_size": 64}, {"hidden_size": 16})
    8.0
    """
    dimension = next((d for pattern, d in _FAN_OUT_DIMENSIONS if re.search(pattern, f".{name}")), "hidden_size")
    if dimension == FIXED:
        return float(fan_out)
    if dimension not in dimensions:
        dimension = "hidden_size"
    return fan_out * bases[dimension] / dimensions[dimension]
