"""The scan of Mamba 2 in plain torch against its recurrence, position by position in float64, gradients included."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_patch.kernels.mamba import GatedRMSNorm, mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

BATCH, LENGTH, HEADS, SIZE, GROUPS, STATE = 2, 19, 6, 4, 3, 5


def recurrence(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h = exp(dt a) h + dt x b^T;  y = h c: for each sequence and head on its own."""
    outputs, states = [], []
    for i in range(BATCH):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            h = x.new_zeros(SIZE, STATE) if start is None else start[i, head]
            rows = []
            for t in range(LENGTH):
                h = torch.exp(dt[i, t, head] * a[head]) * h + dt[i, t, head] * torch.outer(
                    x[i, t, head], b[i, t, group]
                )
                rows.append(h @ c[i, t, group])
            outputs.append(torch.stack(rows))
            states.append(h)
    y = torch.stack(outputs).unflatten(0, (BATCH, HEADS)).transpose(1, 2)
    return y, torch.stack(states).unflatten(0, (BATCH, HEADS))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "x": drawn(BATCH, LENGTH, HEADS, SIZE),
        "dt": drawn(BATCH, LENGTH, HEADS),
        "A": -drawn(HEADS).exp(),
        "B": drawn(BATCH, LENGTH, GROUPS, STATE),
        "C": drawn(BATCH, LENGTH, GROUPS, STATE),
    }


@pytest.mark.parametrize("chunk", [1, 4, 7, 19, 128])
def test_the_scan_is_the_recurrence_at_any_chunk_size(inputs: dict[str, Tensor], chunk: int) -> None:
    bias, skip, z = drawn(HEADS), drawn(HEADS), drawn(BATCH, LENGTH, HEADS, SIZE)
    leaves = [*inputs.values(), bias, skip, z]
    for leaf in leaves:
        leaf.requires_grad_()
    steps = functional.softplus(inputs["dt"] + bias)
    expected, _ = recurrence(inputs["x"], steps, inputs["A"], inputs["B"], inputs["C"])
    expected = (expected + skip[:, None] * inputs["x"]) * functional.silu(z)
    single = [leaf.detach().float().requires_grad_() for leaf in leaves]
    x, dt, a, b, c, bias32, skip32, z32 = single
    found = mamba_chunk_scan_combined(x, dt, a, b, c, chunk, skip32, z32, bias32, dt_softplus=True)
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    weight = drawn(*expected.shape)
    truth = torch.autograd.grad((expected * weight).sum(), leaves)
    mine = torch.autograd.grad((found * weight.float()).sum(), single)
    for one, other in zip(mine, truth, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)


def test_a_sequence_goes_on_from_a_state(inputs: dict[str, Tensor]) -> None:
    start = drawn(BATCH, HEADS, SIZE, STATE)
    inputs["dt"] = inputs["dt"].exp()
    expected, end = recurrence(*inputs.values(), start)
    single = [value.float() for value in inputs.values()]
    found, state = mamba_chunk_scan_combined(*single, 4, initial_states=start.float(), return_final_states=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.double(), end, rtol=1e-4, atol=1e-4)


def test_a_strong_decay_leaves_finite_gradients(inputs: dict[str, Tensor]) -> None:
    """exp of the decay between two positions overflows where the first is the later one."""
    single = [value.float().requires_grad_() for value in inputs.values()]
    x, dt, a, b, c = single
    found = mamba_chunk_scan_combined(x, dt, 100 * a, b, c, 128, dt_softplus=True)
    assert isinstance(found, Tensor)
    for gradient in torch.autograd.grad(found.square().sum(), single):
        assert gradient.isfinite().all()


def test_packed_sequences_are_refused(inputs: dict[str, Tensor]) -> None:
    packed = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    with pytest.raises(ValueError, match="packed sequences"):
        mamba_chunk_scan_combined(*inputs.values(), 4, seq_idx=packed)


def test_the_mixers_one_kernel_is_convolution_scan_and_gate() -> None:
    torch.manual_seed(1)
    width, kernel = HEADS * SIZE, 4
    zxbcdt = drawn(BATCH, LENGTH, 2 * width + 2 * GROUPS * STATE + HEADS)
    weight, bias = drawn(width + 2 * GROUPS * STATE, kernel), drawn(width + 2 * GROUPS * STATE)
    dt_bias, a, skip = drawn(HEADS), -drawn(HEADS).exp(), drawn(HEADS)
    z, xbc, dt = zxbcdt.split([width, width + 2 * GROUPS * STATE, HEADS], dim=-1)
    mixed = torch.zeros_like(xbc)
    for t in range(LENGTH):
        for back in range(min(kernel, t + 1)):  # the last tap sees the present
            mixed[:, t] += weight[:, kernel - 1 - back] * xbc[:, t - back]
    x, b, c = functional.silu(mixed + bias).split([width, GROUPS * STATE, GROUPS * STATE], dim=-1)
    heads = x.unflatten(-1, (HEADS, SIZE))
    b, c = (each.unflatten(-1, (GROUPS, STATE)) for each in (b, c))
    expected, _ = recurrence(heads, functional.softplus(dt + dt_bias), a, b, c)
    expected = (expected + skip[:, None] * heads).flatten(-2) * functional.silu(z)
    single = [value.float() for value in (zxbcdt, weight, bias, dt_bias, a, skip)]
    found = mamba_split_conv1d_scan_combined(*single, 8, headdim=SIZE, ngroups=GROUPS)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="activation 'gelu'"):
        mamba_split_conv1d_scan_combined(*single, 8, activation="gelu", headdim=SIZE, ngroups=GROUPS)


def test_the_gated_norm_by_hand() -> None:
    norm = GatedRMSNorm(4, eps=0.0, group_size=2, norm_before_gate=False)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 1.0, 1.0]))
    x = torch.tensor([[3.0, 4.0, 5.0, 5.0]])
    root = (25 / 2) ** 0.5  # of the mean square of (3, 4)
    torch.testing.assert_close(norm(x), torch.tensor([[3 / root, 8 / root, 1.0, 1.0]]))
    gate = torch.full_like(x, 2.0)  # the same factor everywhere is normalised away
    torch.testing.assert_close(norm(x, gate), norm(x))
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="norm_before_gate"):
        GatedRMSNorm(4, eps=0.0, group_size=2, norm_before_gate=True)
