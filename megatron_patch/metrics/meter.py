"""One measured optimizer step: from inputs and weights on every rank to sums of squares over the whole model."""

from collections.abc import Iterator, Sequence
from itertools import chain, groupby

import torch
from torch import Tensor
from torch.nn import functional

from megatron_patch.metrics.beside import Beside, OnItsWay
from megatron_patch.metrics.probes import Probes
from megatron_patch.metrics.products import full_precision, product
from megatron_patch.metrics.reduce import (
    BUCKET_ELEMENTS,
    PartialSums,
    all_gather_flat,
    all_reduce_sum,
    gather_rows,
    part_sums_of_squares,
    sum_of_squares,
)
from megatron_patch.metrics.registry import Registry
from megatron_patch.metrics.sample import Sample
from megatron_patch.metrics.slices import Block, SliceExchange, gradient_update_
from megatron_patch.metrics.spectral import TopSingularValues
from megatron_patch.metrics.views import Captured, CapturePoint, Group, LinearView, SublayerView, group_rank, group_size

SLOTS = (
    "weight",  # ‖W‖^2
    "update",  # ‖dW‖^2
    "input",  # ‖X‖^2
    "weight_output",  # ‖W X‖^2
    "update_output",  # ‖dW X‖^2
    "tokens",  # B
    "lr",
    "weight_decay",
    "top_singular_value",
    "top_singular_value_error",
)
"""What is reduced for each line of the result."""

SUBLAYER_SLOTS = ("output", "tokens")
"""What is reduced for each sublayer: the sum of squares of its output, and the tokens."""


class Sums:
    """The reduced sums of a measured step, on their way from the device.

    Args:
        packed: everything in one vector, as `Meter` packs it.
        rows, sublayers: how many lines and sublayers there are.
    """

    def __init__(self, packed: Tensor, rows: int, sublayers: int) -> None:
        self._packed = OnItsWay(packed)
        self._rows, self._sublayers = rows, sublayers

    def read(self) -> tuple[Tensor, Tensor, bool]:
        """Return sums per line [lines, SLOTS] and per sublayer [sublayers, SUBLAYER_SLOTS], float64 on the host.

        And whether any rank skipped the step (then the update's sums mean nothing). Waits for the device, if need be.
        """
        packed = self._packed.arrived()
        table, sublayers = _unpacked(packed, self._rows, self._sublayers)
        (skipped,) = packed[-1:].tolist()  # not a read of one number, as which a profile would count it
        return table, sublayers, skipped > 0


