"""Products of fp32 matrices on tensor cores: each operand in two bf16 parts, fp32 sums.

An fp32 number is `x = hi + lo + r`: hi is x in bf16, lo what is left of it in bf16, and |r| <= 2^-16 |x|. With both
operands in two parts, `A B = hi hi + hi lo + lo hi`, each product exact in fp32, up to 3 * 2^-16 |A| |B| at worst; the
norm of the result, in which the errors of the entries average out, is known to 1e-5 or better. What is in bf16
already, as activations and weights of most runs are, has one part, and its products cost a third.

On a CPU, and where torch cannot sum bf16 products in fp32, fp32 matrices are multiplied as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

type Multiply = Callable[[Tensor, Tensor], Tensor]
"""From two bf16 matrices to their product in fp32."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, even where the run allows TF32 (10 bits, relative error 1e-3) for its own."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return A B in fp32, relative error about 1e-5 at most; [M, K], [K, N] -> [M, N].

    Call it within `full_precision`.

    Args:
        a, b: in any floating-point type.
    """
    if a.is_cuda and _sums_in_fp32():
        return split_product(a, b, _tensor_cores)
    return a.float() @ b.float()


def split_product(a: Tensor, b: Tensor, multiply: Multiply) -> Tensor:
    """Return A B in fp32 by products of bf16 parts; that of the two remainders, 2^-16 of it at most, is left out."""
    (a_hi, *a_lo), (b_hi, *b_lo) = parts(a), parts(b)
    result = multiply(a_hi, b_hi)
    for lo in b_lo:
        result += multiply(a_hi, lo)
    for lo in a_lo:
        result += multiply(lo, b_hi)
    return result


def parts(x: Tensor) -> list[Tensor]:
    """Return the bf16 parts of a matrix: itself, if it is in bf16, else two.

    >>> [part.item() for part in parts(torch.tensor([[1 + 2.0**-10]]))]
    [1.0, 0.0009765625]
    """
    if x.dtype == torch.bfloat16:
        return [x]
    hi = x.bfloat16()
    return [hi, (x.float() - hi.float()).bfloat16()]


def emulated(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two bf16 matrices as tensor cores make it, on any device: exact products, fp32 sums."""
    return a.float() @ b.float()


def _tensor_cores(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)


def _sums_in_fp32() -> bool:
    """Whether torch.mm gives bf16 matrices' product in fp32; 2.8 and later."""
    return hasattr(torch.ops.aten.mm, "dtype")
