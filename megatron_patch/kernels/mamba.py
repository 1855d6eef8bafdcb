"""The kernels of Mamba 2 in plain torch, in the place of those of the package `mamba_ssm`, which need Triton and a GPU.

The scan is the state-space duality algorithm: matrix products inside chunks of the sequence, a recurrence between them.
Sources: Dao & Gu, arXiv 2405.21060 (section 6 and listing 1); the parameters are those of `mamba_ssm` 2.2.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class GatedRMSNorm(torch.nn.Module):
    """y = rms_norm(x * silu(z)) * weight, normalised in groups of `group_size`, in fp32; without z, of x alone.

    Args:
        hidden_size: length of the last dimension.
        eps: added to the mean square.
        group_size: a divisor of `hidden_size`.
        norm_before_gate: must be False, as in Megatron's mixer.
    """

    def __init__(self, hidden_size: int, eps: float, group_size: int, norm_before_gate: bool, **where: Any) -> None:
        super().__init__()
        if norm_before_gate:
            raise ValueError("norm_before_gate=True: the gate comes before the norm here")
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **where))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:  # [..., d] -> the same
        gated = x.float() if z is None else x.float() * functional.silu(z.float())
        groups = torch.unflatten(gated, -1, (-1, self.group_size))
        normed = functional.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2)
        return (normed * self.weight.float()).type_as(x)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y of `h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,  y_t = C_t h_t + D x_t`, times silu(z) if there is a z.

    Args:
        x: [batch, length, heads, p].
        dt: step sizes, [batch, length, heads]; `dt_bias` [heads] is added, then softplus taken if asked for.
        A: negative, [heads].
        B, C: [batch, length, groups, n]; a group serves heads / groups consecutive heads.
        chunk_size: how many positions go into one matrix product; it changes no more than rounding.
        D: [heads] or [heads, p].
        z: like `x`.
        initial_states: h_0, [batch, heads, p, n]; zeros if None.
        seq_idx: not taken: packed sequences need the real kernels.
        dt_softplus: see `dt`.
        return_final_states: return (y, h of the last position) instead of y.

    Raises:
        ValueError: `seq_idx` was given.
    """
    if seq_idx is not None:
        raise ValueError("packed sequences (seq_idx) need mamba_ssm's own kernels and a GPU")
    length, heads = x.shape[1:3]
    per_group = heads // B.shape[2]
    steps = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    steps = functional.softplus(steps) if dt_softplus else steps

    def chunked(values: Tensor) -> Tensor:
        """[batch, length, heads, ...] -> [batch, chunks, heads, chunk, ...]; zeros at the end change nothing."""
        rest = [0, 0] * (values.dim() - 2)
        padded = functional.pad(values, (*rest, 0, -length % chunk_size))
        return torch.unflatten(padded, 1, (-1, chunk_size)).transpose(2, 3)

    inputs = chunked(x.float() * steps[..., None])
    # decay[i] = log of what is left at position i of what came in right before the chunk
    decay = chunked(steps * A.float()).cumsum(-1)
    b, c = (chunked(values.float().repeat_interleave(per_group, dim=2)) for values in (B, C))
    upper = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)
    # The mask comes before exp, which overflows above the diagonal and would leave nan in the gradient.
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(upper, -torch.inf).exp()
    inside = ((c @ b.mT) * between) @ inputs
    left = (decay[..., -1:] - decay).exp()
    added = (inputs * left[..., None]).mT @ b  # what a chunk adds to the state, [batch, chunks, heads, p, n]
    whole = decay[..., -1].exp()[..., None, None]
    state = torch.zeros_like(added[:, 0]) if initial_states is None else initial_states.float()
    before = []
    for number in range(added.shape[1]):
        before.append(state)
        state = state * whole[:, number] + added[:, number]
    across = (c * decay.exp()[..., None]) @ torch.stack(before, dim=1).mT
    y = (inside + across).transpose(2, 3).flatten(1, 2)[:, :length]
    if D is not None:
        y = y + (D.float()[:, None] if D.dim() == 1 else D.float()) * x.float()
    if z is not None:
        y = y * functional.silu(z.float())
    y = y.type_as(x)
    return (y, state) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = False,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Return what the mixer computes between its projections: the convolution over time, the scan, the gate.

    Args:
        zxbcdt: z, x, B, C and dt side by side, [batch, length, 2 d + 2 groups n + heads].
        conv1d_weight: depthwise over x, B and C, [channels, kernel]; `conv1d_bias` [channels].
        dt_bias, A, D, chunk_size, seq_idx: see `mamba_chunk_scan_combined`.
        activation: silu.
        headdim: p; not needed with D of [heads, p].
        ngroups: groups of B and C.
        norm_before_gate: of a norm that is not computed here.

    Returns:
        [batch, length, d], with d = heads * p.

    Raises:
        ValueError: another activation, or `seq_idx` was given.
    """
    if activation not in ("silu", "swish"):
        raise ValueError(f"activation {activation!r}: silu is all the mixer uses")
    size = headdim if headdim is not None else D.shape[-1]
    heads = A.shape[0]
    width, length = heads * size, zxbcdt.shape[1]
    state = (zxbcdt.shape[-1] - 2 * width - heads) // (2 * ngroups)
    z, xbc, dt = torch.split(zxbcdt, [width, width + 2 * ngroups * state, heads], dim=-1)
    kernel = conv1d_weight[:, None]
    mixed = functional.conv1d(xbc.mT, kernel, conv1d_bias, padding=kernel.shape[-1] - 1, groups=len(kernel))
    activated = functional.silu(mixed[..., :length].mT)
    x, b, c = torch.split(activated, [width, ngroups * state, ngroups * state], dim=-1)
    x, z = (torch.unflatten(values, -1, (heads, size)) for values in (x, z))
    b, c = (torch.unflatten(values, -1, (ngroups, state)) for values in (b, c))
    y = mamba_chunk_scan_combined(x, dt, A, b, c, chunk_size, D, z, dt_bias, seq_idx=seq_idx, dt_softplus=True)
    assert isinstance(y, Tensor)
    return y.flatten(-2)