class Meter:
    """Measures one optimizer step at a time: `begin`, forward and backward, `before_update`, the step, `after_update`.

    Memory beyond the training's own: the fp32 slices of the monitored weights that this rank's optimizer owns, from
    `before_update` to `after_update`; the sampled inputs, in the precision and split of the activations; and a chunk of
    inputs (`BUCKET_ELEMENTS`, or one layer if that is larger), one layer's weight in fp32 and its outputs.

    Args:
        views: the linear layers this rank holds a shard of, in an order that its peers share.
        points: the modules that show their inputs.
        sublayers: attention and MLP blocks on this rank.
        registry: the lines of the whole model.
        world: all ranks; None without torch.distributed.
        device: where weights and sums live.
    """

    def __init__(
        self,
        views: Sequence[LinearView],
        points: Sequence[CapturePoint],
        sublayers: Sequence[SublayerView],
        registry: Registry,
        world: Group,
        device: torch.device,
    ) -> None:
        self._views = [view for view in views if view.counts_own_tokens]
        self._weight_views = views
        self._sublayers = sublayers
        self._registry = registry
        self._world = world
        self._device = device
        self._index = {
            view.name: torch.tensor([registry.row_index[row.layer] for row in view.rows], device=device)
            for view in views
        }
        self._exchanges = [
            (members, SliceExchange(members, members[0].data_group, device))
            for members in _by_group([v for v in self._views if v.master.sharded], "data_group")
        ]
        self._require_equal_slices()
        self._partials = {id(v.shard_group): PartialSums(v.shard_group) for v in self._views if v.kind == "row"}
        self._spectral = TopSingularValues(views)
        self._beside = Beside(device)
        self.probes = Probes(points, sublayers)
        self._tokens = 0
        self._reset()

    def _reset(self) -> None:
        rows, sublayers = len(self._registry.rows), len(self._registry.sublayers)
        # One vector for everything: lines, sublayers, and the number of ranks whose update failed.
        self._packed = torch.zeros(
            rows * len(SLOTS) + sublayers * len(SUBLAYER_SLOTS) + 1, dtype=torch.float64, device=self._device
        )
        self._table, self._sublayer_table = _unpacked(self._packed, rows, sublayers)
        self._captured: dict[str, Captured] = {}
        self._old: dict[str, Tensor] = {}
        self._hyperparameters: dict[str, tuple[float, float]] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of tensors kept between calls: snapshots of weights and sampled inputs."""
        captured = [*self._captured.values(), *self.probes.captured.values()]
        tensors = [*self._old.values(), *(c.inputs for c in captured)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def begin(self, sample: Sample) -> None:
        """Attach the hooks; also when a forward pass is repeated.

        Args:
            sample: the tokens to look at, the same number on every data-parallel rank.
        """
        self._reset()
        self._tokens = sample.count
        self.probes.attach(sample)

    def weight_norms(self) -> list[float]:
        """Return ‖W‖^2 of every line of the whole model; a collective call, between steps."""
        self._reset()
        with torch.no_grad():
            self._weight_sums()
        all_reduce_sum(self._packed, self._world)
        weights: list[float] = self._table[:, SLOTS.index("weight")].tolist()
        self._reset()
        return weights

    def before_update(self, alignment: bool, spectral: bool) -> None:
        """Use the weights of this step while they are there: W X, ‖W‖, singular values, and a copy of the fp32 slices.

        Args:
            alignment: whether alignment is measured; `begin` was called before the forward pass then.
            spectral: whether top singular values are measured.
        """
        if not alignment:
            self._reset()
        with torch.no_grad(), full_precision():
            self._weight_sums()
            if spectral:
                for top in self._spectral.measure():
                    view = top.view
                    if group_rank(view.data_group) == 0 and group_rank(view.shard_group) == 0 and view.replica == 0:
                        self._add(top.view, "top_singular_value", top.values)
                        self._add(top.view, "top_singular_value_error", top.errors)
            if alignment:
                self._take_inputs()
                for chunk in self._chunks(self._views):
                    inputs = self._inputs(chunk)
                    for view in chunk:
                        self._output_sums(view, "weight_output", Block(slice(None), view.weight()), inputs[view.name])
                for view in self._views:
                    self._hyperparameters[view.name] = view.master.hyperparameters()
                    self._old[view.name] = view.master.read().clone()

    def after_update(self, succeeded: bool) -> Sums:
        """Measure the update and reduce everything in one all-reduce.

        On a GPU only the updates themselves are formed in the optimizer's stream, which may then change the weights
        again; their products are made beside the next step, and nothing here waits for the device.

        Args:
            succeeded: whether this rank's optimizer made the step.

        Returns:
            What is read later; the same on every rank.
        """
        with torch.no_grad(), full_precision():
            deltas = self._updates()
            inputs = (captured.inputs for captured in self._captured.values())
            partials = chain.from_iterable(partial.held for partial in self._partials.values())
            with self._beside.work(chain(deltas.values(), inputs, partials, [self._packed])):
                if deltas:
                    self._update_sums(deltas)
                for partial in self._partials.values():
                    partial.flush()
                self._packed[-1] = 0.0 if succeeded else 1.0
                all_reduce_sum(self._packed, self._world)
                sums = Sums(self._packed, len(self._registry.rows), len(self._registry.sublayers))
        self._reset()
        return sums

    # --- sums -----------------------------------------------------------------------------------------------------

    def _add(self, view: LinearView, slot: str, values: Tensor) -> None:
        self._table[self._index[view.name], SLOTS.index(slot)] += values

    def _weight_sums(self) -> None:
        for view in self._weight_views:
            counts = view.counts_own_weight and group_rank(view.data_group) == 0
            # Where reading it is a collective call, all ranks read.
            weight = view.weight() if counts or view.gathered_shape else None
            if counts and weight is not None:
                self._add(view, "weight", part_sums_of_squares(weight.float(), view.row_part, len(view.rows)))
            if view.owns_first_entry:
                lr, weight_decay = view.master.hyperparameters()
                self._table[self._index[view.name], SLOTS.index("lr")] += lr
                self._table[self._index[view.name], SLOTS.index("weight_decay")] += weight_decay

    def _take_inputs(self) -> None:
        """Detach the hooks, gather scattered tokens, and count."""
        self.probes.detach()
        captured = self.probes.captured
        absent = sorted(view.name for view in self._views if view.name not in captured)
        if absent:
            raise RuntimeError(
                f"the forward pass never called {absent[0]} ({len(absent)} layers in all): it runs through a fused "
                "implementation that megatron_patch does not know; leave it out with --alignment-layers"
            )
        self._captured = {view.name: captured[view.name] for view in self._views}
        for view in self._views:
            inputs = captured[view.name].inputs
            first = group_rank(view.shard_group) == 0
            if first or view.scattered or view.kind == "row":
                self._add(view, "input", sum_of_squares(inputs.float()).expand(len(view.rows)))
            if first or view.scattered:
                self._table[self._index[view.name], SLOTS.index("tokens")] += inputs.shape[0]
        for sublayer in self._sublayers:
            if sublayer.counts_output:
                output = self.probes.outputs[sublayer.name]
                at = self._sublayer_table[self._registry.sublayer_index[sublayer.name]]
                at[SUBLAYER_SLOTS.index("output")] += sum_of_squares(output)
                at[SUBLAYER_SLOTS.index("tokens")] += output.shape[0]
        self.probes.captured, self.probes.outputs = {}, {}

    def _chunks(self, views: Sequence[LinearView]) -> Iterator[list[LinearView]]:
        """Split layers so that the inputs of a chunk fit a bucket, by sizes that all ranks of their groups agree on.

        Layers of different shard groups are split apart: peers in one need not hold the same layers of another (two
        tensor-parallel ranks with different experts, of which only one's are monitored).
        """
        for members in _by_group(views, "shard_group"):
            chunk: list[LinearView] = []
            elements = 0
            for view in members:
                size = self._tokens * view.columns
                if chunk and elements + size > BUCKET_ELEMENTS:
                    yield chunk
                    chunk, elements = [], 0
                chunk.append(view)
                elements += size
            if chunk:
                yield chunk

    def _inputs(self, views: Sequence[LinearView]) -> dict[str, Tensor]:
        """Return the inputs of some layers, [B, C_loc]; scattered tokens are gathered for column-parallel ones."""
        inputs = {view.name: self._captured[view.name].inputs for view in views}
        for members in _by_group([v for v in views if v.kind == "column" and v.scattered], "shard_group"):
            pieces = [(inputs[view.name], self._captured[view.name].counts) for view in members]
            for view, rows in zip(members, gather_rows(pieces, members[0].shard_group), strict=True):
                inputs[view.name] = rows
        return inputs

    def _token_number(self, view: LinearView) -> int:
        captured = self._captured[view.name]
        return sum(captured.counts) if view.kind == "column" and view.scattered else captured.inputs.shape[0]

    def _output_sums(self, view: LinearView, slot: str, block: Block, inputs: Tensor) -> None:
        """Add the squares of block.delta @ inputs; for row-parallel layers after the sum over the shard group."""
        outputs = _outputs(view, block, inputs.T)
        if view.kind == "row":
            self._partials[id(view.shard_group)].add(outputs, lambda square: self._add(view, slot, square))
        else:
            self._add(view, slot, part_sums_of_squares(outputs, view.row_part[block.rows], len(view.rows)))

    def _updates(self) -> dict[str, Tensor]:
        """Return this rank's slices of the updates, by view, over the copies of the weights; none if not measured."""
        deltas = {}
        for view in self._views if self._old else ():
            lr, weight_decay = self._hyperparameters[view.name]
            deltas[view.name] = gradient_update_(self._old.pop(view.name), view.master.read(), lr, weight_decay)
        return deltas

    def _update_sums(self, deltas: dict[str, Tensor]) -> None:
        for chunk in self._chunks([view for view in self._views if not view.master.sharded]):
            inputs = self._inputs(chunk)
            for view in chunk:
                whole = Block(slice(None), deltas.pop(view.name).view(view.row_part.shape[0], view.columns))
                self._block_sums(view, [whole], inputs[view.name], group_rank(view.data_group) == 0)
        for members, exchange in self._exchanges:
            rows = exchange.whole_rows([deltas[view.name] for view in members])
            fixed = all(view.fixed_tokens for view in members)
            if fixed:  # what all ranks know need not be exchanged, which would make the host wait
                tokens = [[self._tokens] * len(members)] * group_size(members[0].data_group)
            else:
                tokens = exchange.token_numbers([self._token_number(view) for view in members])
            place = {view.name: i for i, view in enumerate(members)}
            for chunk in self._chunks(members):
                which = [place[view.name] for view in chunk]
                own = self._inputs(chunk)
                if fixed:
                    own = {name: _filled(inputs, self._tokens) for name, inputs in own.items()}
                everyones = exchange.all_tokens(which, [own[view.name] for view in chunk], tokens)
                for i, view, inputs_of_all in zip(which, chunk, everyones, strict=True):
                    if inputs_of_all is not None:
                        self._block_sums(view, rows[i], inputs_of_all, count_weight=True)

    def _block_sums(self, view: LinearView, blocks: Sequence[Block], inputs: Tensor, count_weight: bool) -> None:
        for block in blocks:
            if count_weight and view.counts_own_weight:
                sums = part_sums_of_squares(block.delta, view.row_part[block.rows], len(view.rows))
                self._add(view, "update", sums)
            self._output_sums(view, "update_output", block, inputs)

    def _require_equal_slices(self) -> None:
        """Row-parallel partial outputs can only be added if the peers compute the same rows."""
        sharded = [view for view in self._views if view.kind == "row" and view.master.sharded]
        for members in _by_group(sharded, "shard_group"):
            own = torch.tensor([[v.master.start, v.master.stop] for v in members], device=self._device)
            ranges = all_gather_flat(own, members[0].shard_group)
            if not bool((ranges == ranges[0]).all()):
                raise RuntimeError("tensor-parallel peers own different slices of a row-parallel weight")


def _outputs(view: LinearView, block: Block, inputs: Tensor) -> Tensor:
    """Return block.delta @ inputs, [rows, B], where inputs are [C_loc, B], or [P C_loc, B] of a block-diagonal W."""
    if not view.block_diagonal:
        return product(block.delta, inputs)
    outputs = inputs.new_empty(block.delta.shape[0], inputs.shape[1], dtype=torch.float32)
    part = view.row_part[block.rows]
    for i, own in enumerate(inputs.chunk(len(view.rows))):
        outputs[part == i] = product(block.delta[part == i], own)
    return outputs


def _filled(inputs: Tensor, rows: int) -> Tensor:
    """Return inputs with rows of zeros, which add nothing to any sum, up to a number of rows."""
    return functional.pad(inputs, (0, 0, 0, rows - inputs.shape[0])) if inputs.shape[0] < rows else inputs


def _unpacked(packed: Tensor, rows: int, sublayers: int) -> tuple[Tensor, Tensor]:
    """Return the parts of the packed vector for lines and for sublayers, without its last entry."""
    table = packed[: rows * len(SLOTS)].view(rows, len(SLOTS))
    return table, packed[rows * len(SLOTS) : -1].view(sublayers, len(SUBLAYER_SLOTS))


def _by_group(views: Sequence[LinearView], attribute: str) -> list[list[LinearView]]:
    """Split views by a process group, in the order of their first member."""
    first: dict[int, int] = {}
    for place, view in enumerate(views):
        first.setdefault(id(getattr(view, attribute)), place)
    ordered = sorted(views, key=lambda view: first[id(getattr(view, attribute))])
    return [list(g) for _, g in groupby(ordered, key=lambda view: id(getattr(view, attribute)))]
