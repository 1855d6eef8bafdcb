"""A made-up model of a few linear layers: full matrices, and the same cut over tensor- and data-parallel ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_patch.metrics import meter as meter_module
from megatron_patch.metrics import reduce
from megatron_patch.metrics.meter import Meter
from megatron_patch.metrics.registry import Registry
from megatron_patch.metrics.sample import Sample
from megatron_patch.metrics.views import Captured, CapturePoint, LinearView, MasterSlice, Row

LR, WEIGHT_DECAY = 0.1, 0.1
TOKENS, SAMPLED = 24, 10  # per data-parallel rank


@dataclass(frozen=True)
class Layer:
    """A layer of the full model."""

    name: str
    kind: str
    fan_out: int
    fan_in: int
    parts: tuple[str, ...] = ("",)
    scattered: bool = False


LAYERS = (
    Layer("qkv", "column", 24, 10, ("/q", "/k", "/v"), scattered=True),
    Layer("proj", "row", 7, 12),
    Layer("fc1", "column", 16, 6, ("/gate", "/up")),
    Layer("fc2", "row", 10, 16),
    Layer("router", "replicated", 4, 10, scattered=True),
    Layer("down", "replicated", 5, 10),
)


def part_of_rows(layer: Layer) -> Tensor:
    """Which part each global output row belongs to, cut so that each tensor-parallel shard has rows of every part."""
    if layer.parts == ("/q", "/k", "/v"):  # two query groups of [2 q rows, 1 k row, 1 v row] * 3
        return torch.tensor([0] * 6 + [1] * 3 + [2] * 3).repeat(2)
    if layer.parts == ("/gate", "/up"):
        return torch.tensor([0] * 4 + [1] * 4).repeat(2)
    return torch.zeros(layer.fan_out, dtype=torch.int64)


def layers(copies: int) -> tuple[Layer, ...]:
    """The layers, several times over under different names."""
    return tuple(replace(layer, name=f"{layer.name}{i or ''}") for i in range(copies) for layer in LAYERS)


def full_model(data_ranks: int, copies: int = 1) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Weights before and after a step [K, C] and inputs [data rank, token, C]: fp32 numbers in float64."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).double()

    result = {}
    for layer in layers(copies):
        old = draw(layer.fan_out, layer.fan_in)
        new = ((1 - LR * WEIGHT_DECAY) * old + LR * draw(layer.fan_out, layer.fan_in)).float().double()
        result[layer.name] = old, new, draw(data_ranks, TOKENS, layer.fan_in)
    return result


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Collect the kind and the bytes sent of every collective."""
    calls: list[tuple[str, int]] = []

    def counting(kind: str, original: Any, sent: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((kind, args[sent].numel() * args[sent].element_size()))
            return original(*args, **kwargs)

        return call

    places = (
        (dist, "all_reduce", 0),
        (dist, "all_to_all_single", 1),
        (reduce, "_all_gather", 1),
        (reduce, "_reduce_scatter", 1),
    )
    originals = [getattr(module, name) for module, name, _ in places]
    for (module, name, sent), original in zip(places, originals, strict=True):
        setattr(module, name, counting(name.strip("_"), original, sent))
    try:
        yield calls
    finally:
        for (module, name, _), original in zip(places, originals, strict=True):
            setattr(module, name, original)


def measure(
    tp: int,
    dp: int,
    sharded: bool,
    spectral: bool = False,
    copies: int = 1,
    idle: str = "",
    bucket: int | None = None,
) -> dict[str, Any]:
    """Measure one step of the full model, cut over tp x dp ranks.

    Args:
        tp, dp: tensor- and data-parallel size.
        sharded: whether the fp32 weights are cut over the data-parallel ranks.
        spectral: whether to measure top singular values.
        copies: how many times each layer exists.
        bucket: size of the buckets, if not the usual one.
        idle: a layer that gets no token on the last data-parallel rank, as an expert may.

    Returns:
        The reduced table, the collectives that were made, and what was held.
    """
    if bucket is not None:
        reduce.BUCKET_ELEMENTS = meter_module.BUCKET_ELEMENTS = bucket
    rank = dist.get_rank()
    tp_rank, dp_rank = rank % tp, rank // tp
    tp_groups = [dist.new_group([d * tp + t for t in range(tp)]) for d in range(dp)]
    dp_groups = [dist.new_group([d * tp + t for d in range(dp)]) for t in range(tp)]
    tp_group, dp_group = tp_groups[dp_rank], dp_groups[tp_rank]
    model = full_model(dp, copies)
    sample = Sample(iteration=5, count=SAMPLED)
    views, points, updates = [], [], {}
    for layer in layers(copies):
        old, new, inputs = model[layer.name]
        parts = part_of_rows(layer)
        x = inputs[dp_rank]
        if layer.kind == "column":
            old, new, parts = (t.chunk(tp)[tp_rank] for t in (old, new, parts))
        if layer.kind == "row":
            old, new, x = (t.chunk(tp, dim=-1)[tp_rank] for t in (old, new, x))
        if layer.scattered:
            x = x.chunk(tp)[tp_rank]
        weight = old.float().contiguous()
        size = weight.numel()
        start, stop = 0, size
        if sharded:  # cuts that fall inside a row, and a rank that may own next to nothing
            cuts = [0, *(min(size, (size * (d + 1)) // dp + 3) for d in range(dp - 1)), size]
            start, stop = cuts[dp_rank], cuts[dp_rank + 1]
        master = weight.reshape(-1)[start:stop].clone()
        updates[layer.name] = (master, new.float().reshape(-1)[start:stop])
        rows = tuple(
            Row(layer.name + part, layer.kind, layer.fan_in, int((part_of_rows(layer) == i).sum()), 1.0)
            for i, part in enumerate(layer.parts)
        )
        view = LinearView(
            name=layer.name,
            kind=layer.kind,  # type: ignore[arg-type]
            rows=rows,
            row_part=parts.contiguous(),
            weight=lambda weight=weight: weight,
            master=MasterSlice(lambda m=master: m, start, stop, sharded, lambda: (LR, WEIGHT_DECAY)),
            shard_group=tp_group,
            data_group=dp_group,
            scattered=layer.scattered,
        )
        views.append(view)
        module = torch.nn.Identity()

        def extract(
            sample: Sample, args: Any, kwargs: Any, output: Any, view: LinearView = view
        ) -> dict[str, Captured]:
            x = args[0]
            where = (tp_rank, tp) if view.scattered else (0, 1)
            index, counts = sample.local(x.shape[0], x.device, *where)
            if view.name == idle and dp_rank == dp - 1:
                index, counts = index[:0], tuple(0 for _ in counts)
            return {view.name: Captured(x[index].float(), counts)}

        points.append((CapturePoint(module, extract), x.float()))
    registry = Registry([row for view in views for row in view.rows], [], dist.group.WORLD)
    meter = Meter(views, [point for point, _ in points], [], registry, dist.group.WORLD, torch.device("cpu"))
    meter.begin(sample)
    for point, x in points:
        point.module(x)
        point.module(torch.full_like(x, 1e9))  # later microbatches and recomputation must not count
    with counted() as calls:
        meter.before_update(alignment=True, spectral=spectral)
        held = meter.held_bytes
        for master, new in updates.values():
            master.copy_(new)
        table, _, skipped = meter.after_update(True).read()
    return {
        "rows": [row.layer for row in registry.rows],
        "table": table.tolist(),
        "skipped": skipped,
        "calls": calls,
        "held_bytes": held,
        "slice_bytes": sum(m.numel() * 4 for m, _ in updates.values()),
    }
