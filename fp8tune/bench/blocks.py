"""The blocks of the workloads as modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from fp8tune.bench.experts import MixtureOfExperts
from fp8tune.bench.feed_forward import GELU, SwiGLU

if TYPE_CHECKING:
    from fp8tune.bench.sizes import LatentAttention, Workload

__all__ = ["Block", "Model"]


class _Attention(nn.Module):
    def __init__(self, workload: Workload) -> None:
        super().__init__()
        w, bias = workload, workload.vision or workload.attention_bias
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


class _LatentAttention(nn.Module):
    """Queries, keys and values by way of few features; see ``LatentAttention``."""

    def __init__(self, workload: Workload, sizes: LatentAttention) -> None:
        super().__init__()
        w, s = workload, sizes
        self._split = (w.head_dim, s.rope)
        self._ranks = (s.kv_rank, s.rope)
        self.q_a = nn.Linear(w.dim, s.q_rank, bias=False)
        self.q_b = nn.Linear(s.q_rank, w.heads * (w.head_dim + s.rope), bias=False)
        self.kv_a = nn.Linear(w.dim, s.kv_rank + s.rope, bias=False)
        self.kv_b = nn.Linear(s.kv_rank, w.heads * 2 * w.head_dim, bias=False)
        self.wo = nn.Linear(w.q, w.dim, bias=False)
        self.q_norm, self.kv_norm = nn.RMSNorm(s.q_rank), nn.RMSNorm(s.kv_rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, sequence, dim) -> the same."""
        size, rope = self._split
        q = self.q_b(self.q_norm(self.q_a(x))).unflatten(-1, (-1, size + rope))
        low, k_rope = self.kv_a(x).split(self._ranks, dim=-1)
        kv = self.kv_b(self.kv_norm(low)).unflatten(-1, (-1, 2 * size))
        q_plain, q_rope = q.transpose(1, 2).split(self._split, dim=-1)
        k_plain, v = kv.transpose(1, 2).chunk(2, dim=-1)
        k_rope = _rotated(k_rope.unsqueeze(1)).expand(-1, k_plain.shape[1], -1, -1)
        y = F.scaled_dot_product_attention(
            torch.cat((q_plain, _rotated(q_rope)), dim=-1),
            torch.cat((k_plain, k_rope), dim=-1),
            v,
            is_causal=True,
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


class Block(nn.Module):
    """Attention and feed-forward or experts, each behind a norm and around a residual."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        w = workload
        norm = nn.LayerNorm if w.vision else nn.RMSNorm
        self.norm_1, self.norm_2 = norm(w.dim), norm(w.dim)
        self.attention = _LatentAttention(w, w.latent) if w.latent else _Attention(w)
        self.feed_forward = (
            MixtureOfExperts(w, w.moe)
            if w.moe
            else (GELU if w.vision else SwiGLU)(w.dim, w.hidden)
        )

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
