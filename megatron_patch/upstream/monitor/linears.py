"""Finds the linear layers of Megatron's models, local and Transformer Engine, and describes each as a `LinearView`."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_patch.errors import ConfigError
from megatron_patch.metrics.sample import Sample
from megatron_patch.metrics.views import Captured, CapturePoint, Extract, Kind, LinearView, Row, group_rank, group_size
from megatron_patch.upstream.monitor.experts import ExpertTokens, dispatched, find_experts
from megatron_patch.upstream.monitor.masters import Master
from megatron_patch.upstream.width.optimizers import Growth
from megatron_patch.upstream.width.parameters import NamedParameter, belongs_to_expert, global_names
from megatron_patch.zero.weights import gathered, is_partitioned


@dataclass(frozen=True)
class _Weight:
    """One weight matrix of a linear module."""

    name: str
    """Global name of the layer: the parameter's without ``.weight``."""
    parameter: torch.nn.Parameter
    module: torch.nn.Module
    expert: int | None = None
    """Number of the expert on this rank; None for a dense layer."""
    moe_layer: str = ""
    """Global name of the MoE layer that the expert belongs to."""
    m: float = 1.0
    call: int = 0
    """Which call of the module in a forward pass."""


@dataclass(frozen=True)
class Found:
    """The monitored layers of this rank."""

    views: tuple[LinearView, ...]
    points: tuple[CapturePoint, ...]
    routers: dict[str, CapturePoint]
    """The router of every MoE layer of this rank, by the layer's global name. Hearing it is a collective call, so who
    hears it is decided by what all ranks know: see `routed_layers`."""
    param_groups: dict[str, str]
    """Key of the param group of every line, where this rank knows it."""


def find_linears(
    model: Sequence[torch.nn.Module],
    parameters: Sequence[NamedParameter],
    config: Any,
    groups: Any,
    masters: Callable[[torch.nn.Parameter], Master],
    wanted: re.Pattern[str],
    growth: Growth,
) -> Found:
    """Return the linear layers of this rank of which a line matches, or the mean over the experts that it enters.

    Args:
        model: Megatron's model chunks.
        parameters: every parameter of this rank, described.
        config: the TransformerConfig.
        groups: Megatron's `parallel_state`.
        masters: where the fp32 weights of a parameter are.
        wanted: matched against line names by `search`.
        growth: b of the norm model for every part of a weight.

    Raises:
        ConfigError: a wanted matrix whose module this package does not know.
    """
    views: list[LinearView] = []
    points: list[CapturePoint] = []
    routers: dict[str, CapturePoint] = {}
    param_groups: dict[str, str] = {}
    by_parameter = {id(p.parameter): p for p in parameters}
    for chunk in model:
        names = global_names(chunk, groups.get_expert_model_parallel_rank())
        experts = find_experts(names, chunk, groups) if getattr(config, "num_moe_experts", None) else {}
        by_call: dict[tuple[torch.nn.Module, int], list[tuple[_Weight, LinearView | None]]] = {}
        for weight in _each_call(_weights(chunk, names, by_parameter), predictions_before(chunk, config)):
            kind = _kind(weight)
            if kind is None:
                if wanted.search(weight.name):
                    raise ConfigError(
                        "--alignment-layers",
                        wanted.pattern,
                        f"layers that megatron_patch knows: {weight.name} is a {type(weight.module).__qualname__}",
                        "leave it out with a pattern that does not match it",
                    )
                continue
            master = masters(weight.parameter)
            view = _view(weight, kind, config, groups, master, growth)
            if any(is_wanted(row, wanted) for row in view.rows):
                by_call.setdefault((weight.module, weight.call), []).append((weight, view))
                views.append(view)
                if master.param_group:
                    param_groups.update({row.layer: master.param_group for row in view.rows})
            elif weight.moe_layer in experts and experts[weight.moe_layer].at_entry and _is_fc1(weight.name):
                by_call.setdefault((weight.module, weight.call), []).append((weight, None))  # where tokens are found
        for (module, call), members in by_call.items():
            points.append(CapturePoint(module, _extract(module, members, experts), call))
        for local_name, module in chunk.named_modules():
            moe_layer = names.get(local_name, "").removesuffix(".router")
            if local_name.endswith(".router") and moe_layer in experts:
                routers[moe_layer] = CapturePoint(module, _routing(experts[moe_layer], config, groups))
    return Found(tuple(views), tuple(points), routers, param_groups)


