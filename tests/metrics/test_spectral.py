"""Top singular values against a full SVD: spectra with and without a gap, fused parts, warm starts, shards."""

import pytest
import torch
from torch import Tensor

from megatron_patch.metrics.spectral import TopSingularValues
from megatron_patch.metrics.views import LinearView, MasterSlice, Row


def view_of(weight: Tensor, parts: int = 1) -> LinearView:
    rows = weight.shape[0]
    part = torch.arange(rows) * parts // rows
    return LinearView(
        name=f"layer{parts}",
        kind="replicated",
        rows=tuple(Row(f"layer/{i}", "replicated", weight.shape[1], rows // parts, 1.0) for i in range(parts)),
        row_part=part,
        weight=lambda: weight,
        master=MasterSlice(lambda: weight, 0, weight.numel(), False, lambda: (0.0, 0.0)),
        shard_group=None,
        data_group=None,
    )


def measured(spectrum: TopSingularValues) -> Tensor:
    return next(iter(spectrum.measure()))[1]


def exact(weight: Tensor, parts: int = 1) -> Tensor:
    return torch.stack([torch.linalg.matrix_norm(piece.double(), 2) for piece in weight.chunk(parts)])


SHAPES = [(1, 7), (7, 1), (4, 6), (64, 64), (96, 512), (512, 128)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["gaussian", "low-rank", "orthogonal", "decaying"])
def test_top_singular_value_to_a_thousandth(shape: tuple[int, int], kind: str) -> None:
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape)
    if kind == "low-rank":
        weight = torch.randn(shape[0], 2) @ torch.randn(2, shape[1])
    if kind == "orthogonal":
        weight = torch.nn.init.orthogonal_(weight)
    if kind == "decaying":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        weight = u @ torch.diag(torch.arange(1.0, s.numel() + 1) ** -0.1) @ v
    values = measured(TopSingularValues([view_of(weight)], torch.device("cpu")))
    torch.testing.assert_close(values, exact(weight), rtol=1e-3, atol=0)


def test_parts_of_a_fused_layer_are_measured_apart() -> None:
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(32, 64), 3 * torch.randn(32, 64), 0.1 * torch.randn(32, 64)])
    values = measured(TopSingularValues([view_of(weight, 3)], torch.device("cpu")))
    torch.testing.assert_close(values, exact(weight, 3), rtol=1e-3, atol=0)


def test_a_warm_start_may_be_useless_and_still_be_good_enough() -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    spectrum = TopSingularValues([view_of(weight)], torch.device("cpu"))
    for change in (0.01, 0.3, 1000.0):
        weight += change * torch.randn(512, 512)
        torch.testing.assert_close(measured(spectrum), exact(weight), rtol=1e-3, atol=0)


def test_a_zero_matrix_has_the_singular_value_zero() -> None:
    assert measured(TopSingularValues([view_of(torch.zeros(8, 8))], torch.device("cpu"))).tolist() == [0.0]
