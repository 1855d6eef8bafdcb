"""A stand-in for DeepEP's kernels, which need GPUs: what they do with tokens, over gloo, and in an order of its own."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.monitored import Monitored

FLEX = ("--moe-token-dispatcher-type", "flex")
Handle = tuple[Tensor, int]
"""Which of all ranks' tokens have come, and how many there are."""


def fused_dispatch(
    x: Tensor, token_indices: Tensor, token_probs: Tensor, num_experts: int, group: Any, **options: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Handle]:
    """Send tokens [T, d] to the ranks that have an expert among theirs, [T, k]; -1 is none."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region as gather

    local = num_experts // group.size()
    first = group.rank() * local
    indices = gather(token_indices, group=group)
    here = (indices >= first) & (indices < first + local)
    come = here.any(1).nonzero()[:, 0]
    come = come[torch.randperm(len(come), generator=torch.Generator().manual_seed(group.rank()))]
    experts = torch.where(here, indices - first, -1)[come]
    probabilities = torch.where(here, gather(token_probs, group=group), 0.0)[come]
    counts = experts[experts >= 0].bincount(minlength=local)
    return gather(x, group=group)[come], experts, probabilities, counts, (come, len(indices))


def fused_combine(x: Tensor, group: Any, handle: Handle, **options: bool) -> tuple[Tensor, None]:
    """Send what experts have made of tokens back and sum it."""
    from megatron.core.tensor_parallel import reduce_scatter_to_sequence_parallel_region as scatter

    come, total = handle
    return scatter(x.new_zeros(total, x.shape[1]).index_add(0, come, x), group=group), None


@dataclass
class Flex(Monitored):
    """Trains with the flex dispatcher; with `changes` it hands on other tokens than it was given."""

    changes: bool = False

    def before_arguments(self) -> None:
        from megatron.core.transformer.moe import token_dispatcher

        super().before_arguments()

        def dispatch(x: Tensor, *args: Any, **options: bool) -> Any:
            return fused_dispatch(x * 1.001 if self.changes else x, *args, **options)

        token_dispatcher.fused_dispatch, token_dispatcher.fused_combine = dispatch, fused_combine
        token_dispatcher.set_deepep_num_sms = lambda number: None
