"""The scan of Mamba 2 in plain torch, one position after the other."""

from typing import Any

import torch
from torch import Tensor


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor,
    dt_softplus: bool,
    return_final_states: bool,
    initial_states: Tensor | None,
) -> Tensor:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,  y_t = C_t h_t + D x_t.

    Args: x [b, l, h, p]; dt [b, l, h]; A, D, dt_bias [h]; B, C [b, l, g, n], each group for h / g heads.
    """
    assert z is None and initial_states is None and dt_softplus and not return_final_states
    dt = torch.nn.functional.softplus(dt.float() + dt_bias)
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = (each.repeat_interleave(heads_per_group, dim=2) for each in (B, C))
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
    rows = []
    for t in range(x.shape[1]):
        grown = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = state * torch.exp(dt[:, t] * A)[..., None, None] + grown
        rows.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return torch.stack(rows, dim=1) + D[:, None] * x


def mamba_split_conv1d_scan_combined(*args: Any, **kwargs: Any) -> Tensor:
    """Never called: --disable-mamba-mem-eff-path."""
    raise NotImplementedError
