"""Hybrid patterns: names across models as Megatron translates checkpoints, depths, sizes left out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.config.pattern import as_in_gpt, depth, has_layer, main_layers, pattern_of
from megatron_patch.config.sizes import chosen_by_megatron
from megatron_patch.transfer.checks import Training


@given(st.lists(st.sampled_from(["*-", "M*-", "*M-", "M*M-|", "*-M", "|*-"]), min_size=1, max_size=6))
def test_names_are_those_of_megatrons_translation(parts: list[str]) -> None:
    """Against `gpt_compatible_layer_maps`, which pairs the layers of a GPT's checkpoint with those of a pattern."""
    from megatron.core.dist_checkpointing.gpt_checkpoint_interop import gpt_compatible_layer_maps

    pattern = "".join(parts).strip("|")
    maps = gpt_compatible_layer_maps(pattern)
    for part, layers in (
        ("self_attention.linear_qkv", maps.attention_to_gpt),
        ("mlp.linear_fc1/gate", maps.mlp_to_gpt),
    ):
        for here, there in layers.items():
            assert as_in_gpt(f"decoder.layers.{here}.{part}", pattern) == f"decoder.layers.{there}.{part}"
    names = [f"decoder.layers.{i}.mixer.in_proj" for i in sorted(maps.fresh_init)]
    mapped = [as_in_gpt(name, pattern) for name in names]
    assert mapped == [f"decoder.layers.{i}.mixer.in_proj" for i in range(len(names))]


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("decoder.layers.3.mlp.linear_fc2", None, "decoder.layers.3.mlp.linear_fc2"),
        ("decoder.final_layernorm.weight", None, "decoder.final_layernorm.weight"),
        ("module.decoder.final_norm.weight", "*-", "module.decoder.final_layernorm.weight"),
        ("output_layer.weight", "*-*-", "output_layer.weight"),
        ("decoder.layers.3.mlp.experts.linear_fc1.mean/up", "*-*E", "decoder.layers.1.mlp.experts.linear_fc1.mean/up"),
        ("decoder.layers.7.mlp.linear_fc1", "*-", "decoder.layers.7.mlp.linear_fc1"),  # not of this pattern
        ("mtp.layers.1.eh_proj", "*-/*-/*-", "mtp.layers.1.eh_proj"),
        ("mtp.layers.1.mtp_model_layer.layers.0.mlp.x", "*-/-*/-*", "mtp.layers.1.mtp_model_layer.mlp.x"),
        ("mtp.layers.0.mtp_model_layer.layers.3.mlp.x", "*-/*-*-", "mtp.layers.0.mtp_model_layer.layers.1.mlp.x"),
    ],
)
def test_names_by_hand(name: str, pattern: str | None, expected: str) -> None:
    assert as_in_gpt(name, pattern) == expected


def test_what_a_pattern_says() -> None:
    assert main_layers("M*-|M*E/*-/*-") == "M*-M*E"
    assert pattern_of({"hybrid_layer_pattern": None}) is None
    assert pattern_of({"hybrid_override_pattern": "M*"}) == "M*"
    assert has_layer({"hybrid_layer_pattern": "M*/E"}, "E") is True
    assert has_layer({"num_layers": 2}, "E") is None
    assert depth({"num_layers": 3}) == depth({"hybrid_layer_pattern": "*-*|-*-/*-", "num_layers": 6}) == 3
    assert depth({}) is None


@pytest.mark.parametrize(
    ("pattern", "experts", "expected"),
    [
        # 4 * 192 * 2 / 3 = 512, in whole 64s
        ("*-*-", None, {"ffn_hidden_size": 512}),
        ("M*", None, {}),
        ("*E*E", 4, {"moe_ffn_hidden_size": 512}),
        ("*-*E", 4, {"ffn_hidden_size": 512, "moe_ffn_hidden_size": 512}),
        ("*-", 4, {"ffn_hidden_size": 512}),  # --num-experts without a layer for them
        ("+-", None, {"ffn_hidden_size": 512, "kv_lora_rank": 32}),
        ("GE", 4, {"moe_ffn_hidden_size": 512, "linear_attention_inner_size": 4096}),
    ],
)
def test_sizes_left_out_are_those_of_the_layers_in_the_pattern(
    pattern: str, experts: int | None, expected: dict[str, int]
) -> None:
    """`--moe-layer-freq` is a GPT's, 1 by default: it says nothing of a hybrid model's MLPs."""
    arguments = {
        "hybrid_layer_pattern": pattern,
        "num_experts": experts,
        "swiglu": True,
        "moe_layer_freq": 1,
        "kv_lora_rank": 32,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
    }
    left_out = {
        "ffn_hidden_size",
        "moe_ffn_hidden_size",
        "kv_lora_rank",
        "linear_num_value_heads",
        "linear_value_head_dim",
    }
    assert chosen_by_megatron(arguments, left_out, 192) == expected


def test_a_gpt_proxy_and_a_hybrid_target_may_be_equally_deep() -> None:
    gpt = Training.of_flags({"num-layers": 4, "hidden-size": 64})
    assert gpt.values["depth"] == 4
    assert Training.of_flags({"hybrid-layer-pattern": "*-*-|*-*-", "hidden-size": 64}).values["depth"] == 4
    assert Training.of_flags({"hybrid-layer-pattern": "*-*-", "hidden-size": 64}).values["depth"] == 2
