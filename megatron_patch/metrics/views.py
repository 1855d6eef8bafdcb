"""What the metrics know of a model: neutral records of its linear layers and sublayers, as one rank holds them.

Shape letters: K = fan-out, C = fan-in, B = sampled tokens; `_loc` = this rank's tensor-parallel shard. Weights are
[K_loc, C_loc], inputs [B, C_loc] (one token a row), outputs [B, K_loc].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_patch.metrics.sample import Sample

Kind = Literal["column", "row", "replicated"]
Group = dist.ProcessGroup | None
"""A process group; None = this rank alone."""


def group_size(group: Group) -> int:
    """Return the number of ranks in a group."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """Return this rank's place in a group."""
    return 0 if group is None else group.rank()


@dataclass(frozen=True)
class Row:
    """One line of the result: a linear layer or one part of a fused one. The same on every rank."""

    layer: str
    """Global name without wrappers, a part after ``/``: ``decoder.layers.3.self_attention.linear_qkv/q``."""
    kind: str
    """How the whole layer is split over tensor-parallel ranks: column, row or replicated."""
    fan_in: int
    fan_out: int
    """Global shape of the part."""
    m: float
    """Width multiplier of the layer."""
    mean: str | None = None
    """Name of the line that averages this one over the experts; None outside mixture-of-experts layers."""
    update_rms: float | None = 1.0
    """b of the norm recurrence (arXiv 2510.19093, eq. 30), 1 under AdamW; None: not known for this optimizer."""


@dataclass(frozen=True)
class MasterSlice:
    """This rank's piece of the fp32 weights that the optimizer updates."""

    read: Callable[[], Tensor]
    """Returns the current values, flat, fp32, [stop - start]; it may alias the optimizer's memory."""
    start: int
    stop: int
    """Half-open range within the flattened local weight [K_loc * C_loc]; empty on a rank that owns nothing of it."""
    sharded: bool
    """Whether the ranks of the data group own different slices (distributed optimizer) or all own the whole."""
    hyperparameters: Callable[[], tuple[float, float]]
    """Returns learning rate and weight decay that the next optimizer step will use; zeros where the range is empty."""


@dataclass(frozen=True, eq=False)
class LinearView:
    """One weight matrix `Y = W X` of the model, as this rank holds it."""

    name: str
    kind: Kind
    rows: tuple[Row, ...]
    """One per part; a single one for a layer that is not fused."""
    row_part: Tensor
    """Index into `rows` for each local output row, int64 [K_loc]."""
    weight: Callable[[], Tensor]
    """Returns the weight that the forward pass multiplied with, [K_loc, C_loc], in any floating-point type."""
    master: MasterSlice
    shard_group: Group
    """Ranks that hold the other shards (tensor-parallel or expert-tensor-parallel group)."""
    data_group: Group
    """Ranks that hold the same shard and see other tokens; with a distributed optimizer, those that own its slices."""
    scattered: bool = False
    """Whether the captured tokens are split over `shard_group` (sequence parallelism)."""
    block_diagonal: bool = False
    """Whether each of the P parts reads a stretch of the inputs of its own, [B, P C_loc], as a grouped convolution."""
    replica: int = 0
    """Which of several holders of the whole weight `data_group` is, each with other tokens; sums over it count at 0."""
    gathered_shape: tuple[int, int] | None = None
    """Shape of the weight where `weight` is a collective call over `data_group`, whose ranks hold a part each (ZeRO 3);
    None where every rank holds it."""

    fixed_tokens: bool = False
    """Whether every rank of the data group looks at `Sample.count` tokens, or at all it has, if these are fewer."""

    @property
    def columns(self) -> int:
        """C_loc."""
        return self.gathered_shape[1] if self.gathered_shape else self.weight().shape[1]

    @property
    def counts_own_tokens(self) -> bool:
        """Whether what this rank computes from its tokens is not also computed by a peer in `shard_group`."""
        return self.kind != "replicated" or self.scattered or group_rank(self.shard_group) == 0

    @property
    def owns_first_entry(self) -> bool:
        """Whether this rank, and no other, speaks for the whole weight: reports its LR, say."""
        first = self.master.start == 0 < self.master.stop if self.master.sharded else group_rank(self.data_group) == 0
        return first and group_rank(self.shard_group) == 0 and self.replica == 0

    @property
    def counts_own_weight(self) -> bool:
        """Whether sums over this rank's shard of W are not also computed by a peer in `shard_group`."""
        return self.replica == 0 and (self.kind != "replicated" or group_rank(self.shard_group) == 0)


@dataclass(frozen=True)
class Captured:
    """Sampled inputs of one linear layer on this rank."""

    inputs: Tensor
    """[B_loc, C_loc], in the precision of the activations."""
    counts: tuple[int, ...] = ()
    """Tokens that each rank of the shard group sampled, where they are scattered over it."""


Extract = Callable[[Sample, tuple[Any, ...], dict[str, Any], Any], Mapping[str, Captured]]
"""From the tokens to look at, and a module's positional and keyword arguments and output, to inputs by view name."""


@dataclass(frozen=True, eq=False)
class CapturePoint:
    """A module of which one forward call of the first microbatch of a measured step shows the inputs of some layers."""

    module: torch.nn.Module
    extract: Extract
    call: int = 0
    """Which one: a module may be called more than once in a forward pass (an LM head by multi-token prediction)."""


@dataclass(frozen=True, eq=False)
class SublayerView:
    """An attention or MLP block, of which the gain RMS(output) / RMS(input) is reported."""

    name: str
    input_row: str
    """The line whose input is the block's normalised input: of its first linear layer."""
    width: int
    """Length of input and output vectors."""
    module: torch.nn.Module
    output: Callable[[Sample, Any], Tensor]
    """From the tokens to look at and the module's output to the sampled tokens' output vectors, [B_loc, hidden]."""
    counts_output: bool
    """False where a peer in the tensor-parallel group computes the same output."""
