"""Top singular values against numpy's SVD: thousands of spectra, fused parts, shards, weights that are no numbers."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_patch.metrics import spectral
from megatron_patch.metrics.spectral import TOLERANCE, TopSingularValue, TopSingularValues
from megatron_patch.metrics.views import Group, LinearView, MasterSlice, Row
from tests.support.pool import Pool


def view_of(weight: Tensor, parts: int = 1, kind: Any = "replicated", group: Group = None) -> LinearView:
    rows = weight.shape[0]
    part = torch.arange(rows) * parts // rows
    return LinearView(
        name="layer",
        kind=kind,
        rows=tuple(Row(f"layer/{i}", kind, weight.shape[1], rows // parts, 1.0) for i in range(parts)),
        row_part=part,
        weight=lambda: weight,
        master=MasterSlice(lambda: weight, 0, weight.numel(), False, lambda: (0.0, 0.0)),
        shard_group=group,
        data_group=None,
    )


def measured(*views: LinearView) -> list[TopSingularValue]:
    return sorted(TopSingularValues(views).measure(), key=lambda top: views.index(top.view))


def exact(weight: Tensor, parts: int = 1) -> list[float]:
    return [float(np.linalg.svd(piece.double().numpy(), compute_uv=False)[0]) for piece in weight.chunk(parts)]


def agrees(values: Tensor, errors: Tensor, expected: Sequence[float]) -> bool:
    """Whether values are right to the documented bound, and to the one that stands beside each."""
    return all(
        0 <= error <= TOLERANCE and value <= true * (1 + spectral.ROUNDING) and true <= value * (1 + error)
        for value, error, true in zip(values.tolist(), errors.tolist(), expected, strict=True)
    )


# --- spectra: n singular values, descending or not, of which some draw of u in [0, 1) chooses one ---------------------

SPECTRA = {
    "flat": lambda n, u: np.ones(n),
    "flat with an outlier": lambda n, u: np.where(np.arange(n) == 0, 1 + 10 ** (-0.5 - 3 * u[0]), 1.0),
    "clustered": lambda n, u: 1 + 10 ** (-1 - 3 * u[0]) * u,
    "two clusters": lambda n, u: np.where(np.arange(n) <= n * u[0] / 2, 1.0, 1 - 10 ** (-0.5 - 2 * u[0])) - 1e-3 * u,
    "power law": lambda n, u: np.arange(1.0, n + 1) ** (-0.02 - u[0]),
    "geometric": lambda n, u: (0.3 + 0.699 * u[0]) ** np.arange(n),
    "uniform": lambda n, u: u,
    "uniform with an outlier": lambda n, u: np.where(np.arange(n) == 0, 1 + 10 ** (-1 - 3 * u[0]), u),
    "low rank": lambda n, u: np.where(np.arange(n) <= 5 * u[0], u + 0.1, 0.0),
    "one direction": lambda n, u: np.where(np.arange(n) == 0, 1.0, 0.0),
}


def matrices(kind: str, number: int) -> Iterator[Tensor]:
    """Yield matrices of one kind, 1 to 96 rows and columns, in fp32."""
    draw = np.random.default_rng(sorted([*SPECTRA, "gaussian", "tiny", "huge"]).index(kind))
    for _ in range(number):
        rows, columns = (int(n) for n in draw.integers(1, 97, 2))
        matrix = draw.normal(size=(rows, columns))
        if kind in SPECTRA:
            n = min(rows, columns)
            u, _, v = np.linalg.svd(matrix, full_matrices=False)
            matrix = (u * SPECTRA[kind](n, draw.random(n))) @ v
        if kind == "tiny":
            matrix *= 10.0 ** draw.uniform(-36, -20)
        if kind == "huge":
            matrix *= 10.0 ** draw.uniform(10, 34)
        yield torch.from_numpy(matrix).float()


@pytest.mark.parametrize("kind", [*SPECTRA, "gaussian", "tiny", "huge"])
def test_top_singular_values_of_many_matrices_are_within_the_bound_in_the_file(kind: str) -> None:
    weights = list(matrices(kind, 200))
    views = [view_of(weight) for weight in weights]
    for weight, top in zip(weights, measured(*views), strict=True):
        assert agrees(top.values, top.errors, exact(weight)), (
            kind,
            weight.shape,
            top.values,
            top.errors,
            exact(weight),
        )


def test_a_wide_spectrum_without_a_gap_is_measured_to_the_bound() -> None:
    torch.manual_seed(0)
    weight = torch.randn(768, 512)
    (top,) = measured(view_of(weight))
    assert agrees(top.values, top.errors, exact(weight))


def test_parts_of_a_fused_layer_are_measured_apart_whatever_their_scale() -> None:
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(32, 64), 1e3 * torch.randn(32, 64), 1e-25 * torch.randn(32, 64)])
    (top,) = measured(view_of(weight, 3))
    assert agrees(top.values, top.errors, exact(weight, 3))


def test_a_zero_matrix_has_the_singular_value_zero_and_no_error() -> None:
    (top,) = measured(view_of(torch.zeros(8, 8)))
    assert (top.values.tolist(), top.errors.tolist()) == ([0.0], [0.0])


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_have_no_singular_value_and_spoil_no_other(number: float) -> None:
    torch.manual_seed(0)
    good, bad = torch.randn(12, 9), torch.randn(12, 9)
    bad[3, 4] = number
    found, none = measured(view_of(good), view_of(bad, 2))
    assert agrees(found.values, found.errors, exact(good))
    assert none.values.isnan().all()
    assert none.errors.isnan().all()


def test_the_bound_in_the_file_says_when_the_steps_did_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "MOST_STEPS", spectral.CHECK_EVERY)
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    (top,) = measured(view_of(weight))
    error = top.errors.item()
    assert error > TOLERANCE
    assert top.values.item() < exact(weight)[0] <= top.values.item() * (1 + error)


def sharded(weights: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Measure matrices cut over the ranks: by rows, by columns, not at all, in turn."""
    group = dist.group.WORLD
    rank, ranks = dist.get_rank(), dist.get_world_size()
    views = []
    for place, weight in enumerate(weights):
        kind = ("column", "row", "replicated")[place % 3]
        piece = weight if kind == "replicated" else weight.chunk(ranks, 1 if kind == "row" else 0)[rank].contiguous()
        views.append(view_of(piece, kind=kind, group=group))
    return [(top.values, top.errors) for top in measured(*views)]


def test_shards_of_a_matrix_give_what_the_matrix_gives_and_a_nan_of_one_rank_is_everybodys(pool: Pool) -> None:
    weights = [torch.from_numpy(np.random.default_rng(i).normal(size=(48, 44))).float() for i in range(6)]
    weights[3][-1, -1] = math.nan  # held by the last rank only
    first, second = pool.run(sharded, ranks=2, weights=weights)
    assert repr(first) == repr(second)
    for place, (weight, (values, errors)) in enumerate(zip(weights, first, strict=True)):
        if place == 3:
            assert values.isnan().all()
            assert errors.isnan().all()
        else:
            assert agrees(values, errors, exact(weight))
