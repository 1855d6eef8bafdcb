"""Finds the attention, MLP and Mamba blocks of Megatron's layers, for their gain."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from megatron_patch.metrics.sample import Sample
from megatron_patch.metrics.views import LinearView, SublayerView, group_rank, group_size
from megatron_patch.upstream.width.parameters import global_names

_FIRST_LINEAR = re.compile(
    r"(linear_qkv|linear_q_proj|linear_q_down_proj|linear_qkv_down_proj|in_proj|linear_fc1|router)$"
)
"""The layers that read a block's normalised input."""


def find_sublayers(
    model: Sequence[Any], views: Iterable[LinearView], config: Any, groups: Any
) -> tuple[SublayerView, ...]:
    """Return the blocks of this rank whose first linear layer is monitored.

    The gain is taken between the block's normalised input, which is that layer's input X and exists in either layer
    spec, and the block's output before the residual is added.

    Args:
        model: Megatron's model chunks.
        views: the monitored layers of this rank.
        config: the TransformerConfig.
        groups: Megatron's `parallel_state`.
    """
    from megatron.core.ssm.mamba_layer import MambaLayer
    from megatron.core.transformer.transformer_layer import TransformerLayer

    monitored = {view.name: view for view in views}
    tp_group = groups.get_tensor_model_parallel_group()
    shards, shard = group_size(tp_group), group_rank(tp_group)
    scattered = bool(config.sequence_parallel) and shards > 1
    found = []
    for chunk in model:
        names = global_names(chunk, groups.get_expert_model_parallel_rank())
        for local_name, layer in chunk.named_modules():
            if not isinstance(layer, (TransformerLayer, MambaLayer)):
                continue
            for block in ("self_attention", "mlp", "mixer"):
                name = f"{names[local_name]}.{block}"
                firsts = [v for n, v in monitored.items() if n.rpartition(".")[0] == name and _FIRST_LINEAR.search(n)]
                if firsts:
                    found.append(
                        SublayerView(
                            name=name,
                            input_row=firsts[0].rows[0].layer,
                            width=firsts[0].rows[0].fan_in,
                            module=getattr(layer, block),
                            output=_output((shard, shards) if scattered else (0, 1)),
                            counts_output=scattered or shard == 0,
                        )
                    )
    return tuple(found)


def _output(where: tuple[int, int]) -> Callable[[Sample, Any], Tensor]:
    def read(sample: Sample, result: Any) -> Tensor:
        output, bias = result if isinstance(result, tuple) else (result, None)
        flat = output.detach().reshape(-1, output.shape[-1])
        index, _ = sample.local(flat.shape[0], flat.device, *where)
        picked: Tensor = flat[index].float()
        return picked if bias is None else picked + bias.detach().float()

    return read
