"""Which rows of an expert's input are sampled tokens, after Megatron's dispatcher has shuffled them over the ranks.

The dispatchers alltoall and allgather give an expert the tokens of one source rank after the other, within a source
in token order. They differ in the order of the sources: expert-tensor-parallel rank by rank (alltoall) or
expert-parallel rank by rank (allgather). So it is enough that a rank tells its peers, per expert, how many tokens it
sends there and the places of the sampled ones among them: a few integers in one all-gather per MoE layer of a measured
iteration. It happens in the router's forward call, which all peers make in the same order, as they do the dispatch.

Of the flex dispatcher the order is that of its kernels, which they tell nobody. But they move tokens and change none.
So a sampled token is found by its bits: the ranks tell each other a fingerprint of each, and where it is sent.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_patch.metrics.reduce import all_gather_flat
from megatron_patch.metrics.views import Group, group_size


class ExpertTokens:
    """The sampled rows of the local experts of one MoE layer.

    Args:
        group: the ranks that exchange tokens, numbered `expert-parallel rank * expert-tensor size + tensor rank`.
        first, local: number of the first expert on this rank, and how many there are.
    """

    at_entry = False
    """Whether rows are found in an expert's own input, which must be heard then, also if it is not monitored."""

    def __init__(self, group: Group, first: int, local: int) -> None:
        self._group = group
        self._experts = slice(first, first + local)
        self._rows: list[Tensor] = []

    @property
    def routed(self) -> bool:
        """Whether the layer's router has been heard, as that of every layer with a monitored expert is."""
        return bool(self._rows)

    def route(self, tokens: Tensor, routing_map: Tensor, chosen: Tensor, positions: Tensor, most: int) -> None:
        """Take the routing of this rank's tokens and learn that of its peers; a collective call.

        Args:
            tokens: what the router saw, [T_loc, d].
            routing_map: whether a token goes to an expert, bool [T_loc, experts].
            chosen: whether the router chose the expert for it; else it is there to fill up the expert's input.
            positions: the sampled tokens, ascending, [n].
            most: the largest number of sampled tokens of any rank.
        """
        raise NotImplementedError

    def pick(self, expert: int, tokens: Tensor, enters: bool) -> Tensor:
        """Return the sampled rows of the input of one local expert's linear layer.

        Args:
            expert: its number on this rank.
            tokens: the input, [rows, C_loc]; padding may follow the tokens.
            enters: whether it is the expert's own input, not what it has made of it.

        Raises:
            RuntimeError: the input does not have the rows that the routers announced.
        """
        raise NotImplementedError


class TokensByOrder(ExpertTokens):
    """What the order of the dispatchers alltoall and allgather tells.

    Args:
        group, first, local: as above.
        tensor_ranks: expert-tensor-parallel size.
        tensor_major: whether the dispatcher orders sources by expert-tensor-parallel rank first.
    """

    def __init__(self, group: Group, first: int, local: int, tensor_ranks: int, tensor_major: bool) -> None:
        super().__init__(group, first, local)
        sources = torch.arange(group_size(group)).view(-1, tensor_ranks)
        self._order = (sources.T if tensor_major else sources).reshape(-1).tolist()
        self._totals: list[int] = []

    def route(self, tokens: Tensor, routing_map: Tensor, chosen: Tensor, positions: Tensor, most: int) -> None:
        experts = routing_map.shape[1]
        counts = routing_map.sum(0, keepdim=True)
        place = routing_map.cumsum(0)[positions] - 1
        sampled = torch.full((most, experts), -1, dtype=torch.int64, device=routing_map.device)
        sampled[: positions.shape[0]] = torch.where(chosen[positions], place, -1)
        packed = torch.cat([counts, sampled])
        gathered = all_gather_flat(packed, self._group).view(-1, 1 + most, experts)[self._order]
        counts, sampled = gathered[:, 0, self._experts], gathered[:, 1:, self._experts]
        offsets = counts.cumsum(0) - counts  # [sources, local]
        rows = sampled + offsets[:, None, :]
        self._rows = [rows[..., e][sampled[..., e] >= 0] for e in range(rows.shape[-1])]
        self._totals = counts.sum(0).tolist()

    def pick(self, expert: int, tokens: Tensor, enters: bool) -> Tensor:
        if not self._rows or tokens.shape[0] < self._totals[expert]:
            raise RuntimeError(
                f"expert {self._experts.start + expert} received {tokens.shape[0]} rows, not the "
                f"{self._totals[expert] if self._totals else 'unknown number of'} tokens its routers sent"
            )
        return tokens[self._rows[expert]]


