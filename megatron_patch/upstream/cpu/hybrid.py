"""The layers of a hybrid model out of Megatron's own modules that need no Transformer Engine.

Upstream has one spec for them, of Transformer Engine's layers; for a GPT it has a local one as well, whose attention,
MLP and MoE are taken here, so that a GPT and the hybrid model of the same weights compute the same, and Megatron finds
the one's weights in the other's checkpoint, where a norm has the name it has in Transformer Engine's layers. Can go
when `megatron.core.models.hybrid.hybrid_layer_specs` has a local spec.
"""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_patch.kernels.mamba import GatedRMSNorm


class ExtendedRMSNorm(GatedRMSNorm):
    """The mixer's norm, sharded over its only dimension in checkpoints, as upstream's class of this name."""

    tp_group: Any
    """Set by the mixer."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        state = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)


class NoLocalLayer:
    """A layer that upstream has for GPUs alone: left out of the spec, it would be built as the identity, unsaid."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "--hybrid-layer-pattern: gated delta nets (G) and sparse attention (D) need a GPU, Transformer Engine and "
            "flash-linear-attention"
        )


def local_submodules() -> HybridStackSubmodules:
    """Return Mamba, attention, MLA, MLP, MoE and multi-token prediction."""
    dense, latent, experts = (
        get_gpt_layer_local_submodules(normalization="RMSNorm", **kind)  # any norm is a WrappedTorchNorm then
        for kind in ({}, {"multi_latent_attention": True}, {"num_experts": 8})  # how many experts makes no difference
    )

    def attention(of: TransformerLayerSubmodules) -> ModuleSpec:
        parts = TransformerLayerSubmodules(
            input_layernorm=WrappedTorchNorm,
            self_attention=of.self_attention,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=of.sharded_state_dict_keys_map,
        )
        return ModuleSpec(module=TransformerLayer, submodules=parts)

    def mlp(module: type, of: TransformerLayerSubmodules) -> ModuleSpec:
        parts = TransformerLayerSubmodules(
            pre_mlp_layernorm=WrappedTorchNorm,
            mlp=of.mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=of.sharded_state_dict_keys_map,
        )
        return ModuleSpec(module=module, submodules=parts)

    projections = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    mamba = MambaLayerSubmodules(
        norm=WrappedTorchNorm,
        mixer=ModuleSpec(module=MambaMixer, submodules=projections),
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    prediction = MultiTokenPredictionLayerSubmodules(
        enorm=WrappedTorchNorm, hnorm=WrappedTorchNorm, eh_proj=ColumnParallelLinear, layer_norm=WrappedTorchNorm
    )
    predictions = MultiTokenPredictionBlockSubmodules(
        layer_specs=[ModuleSpec(module=MultiTokenPredictionLayer, submodules=prediction)]
    )
    return HybridStackSubmodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
        attention_layer=attention(dense),
        mla_layer=attention(latent),
        mlp_layer=mlp(MLPLayer, dense),
        moe_layer=mlp(MoETransformerLayer, experts),
        gdn_layer=NoLocalLayer,
        dsa_layer=NoLocalLayer,
        mtp_block_spec=ModuleSpec(module=MultiTokenPredictionBlock, submodules=predictions),
    )
