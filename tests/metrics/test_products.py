"""Split products against float64: the arithmetic of the tensor cores, emulated on a CPU."""

import math

import pytest
import torch
from torch import Tensor

from megatron_patch.metrics.products import emulated, full_precision, parts, product, split_product

UNIT = 2.0**-8
"""Half of bf16's last place: the largest relative error of one rounding."""


def random(*shape: int, seed: int = 0, spread: float = 0.0) -> Tensor:
    """Normal entries, fp32; with a spread, their sizes differ by powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * 10 ** (spread * torch.randn(*shape, generator=generator))


def ill_conditioned(rows: int, columns: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A weight of rank 1 and inputs that it maps to nearly nothing: alignment 1e-4."""
    direction = random(1, columns, seed=1)
    x = random(columns, tokens, seed=2)
    along = direction @ x / direction.square().sum()
    return random(rows, 1, seed=3) @ direction, x - direction.T @ along * (1 - 1e-4)


@pytest.mark.parametrize("shape", [(8, 4, 2), (64, 128, 32), (96, 1024, 64), (32, 8192, 16)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_the_norm_of_a_split_product_is_that_of_float64(shape: tuple[int, int, int], spread: float) -> None:
    rows, inner, tokens = shape
    a, b = random(rows, inner, seed=4, spread=spread), random(inner, tokens, seed=5, spread=spread)
    exact = a.double() @ b.double()
    split = split_product(a, b, emulated)
    assert split.dtype == torch.float32
    assert float(split.double().norm() / exact.norm() - 1) == pytest.approx(0, abs=1e-5)
    # Each entry: what two parts leave out of each operand, 2^-16 of it at most, and lo times lo.
    bound = (3 * UNIT**2 + 2.0**-22 * math.sqrt(inner)) * (a.double().abs() @ b.double().abs())
    assert bool(((split.double() - exact).abs() <= bound).all())


def test_one_part_alone_would_not_do() -> None:
    """What the parts are for: bf16 alone is off by more than a hundred times as much, entry by entry."""
    a, b = random(64, 512, seed=6), random(512, 64, seed=7)
    exact = a.double() @ b.double()

    def off(c: Tensor) -> float:
        return float((c.double() - exact).norm() / exact.norm())

    one = off(emulated(a.bfloat16(), b.bfloat16()))
    assert off(split_product(a, b, emulated)) < 1e-5 < 1e-3 < one
    assert off(split_product(a, b, emulated)) < one / 100


def test_alignment_of_nearly_orthogonal_inputs() -> None:
    """Where much cancels: relative to |W| |X|, which alignment is measured in, it is as exact as elsewhere."""
    w, x = ill_conditioned(64, 256, 128)
    exact = w.double() @ x.double()
    split = split_product(w, x, emulated)
    scale = float(w.double().norm() * x.double().norm())
    assert float(exact.norm()) / scale < 1e-3
    assert abs(float(split.double().norm()) - float(exact.norm())) / scale < 1e-5


def test_what_is_in_bf16_has_one_part_and_is_exact() -> None:
    w, x = random(32, 64, seed=8).bfloat16(), random(64, 16, seed=9).bfloat16()
    calls: list[tuple[Tensor, Tensor]] = []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        calls.append((a, b))
        assert a.dtype == b.dtype == torch.bfloat16
        return emulated(a, b)

    assert torch.equal(split_product(w, x, counted), w.float() @ x.float())
    assert len(calls) == 1
    split_product(random(32, 64), x, counted)  # an update, and activations
    assert len(calls) == 1 + 2
    split_product(random(32, 64), x.float() * 1.1, counted)
    assert len(calls) == 3 + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parts_add_up(dtype: torch.dtype) -> None:
    x = random(100, 10, seed=10, spread=1.0).to(dtype)
    rest = (x.double() - sum(part.double() for part in parts(x))).abs()  # type: ignore[union-attr]
    assert bool((rest <= UNIT**2 * x.double().abs() + 2.0**-133).all())
    assert dtype != torch.bfloat16 or float(rest.max()) == 0


def test_tiny_and_huge_entries_keep_their_range() -> None:
    """Parts in bf16 have the exponents of fp32: an update of 1e-12 is as exact as one of 1."""
    a, b = random(16, 64, seed=11), random(64, 16, seed=12)
    for scale in (1e-12, 1e12):
        exact = (a * scale).double() @ b.double()
        assert float((split_product(a * scale, b, emulated).double() - exact).norm() / exact.norm()) < 1e-5


def test_what_is_not_finite_stays_so() -> None:
    a = random(4, 4)
    a[1, 2] = math.inf
    assert not split_product(a, random(4, 4), emulated)[1].isfinite().any()
    assert split_product(a, random(4, 4), emulated)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_matrices_are_multiplied_as_before(dtype: torch.dtype) -> None:
    a, b = random(32, 64, seed=13).to(dtype), random(64, 8, seed=14).to(dtype)
    with full_precision():
        assert torch.equal(product(a, b), a.float() @ b.float())


def test_torch_can_sum_bf16_products_in_fp32() -> None:
    """The one thing of the GPU's path that a CPU can ask: the operator is there, and gives fp32 (by shapes alone)."""
    a, b = (torch.empty(4, 4, dtype=torch.bfloat16, device="meta") for _ in range(2))
    assert torch.mm(a, b, out_dtype=torch.float32).dtype == torch.float32
    from megatron_patch.metrics.products import _sums_in_fp32

    assert _sums_in_fp32()
