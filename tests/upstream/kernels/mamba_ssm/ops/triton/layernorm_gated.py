"""The gated norm of Mamba 2 in plain torch."""

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """y = rms_norm(x * silu(z)) * weight, normalised in groups of `group_size`."""

    def __init__(self, hidden_size: int, eps: float, group_size: int, norm_before_gate: bool, **where: Any) -> None:
        super().__init__()
        assert not norm_before_gate
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **where))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # [l, b, d]
        gated = (x * torch.nn.functional.silu(z)).unflatten(-1, (-1, self.group_size))
        return torch.nn.functional.rms_norm(gated, (self.group_size,), eps=self.eps).flatten(-2) * self.weight
