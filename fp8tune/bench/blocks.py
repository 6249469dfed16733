"""The blocks of the workloads as modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from fp8tune.bench.workloads import Workload

__all__ = ["Block", "Model"]


class _Attention(nn.Module):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        w, bias = workload, workload.vision
        self._workload = workload
        if w.fused_qkv:
            self.wqkv = nn.Linear(w.dim, w.q + 2 * w.kv, bias)
        else:
            self.wq = nn.Linear(w.dim, w.q, bias)
            self.wk = nn.Linear(w.dim, w.kv, bias)
            self.wv = nn.Linear(w.dim, w.kv, bias)
        self.wo = nn.Linear(w.q, w.dim, bias)
        self.norms = nn.ModuleList(nn.RMSNorm(w.head_dim) for _ in range(2 * w.qk_norm))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, sequence, dim) -> the same."""
        w = self._workload
        features = (
            self.wqkv(x).split((w.q, w.kv, w.kv), dim=-1)
            if w.fused_qkv
            else (self.wq(x), self.wk(x), self.wv(x))
        )
        q, k, v = (t.unflatten(-1, (-1, w.head_dim)).transpose(1, 2) for t in features)
        if w.qk_norm:
            q, k = self.norms[0](q), self.norms[1](k)
        if not w.vision:
            q, k = _rotated(q), _rotated(k)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=not w.vision, enable_gqa=w.heads != w.kv_heads
        )
        return self.wo(y.transpose(1, 2).flatten(2))


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions; shape (batch, heads, sequence, features) -> the same."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device) / half
    positions = torch.arange(x.shape[-2], device=x.device)
    angles = torch.outer(positions, 500000.0**-exponents)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class _SwiGLU(nn.Module):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.w1 = nn.Linear(workload.dim, workload.hidden, bias=False)
        self.w2 = nn.Linear(workload.hidden, workload.dim, bias=False)
        self.w3 = nn.Linear(workload.dim, workload.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, sequence, dim) -> the same."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class _GELU(nn.Module):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.fc1 = nn.Linear(workload.dim, workload.hidden)
        self.fc2 = nn.Linear(workload.hidden, workload.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, sequence, dim) -> the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        norm = nn.LayerNorm if workload.vision else nn.RMSNorm
        self.norm_1, self.norm_2 = norm(workload.dim), norm(workload.dim)
        self.attention = _Attention(workload)
        self.feed_forward = (_GELU if workload.vision else _SwiGLU)(workload)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, sequence, dim) -> the same."""
        x = x + self.attention(self.norm_1(x))
        return x + self.feed_forward(self.norm_2(x))


class Model(nn.Module):
    """A block behind a trained input, so that the input's gradient is computed too.

    Args:
        workload: its sizes.
        device: where it is made.
        dtype: of weights and input.
    """

    def __init__(
        self, workload: Workload, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        w = workload
        sequence = w.m if w.m % w.sequence else w.sequence
        shape = (w.m // sequence, sequence, w.dim)
        self.input = nn.Parameter(torch.randn(shape, device=device, dtype=dtype))
        self.block = Block(workload).to(device, dtype)
        self.grad_output = torch.randn_like(self.input)

    def forward(self) -> torch.Tensor:
        """Shape (batch, sequence, dim)."""
        return self.block(self.input)