class TokensByContent(ExpertTokens):
    """What the bits of a token tell, where nobody tells the order of the rows (--moe-token-dispatcher-type flex).

    Exact: of tokens that are equal in every bit an expert makes the same, so it does not matter which is found.

    Args:
        group, first, local: as above.
    """

    at_entry = True

    def __init__(self, group: Group, first: int, local: int) -> None:
        super().__init__(group, first, local)
        self._sent: list[Tensor] = []

    def route(self, tokens: Tensor, routing_map: Tensor, chosen: Tensor, positions: Tensor, most: int) -> None:
        packed = torch.zeros((most, 1 + chosen.shape[1]), dtype=torch.int64, device=chosen.device)
        packed[: positions.shape[0]] = torch.cat([fingerprints(tokens[positions])[:, None], chosen[positions]], 1)
        gathered = all_gather_flat(packed, self._group).view(-1, packed.shape[1])
        to_experts = gathered[:, 1:][:, self._experts] > 0
        self._sent = [gathered[to_experts[:, e], 0] for e in range(to_experts.shape[1])]
        self._rows = [torch.empty(0)] * len(self._sent)

    def pick(self, expert: int, tokens: Tensor, enters: bool) -> Tensor:
        if enters:
            sent, marks = self._sent[expert], fingerprints(tokens)
            if not torch.isin(sent, marks).all():
                raise RuntimeError(
                    f"expert {self._experts.start + expert} received {tokens.shape[0]} rows, and a token that its "
                    "routers sent is not among them, bit by bit: the dispatcher has changed it"
                )
            there, order = marks.sort()
            self._rows[expert] = order[torch.searchsorted(there, sent)]
        return tokens[self._rows[expert]]


_COLUMNS = 256
"""Of tokens at a time, in `fingerprints`: int64 takes four times the memory of bf16."""


def fingerprints(tokens: Tensor) -> Tensor:
    """Return a number for the bits of every row of floats [n, d], int64 [n], the same for the same bits on any rank.

    Sums of products with fixed random odd numbers, modulo 2^64: two different rows meet with a chance of about 2^-62.
    """
    words = tokens.detach().contiguous().view({2: torch.int16, 4: torch.int32}[tokens.element_size()])
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (words.shape[1],), generator=generator) * 2 + 1
    total = torch.zeros(words.shape[0], dtype=torch.int64, device=words.device)
    for columns, some in zip(
        torch.split(words, _COLUMNS, 1), torch.split(factors.to(words.device), _COLUMNS), strict=True
    ):
        total += (columns.long() * some).sum(1)
    return total


def dispatched(probabilities: Tensor, chosen: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Return which tokens are sent to an expert, and which of them because the router chose it; both bool [T, experts].

    They differ where an expert's input is filled up with tokens that chose others, whose output is multiplied by 0.

    Args:
        probabilities, chosen: what a router returned, [T, experts].
        config: the TransformerConfig.
    """
    from megatron.core.transformer.moe import token_dispatcher

    if getattr(config, "moe_pad_expert_input_to_capacity", False):
        return chosen, chosen & (probabilities != 0)  # the router has filled up itself
    if getattr(config, "moe_router_padding_for_quantization", False):
        multiple = token_dispatcher.get_align_size_for_quantization(config)
        return token_dispatcher.pad_routing_map(chosen.clone(), multiple), chosen  # which writes to what it is given
    return chosen, chosen


def find_experts(names: dict[str, str], chunk: torch.nn.Module, groups: Any) -> dict[str, ExpertTokens]:
    """Return for every MoE layer of a model chunk, by its global name, what tracks the tokens of its experts.

    Args:
        names: local to global module names.
        chunk: the model chunk.
        groups: Megatron's `parallel_state`.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoEFlexTokenDispatcher

    found: dict[str, ExpertTokens] = {}
    group = groups.get_expert_tensor_and_model_parallel_group()
    for local_name, module in chunk.named_modules():
        if isinstance(module, MoELayer):
            where = group, groups.get_expert_model_parallel_rank() * module.num_local_experts, module.num_local_experts
            if isinstance(module.token_dispatcher, MoEFlexTokenDispatcher):
                found[names[local_name]] = TokensByContent(*where)
            else:
                tensor_major = isinstance(module.token_dispatcher, MoEAlltoAllTokenDispatcher)
                tensor_ranks = groups.get_expert_tensor_parallel_world_size()
                found[names[local_name]] = TokensByOrder(*where, tensor_ranks, tensor_major)
    return found