def is_wanted(row: Row, wanted: re.Pattern[str]) -> bool:
    """Return whether a line is needed: for itself, or for the mean over the experts."""
    return any(name is not None and wanted.search(name) for name in (row.layer, row.mean))


def routed_layers(rows: Iterable[Row]) -> set[str]:
    """Return the MoE layers of which an expert is monitored on any rank.

    Args:
        rows: the lines of the whole model.
    """
    return {row.layer.partition(".experts.")[0] for row in rows if row.mean is not None}


def _weights(
    chunk: torch.nn.Module, names: Mapping[str, str], by_parameter: Mapping[int, NamedParameter]
) -> Iterator[_Weight]:
    """Yield every trained matrix of a chunk that is multiplied with activations."""
    for local_name, module in chunk.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            described = by_parameter.get(id(parameter))
            is_output = local_name.split(".")[-1] == "output_layer"
            if described is None or len(_local_shape(parameter)) != 2:
                continue
            if described.spec.role not in ("matrix", "output") and not is_output:
                continue
            name = names[f"{local_name}.{key}"]
            moe_layer = name.partition(".experts.")[0]
            number = re.search(r"(?:local_experts\.|weight)(\d+)", f"{local_name.partition('.experts.')[2]}.{key}")
            if not belongs_to_expert(name):
                moe_layer, number = "", None
            yield _Weight(
                name.removesuffix(".weight"),
                parameter,
                module,
                int(number[1]) if number else None,
                moe_layer,
                described.spec.m,
            )
        # A tied LM head without pipeline stages in between: the module has no weight of its own.
        if local_name.split(".")[-1] == "output_layer" and getattr(module, "weight", 0) is None:
            owner: Any = chunk.get_submodule(local_name.rpartition(".")[0])
            parameter = owner.shared_embedding_or_output_weight()
            yield _Weight(names[local_name], parameter, module, m=by_parameter[id(parameter)].spec.m)


def predictions_before(chunk: torch.nn.Module, config: Any) -> int:
    """Return how often multi-token prediction calls a chunk's LM head in a forward pass, before the model itself does.

    Once for each of its depths, in order (`process_mtp_loss`), and on the stage that has its layers only.
    """
    has_layers = any(getattr(module, "mtp_process", False) for module in chunk.modules())
    return (getattr(config, "mtp_num_layers", None) or 0) if has_layers else 0


def _each_call(weights: Iterable[_Weight], predictions: int) -> Iterator[_Weight]:
    """Yield weights, and the LM head once for each call; that of the model itself, the last, has the plain name."""
    for weight in weights:
        if weight.name.rpartition(".")[2] != "output_layer":
            yield weight
            continue
        for depth in range(predictions):
            yield replace(weight, name=f"{weight.name}/mtp{depth}", call=depth)
        yield replace(weight, call=predictions)


def _kind(weight: _Weight) -> Kind | None:
    """Return how the module is split over tensor-parallel ranks, by its class; None for an unknown one."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    classes: list[tuple[type[Any], Kind]] = [
        (ColumnParallelLinear, "column"),
        (RowParallelLinear, "row"),
        (TopKRouter, "replicated"),
        (SharedExpertMLP, "replicated"),  # its gate, a bare parameter [1, hidden]
    ]
    te = _te_extension()
    if te is not None:
        classes += [
            (te.TEColumnParallelLinear, "column"),
            (te.TERowParallelLinear, "row"),
            (te.TELayerNormColumnParallelLinear, "column"),
            (te.TEColumnParallelGroupedLinear, "column"),
            (te.TERowParallelGroupedLinear, "row"),
            (te.TELinear, "replicated"),  # what is left of it: parallel_mode "duplicated"
        ]
    return next((kind for cls, kind in classes if isinstance(weight.module, cls)), None)


def _te_extension() -> Any:
    """Return Megatron's module of Transformer Engine layers, None where Transformer Engine is not installed."""
    from megatron.core.extensions import transformer_engine

    return transformer_engine if transformer_engine.HAVE_TE else None


