"""From Megatron's sharded parameters to `ParamSpec`: global names, global shapes, class, own fan-in and its base."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_patch.config import BASE_DIMENSIONS, WidthConfig, flag
from megatron_patch.config.fan_out import base_fan_out
from megatron_patch.errors import AuditError, ConfigError
from megatron_patch.theory.width import ParamSpec, Role

# Which config dimension is the fan-in of a weight: first match on the parameter's global name wins.
_FAN_IN_DIMENSIONS: tuple[tuple[str, str], ...] = (
    (r"\.shared_experts\.linear_fc2\.", "moe_shared_expert_intermediate_size"),
    (r"\.experts\..*linear_fc1\.", "moe_latent_size"),
    (r"\.experts\..*linear_fc2\.", "moe_ffn_hidden_size"),
    (r"\.fc2_latent_proj\.", "moe_latent_size"),
    (r"\.linear_fc2\.", "ffn_hidden_size"),
    (r"attention\.linear_proj\.", "kv_projection_size"),
    (r"attention\.out_proj\.", "linear_attention_inner_size"),
    (r"\.linear_q_up_proj\.", "q_lora_rank"),
    (r"\.linear_kv_up_proj\.", "kv_lora_rank"),
    (r"mixer\.out_proj\.", "mamba_inner_size"),
)
# Everything else that Megatron builds reads the residual stream, hence has fan-in hidden.
_READS_HIDDEN = re.compile(
    r"\.(linear_qkv|linear_q|linear_kv|linear_q_proj|linear_q_down_proj|linear_kv_down_proj|linear_qkv_down_proj"
    r"|linear_fc1|router|shared_experts|fc1_latent_proj|in_proj|eh_proj|gating)\.|output_layer\."
)
# Where those names mean that: in the stacks of layers (also as part of a larger model), and the LM head.
_MEGATRONS_OWN = re.compile(r"\.(decoder|encoder|mtp)\.|\.output_layer\.")


@dataclass(frozen=True)
class NamedParameter:
    """One trainable parameter as this rank holds it, with what it is in the whole model."""

    spec: ParamSpec
    parameter: torch.nn.Parameter
    module: torch.nn.Module
    """The module that owns the parameter."""
    assumed: bool
    """True: a layer this package does not know; its base fan-in follows the ratio of the hidden sizes."""


def config_dimensions(config: Any) -> dict[str, int]:
    """Return the fan-ins that `config` (Megatron's TransformerConfig) knows by name, the hidden size included.

    Keys are ``hidden_size`` and those of `BASE_DIMENSIONS`; a dimension the model does not have is absent.
    """

    def get(name: str) -> int:
        return getattr(config, name, None) or 0

    multi_latent = getattr(config, "multi_latent_attention", False)
    # Only hybrid models have Mamba layers, but every config has the sizes of theirs, and of a linear attention.
    hybrid = getattr(config, "is_hybrid_model", False)
    linear_attention = hybrid or getattr(config, "experimental_attention_variant", None) == "gated_delta_net"
    head_size = get("v_head_dim") if multi_latent else get("kv_channels")
    found = {
        "hidden_size": get("hidden_size"),
        "ffn_hidden_size": get("ffn_hidden_size"),
        "kv_projection_size": get("num_attention_heads") * head_size,
        "moe_ffn_hidden_size": get("moe_ffn_hidden_size") if get("num_moe_experts") else 0,
        "moe_shared_expert_intermediate_size": get("moe_shared_expert_intermediate_size"),
        "moe_latent_size": get("moe_latent_size"),
        "q_lora_rank": get("q_lora_rank") if multi_latent else 0,
        "kv_lora_rank": get("kv_lora_rank") if multi_latent else 0,
        # Megatron's mixer falls back to an expansion of 2 when no number of heads is given.
        "mamba_inner_size": (get("mamba_num_heads") * get("mamba_head_dim") or 2 * get("hidden_size")) if hybrid else 0,
        "linear_attention_inner_size": (
            get("linear_num_value_heads") * get("linear_value_head_dim") if linear_attention else 0
        ),
    }
    return {name: size for name, size in found.items() if size}


def base_dimensions(width: WidthConfig, dimensions: Mapping[str, int]) -> dict[str, float]:
    """Return the base model's counterpart of every dimension; the ratio of the hidden sizes where no flag gives one.

    Raises:
        ConfigError: a ``--base-...`` flag for a dimension this model does not have.
    """
    hidden = dimensions["hidden_size"]
    base_hidden = width.base_hidden_size or hidden
    bases: dict[str, float] = {name: size * base_hidden / hidden for name, size in dimensions.items()}
    for name, size in width.base_dimensions.items():
        if name not in dimensions:
            raise ConfigError(
                flag(f"base_{name}"), size, f"a model with a {BASE_DIMENSIONS[name]}", "drop the flag for this model"
            )
        bases[name] = float(size)
    return bases


def unwrapped_name(name: str) -> str:
    """Strip the ``module.`` that DDP and Float16Module put in front of every name.

    >>> unwrapped_name("module.module.decoder.final_layernorm.weight")
    'decoder.final_layernorm.weight'
    """
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def global_names(chunk: torch.nn.Module, expert_rank: int) -> dict[str, str]:
    """Map the local name of every module and parameter of one model chunk to its name in the whole model.

    Layers are counted over all pipeline stages, experts over all expert-parallel ranks; wrappers are gone.

    Args:
        chunk: one element of Megatron's list of model chunks, wrapped or not.
        expert_rank: this rank's place in the expert-parallel group.
    """
    offsets: dict[str, int] = {}
    local_experts: dict[str, int] = {}
    for name, module in chunk.named_modules():
        stack, _, index = name.rpartition(".")
        if stack.endswith("layers") and index.isdigit() and hasattr(module, "layer_number"):
            offsets[stack] = module.layer_number - 1 - int(index)
        if name.endswith("experts") and hasattr(module, "num_local_experts"):
            local_experts[name] = module.num_local_experts

    def renumber(name: str) -> str:
        parts = name.split(".")
        for i, part in enumerate(name.split(".")):
            parent = ".".join(name.split(".")[:i])
            if part.isdigit() and parent in offsets:
                parts[i] = str(int(part) + offsets[parent])
            elif part.isdigit() and parent.removesuffix(".local_experts") in local_experts:
                # Each expert a module of its own: experts.local_experts.<i>.linear_fc1.weight
                parts[i] = str(int(part) + expert_rank * local_experts[parent.removesuffix(".local_experts")])
            elif parent.rpartition(".")[0] in local_experts and (grouped := re.fullmatch(r"(weight|bias)(\d+)", part)):
                # All experts in one module: experts.linear_fc1.weight<i>
                first = expert_rank * local_experts[parent.rpartition(".")[0]]
                parts[i] = f"{grouped[1]}{int(grouped[2]) + first}"
        return unwrapped_name(".".join(parts))

    names = [name for name, _ in chunk.named_modules() if name] + [name for name, _ in chunk.named_parameters()]
    return {name: renumber(name) for name in names}


def role_of(name: str, parameter: torch.nn.Parameter) -> Role:
    """Return the class of a parameter by its global name; every parameter has exactly one.

    A bias is a vector however many dimensions it has, as in Megatron's own rule for weight decay.
    """
    if parameter.dim() <= 1 or name.endswith(".bias"):
        return "vector"
    if name.startswith("output_layer.") or ".output_layer." in name:
        return "output"
    if re.search(r"(^|\.)(word|position|tokentype)_embeddings?\.", name):
        return "embedding"
    return "matrix"


def belongs_to_expert(name: str) -> bool:
    """Return whether a parameter is that of one routed expert, by its global name; shared experts are dense layers.

    >>> belongs_to_expert("decoder.layers.0.mlp.experts.linear_fc1.weight5")
    True
    >>> belongs_to_expert("decoder.layers.0.mlp.shared_experts.linear_fc1.weight")
    False
    """
    return ".experts." in name and ".shared_experts." not in name


def is_convolution(name: str) -> bool:
    """Return whether a weight is that of a Mamba or linear-attention layer's convolution over time.

    Up to 0.18 Megatron's mixer holds a module, from 0.19 the parameters themselves.

    >>> is_convolution("decoder.layers.0.mixer.conv1d_weight"), is_convolution("decoder.layers.0.mixer.conv1d.weight")
    (True, True)
    """
    return ".conv1d." in name or name.endswith(".conv1d_weight")


def describe(
    model: Sequence[torch.nn.Module], config: Any, width: WidthConfig, groups: Any
) -> Iterator[NamedParameter]:
    """Yield every trainable parameter of this rank's model chunks, described as in the whole model.

    Args:
        model: Megatron's list of model chunks.
        config: the model's TransformerConfig.
        width: the rule's base sizes.
        groups: Megatron's `parallel_state` module, or anything with its getters for sizes and ranks.

    Raises:
        ConfigError: a ``--base-...`` flag that fits no dimension of this model.
        AuditError: a known layer whose fan-in is not the config dimension it should be.
    """
    dimensions = config_dimensions(config)
    bases = base_dimensions(width, dimensions)
    expert_rank = groups.get_expert_model_parallel_rank() if getattr(config, "num_moe_experts", None) else 0
    for chunk in model:
        names = global_names(chunk, expert_rank)
        modules = dict(chunk.named_modules())
        for local_name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                continue
            name = names[local_name]
            built = as_built(parameter)
            if getattr(built, "shared_embedding", False):
                # The last stage's copy of a tied word embedding: one parameter in the whole model.
                name = name.replace("output_layer.", "embedding.word_embeddings.")
            tp = (
                groups.get_expert_tensor_parallel_world_size()
                if belongs_to_expert(name)
                else (groups.get_tensor_model_parallel_world_size())
            )
            shape = _global_shape(built, tp)
            spec, assumed = spec_of(name, shape, role_of(name, parameter), dimensions, bases)
            yield NamedParameter(spec, parameter, modules[local_name.rpartition(".")[0]], assumed)


def as_built(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return a parameter as its layer was built, with Megatron's attributes, split by tensor parallelism alone.

    Megatron-FSDP (v1) has its own in that place, with few of the attributes, and a shape that is whole in every
    dimension. FSDP2's and Megatron-FSDP v2's (without tensor parallelism) have the shape of what they replaced.
    """
    return getattr(parameter, "orig_param", parameter)


def held_here(parameter: torch.Tensor) -> torch.Tensor:
    """Return the memory of a parameter on this rank: under FSDP that of its shard, which may be empty."""
    values = parameter.detach()
    return values.to_local() if hasattr(values, "to_local") else values


def is_empty_shard(parameter: torch.nn.Parameter) -> bool:
    """Return whether FSDP gives this rank no part of a parameter. ZeRO 3, which takes parameters away, is none."""
    return hasattr(parameter, "to_local") and held_here(parameter).numel() == 0


def _global_shape(parameter: torch.nn.Parameter, tp: int) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False) and shape:
        shape[parameter.partition_dim] *= tp  # type: ignore[attr-defined]
    return tuple(shape)


