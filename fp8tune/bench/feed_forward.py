"""The feed-forwards of blocks that have no experts, and of experts that get every row."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["GELU", "SwiGLU"]


class SwiGLU(nn.Module):
    """Two Linears side by side, one of which gates the other, and one behind them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, sequence, dim) -> the same."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class GELU(nn.Module):
    """Two Linears with biases, as in a vision transformer."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, sequence, dim) -> the same."""
        return self.fc2(F.gelu(self.fc1(x)))