def _view(weight: _Weight, kind: Kind, config: Any, groups: Any, master: Master, growth: Growth) -> LinearView:
    is_expert = weight.expert is not None
    if is_expert:
        shard_group = groups.get_expert_tensor_parallel_group()
        data_group = groups.get_expert_data_parallel_group()
    else:
        shard_group = groups.get_tensor_model_parallel_group()
        data_group = groups.get_data_parallel_group(with_context_parallel=True)
    shards, shard = group_size(shard_group), group_rank(shard_group)
    # Shared experts that overlap with the dispatch get tokens that are gathered already.
    overlap = getattr(config, "moe_shared_expert_overlap", False) and ".shared_experts." in weight.name
    gathers_first = is_expert or overlap
    rows_local, width = _local_shape(weight.parameter)
    fan_out = rows_local * (shards if kind == "column" else 1)
    fan_in = width * (shards if kind == "row" else 1)
    parts, row_part = _parts(weight.name, kind, rows_local, shard, config)
    fractions = _part_sizes(parts, fan_out, config)
    mean = _expert_mean(weight.name) if is_expert else None
    updates = growth(weight.name, weight.parameter, fractions, fan_in)
    rows = tuple(
        Row(weight.name + part, kind, fan_in, size, weight.m, mean + part if mean else None, b)
        for part, size, b in zip(parts, fractions, updates, strict=True)
    )
    return LinearView(
        name=weight.name,
        kind=kind,
        rows=rows,
        row_part=row_part.to(weight.parameter.device),
        weight=gathered(weight.parameter) if is_partitioned(weight.parameter) else _dequantised(weight.parameter),
        master=master.piece,
        shard_group=shard_group,
        data_group=master.slice_group or data_group,
        scattered=bool(config.sequence_parallel) and shards > 1 and kind != "row" and not gathers_first,
        replica=master.replica,
        gathered_shape=(rows_local, width) if is_partitioned(weight.parameter) else None,
        fixed_tokens=not is_expert,
    )


def _local_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Return the shape of this tensor-parallel rank's shard, also where ZeRO 3 has left nothing of it between uses."""
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)  # type: ignore[attr-defined]


def _expert_mean(name: str) -> str:
    """Return the name of the line that averages a layer over the experts.

    >>> _expert_mean("decoder.layers.0.mlp.experts.local_experts.5.linear_fc1")
    'decoder.layers.0.mlp.experts.local_experts.mean.linear_fc1'
    >>> _expert_mean("decoder.layers.0.mlp.experts.linear_fc1.weight5")
    'decoder.layers.0.mlp.experts.linear_fc1.mean'
    """
    return re.sub(r"(\.experts\..*?)(?:(local_experts\.)|weight)\d+", r"\1\2mean", name)


def _dequantised(parameter: torch.nn.Parameter) -> Callable[[], Tensor]:
    """Return what reads a weight as plain numbers; fp8 weights (--fp8-param-gather) are scaled back."""

    from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

    def read() -> Tensor:
        weight: Tensor = dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter
        return weight.detach()

    return read


def _qkv_pattern(config: Any) -> tuple[tuple[str, int], ...]:
    """Return the parts of the rows of one query group in `linear_qkv`, in order."""
    head = config.kv_channels
    heads = config.num_attention_heads // config.num_query_groups
    gate = (("/gate", heads * head),) if getattr(config, "attention_output_gate", False) else ()
    return (("/q", heads * head), *gate, ("/k", head), ("/v", head))


def _parts(name: str, kind: Kind, rows: int, shard: int, config: Any) -> tuple[tuple[str, ...], Tensor]:
    """Return the suffixes of a layer's parts and which part each local row belongs to."""
    if name.endswith(".linear_qkv"):
        pattern = _qkv_pattern(config)
        of_group = torch.cat([torch.full((size,), i) for i, (_, size) in enumerate(pattern)])
        # Row numbers are global, since with fewer query groups than ranks a group straddles ranks.
        numbers = torch.arange(rows) + rows * shard
        return tuple(part for part, _ in pattern), of_group[numbers % of_group.numel()]
    if kind == "column" and _is_fc1(name) and config.gated_linear_unit:
        # Each shard holds [gate; up] of its own columns of fc2; interleaved in blocks if the config says so.
        block = _interleave(name, config) or rows // 2
        return ("/gate", "/up"), torch.arange(rows) // block % 2
    return ("",), torch.zeros(rows, dtype=torch.int64)