def spec_of(
    name: str, shape: tuple[int, ...], role: Role, dimensions: Mapping[str, int], bases: Mapping[str, float]
) -> tuple[ParamSpec, bool]:
    """Return what a parameter is, and whether its base fan-in is an assumption.

    Args:
        name: in the whole model. Outside Megatron's own stacks of layers a name says nothing: a script's
            ``vision_projection.linear_fc2`` is no MLP of the model's.
        shape: in the whole model; the fan-in of a weight is its last element.
        role: its class.
        dimensions: the model's, see `config_dimensions`.
        bases: the base model's, see `base_dimensions`.

    Raises:
        AuditError: one of Megatron's own layers whose fan-in is not the dimension that it should be.
    """
    if role == "vector":
        return ParamSpec(name, shape, role, 1, 1.0), False
    if role == "embedding":
        return ParamSpec(name, shape, role, shape[-1], bases["hidden_size"], "hidden_size"), False
    if is_convolution(name):
        # A depthwise convolution over time reads as many inputs at every width: [channels, 1, kernel].
        return ParamSpec(name, shape, role, shape[-1], float(shape[-1])), False
    dimension = _fan_in_dimension(name)
    if dimension == "moe_latent_size" and dimension not in dimensions:
        dimension = "hidden_size"
    fan_in = shape[-1]
    if dimension is None or dimension not in dimensions:
        ratio = bases["hidden_size"] / dimensions["hidden_size"]
        return ParamSpec(name, shape, role, fan_in, fan_in * ratio, base_fan_out=shape[0] * ratio), True
    # Multi-token prediction concatenates two residual streams in front of eh_proj.
    copies = 2 if ".eh_proj." in name else 1
    if fan_in != copies * dimensions[dimension]:
        raise AuditError(
            f"{name} has the global fan-in {fan_in}, but {dimension} of this model is {dimensions[dimension]}: "
            "the layer is not what its name says, so its base fan-in is unknown; give a layer of your own a name that "
            "Megatron does not use (the ratio of the hidden sizes is assumed then), or put it outside decoder"
        )
    fan_out = base_fan_out(name, shape[0], dimensions, bases)
    return ParamSpec(name, shape, role, fan_in, copies * bases[dimension], dimension, fan_out), False


def dimensions_read(model: Sequence[torch.nn.Module]) -> set[str]:
    """Return the keys of `config_dimensions` that are a weight's fan-in in this rank's model chunks, frozen or not."""
    names = [name for chunk in model for name, parameter in chunk.named_parameters() if parameter.dim() > 1]
    return {dimension for name in names if (dimension := _fan_in_dimension(unwrapped_name(name)))}


def _fan_in_dimension(name: str) -> str | None:
    """Return the key of `config_dimensions` that is the fan-in of one of Megatron's own weights, by its global name."""
    if not _MEGATRONS_OWN.search(f".{name}"):
        return None
    known = next((d for pattern, d in _FAN_IN_DIMENSIONS if re.search(pattern, f".{name}")), None)
    return known or ("hidden_size" if _READS_HIDDEN.search(f".{name}") else None)