def _is_fc1(name: str) -> bool:
    return re.search(r"\.linear_fc1(\.weight\d+)?$", name) is not None


def _interleave(name: str, config: Any) -> int | None:
    return getattr(config, "moe_mlp_glu_interleave_size", None) if ".experts." in name else None


def _part_sizes(parts: tuple[str, ...], fan_out: int, config: Any) -> tuple[int, ...]:
    if parts == ("/gate", "/up"):
        return fan_out // 2, fan_out // 2
    if len(parts) > 1:
        return tuple(size * config.num_query_groups for _, size in _qkv_pattern(config))
    return (fan_out,)


# --- from a module's arguments to the GEMM's input ------------------------------------------------------------------


def _extract(
    module: torch.nn.Module, members: Sequence[tuple[_Weight, LinearView | None]], experts: Mapping[str, ExpertTokens]
) -> Extract:
    def dense(sample: Sample, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> dict[str, Captured]:
        view = members[0][1]
        assert view is not None
        tokens = _first_argument(args, kwargs).detach()
        tokens = tokens.reshape(-1, tokens.shape[-1])
        where = (group_rank(view.shard_group), group_size(view.shard_group)) if view.scattered else (0, 1)
        index, counts = sample.local(tokens.shape[0], tokens.device, *where)
        return {view.name: Captured(_normalised(module, tokens[index]), counts)}

    def routed(sample: Sample, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> dict[str, Captured]:
        tokens = _first_argument(args, kwargs).detach()
        tokens = tokens.reshape(-1, tokens.shape[-1])
        pieces = [tokens]
        if len(args) + len(kwargs) > 1:  # a grouped linear: the tokens of one expert after the other, and their numbers
            splits = kwargs["m_splits"] if "m_splits" in kwargs else args[1]
            pieces = list(torch.split(tokens, [int(n) for n in splits]))
        result = {}
        for weight, view in members:
            assert weight.expert is not None
            layer = experts[weight.moe_layer]
            if view is None and not layer.routed:
                continue  # no expert of this layer is monitored
            piece = pieces[weight.expert] if len(pieces) > 1 else pieces[0]
            rows = layer.pick(weight.expert, piece, enters=_is_fc1(weight.name))
            if view is not None:
                result[view.name] = Captured(rows)
        return result

    return dense if members[0][0].expert is None else routed


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensor = args[0] if args else next(iter(kwargs.values()))
    if not isinstance(tensor, Tensor):
        raise RuntimeError(f"expected activations as the first argument of a linear layer, got {type(tensor)}")
    return tensor


def _normalised(module: Any, tokens: Tensor) -> Tensor:
    """Return the GEMM input of sampled tokens: where a norm is fused into the module, its output.

    The norm is computed in fp32 and rounded to the type of the activations, as the fused kernel does.
    """
    gain = getattr(module, "layer_norm_weight", None)
    if gain is None:
        return tokens
    gain = gain.detach().float()
    if module.zero_centered_gamma:
        gain = gain + 1.0
    shape = (tokens.shape[-1],)
    if module.normalization == "RMSNorm":
        normed = functional.rms_norm(tokens.float(), shape, gain, module.eps)
    else:
        bias = getattr(module, "layer_norm_bias", None)
        normed = functional.layer_norm(
            tokens.float(), shape, gain, None if bias is None else bias.detach().float(), module.eps
        )
    return normed.to(tokens.dtype)


def _routing(experts: ExpertTokens, config: Any, groups: Any) -> Extract:
    """Return what hears from a router which experts the sampled tokens go to."""
    tp_group = groups.get_tensor_model_parallel_group()
    where = (group_rank(tp_group), group_size(tp_group)) if config.sequence_parallel else (0, 1)

    def extract(sample: Sample, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> dict[str, Captured]:
        probabilities, chosen = output
        index, counts = sample.local(chosen.shape[0], chosen.device, *where)
        tokens = _first_argument(args, kwargs)
        tokens = tokens.reshape(-1, tokens.shape[-1])
        experts.route(tokens, *dispatched(probabilities, chosen, config), index, max(counts))
        return {}

    return extract
