"""Mixtures of experts as blocks have them, with grouped GEMMs as Transformers calls them.

Which expert gets which row is drawn once with a fixed seed, every expert equally likely, as
losses that balance the load want it; so all plans multiply the same groups. The router's
own product is computed, and weighs the experts' outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from fp8tune.bench.feed_forward import SwiGLU
from fp8tune.bench.grouped import grouped_mm

if TYPE_CHECKING:
    from fp8tune.bench.sizes import RoutedExperts, Workload

__all__ = ["MixtureOfExperts", "routes"]

_SEED = 0

# Of gpt-oss: swiglu_limit and the 1.702 of its config.json and its model code.
_LIMIT = 7.0
_SLOPE = 1.702


def routes(rows: int, experts: int, top_k: int) -> torch.Tensor:
    """The experts of each row, all different; shape (rows, top_k), on the CPU."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    scores = torch.rand((rows, experts), generator=generator, device="cpu")
    return scores.topk(top_k, dim=-1).indices


class Router(nn.Module):
    """Weighs the experts of each row, which are drawn beforehand."""

    def __init__(self, workload: Workload, sizes: RoutedExperts) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sizes.experts, workload.dim))
        nn.init.normal_(self.weight, std=workload.dim**-0.5)
        chosen = routes(workload.m, sizes.experts, sizes.top_k)
        self.register_buffer("chosen", chosen)

    chosen: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (rows, dim) -> weights of the chosen experts, (rows, top_k)."""
        logits = F.linear(x, self.weight)
        return logits.gather(1, self.chosen).softmax(dim=-1)


class Experts(nn.Module):
    """Gate and up in one grouped GEMM, down in another."""

    def __init__(self, workload: Workload, sizes: RoutedExperts) -> None:
        super().__init__()
        dim, hidden, count = workload.dim, workload.hidden, sizes.experts
        self.is_transposed = sizes.gpt_oss
        self.gate_up_proj = self._matrices(count, dim, 2 * hidden)
        self.down_proj = self._matrices(count, hidden, dim)
        if sizes.gpt_oss:
            self.gate_up_bias = nn.Parameter(torch.zeros(count, 2 * hidden))
            self.down_bias = nn.Parameter(torch.zeros(count, dim))

    def _matrices(self, count: int, k: int, n: int) -> nn.Parameter:
        shape = (count, k, n) if self.is_transposed else (count, n, k)
        return nn.Parameter(torch.empty(shape).normal_(std=k**-0.5))

    def forward(
        self, x: torch.Tensor, experts: torch.Tensor, offs: torch.Tensor
    ) -> torch.Tensor:
        """Rows sorted by expert.

        Args:
            x: shape (T, dim).
            experts: of each row, shape (T,).
            offs: where the rows of each expert end, shape (E,).

        Returns:
            Shape (T, dim).
        """
        if not self.is_transposed:
            gate, up = grouped_mm(x, self.gate_up_proj.mT, offs).chunk(2, dim=-1)
            return grouped_mm(F.silu(gate) * up, self.down_proj.mT, offs)
        both = grouped_mm(x, self.gate_up_proj, offs) + self.gate_up_bias[experts]
        gate = both[..., ::2].clamp(max=_LIMIT)
        up = both[..., 1::2].clamp(-_LIMIT, _LIMIT)
        gated = (up + 1) * gate * torch.sigmoid(_SLOPE * gate)
        return grouped_mm(gated, self.down_proj, offs) + self.down_bias[experts]


class MixtureOfExperts(nn.Module):
    """A router, the experts, and perhaps one that gets every row."""

    def __init__(self, workload: Workload, sizes: RoutedExperts) -> None:
        super().__init__()
        self._experts = sizes.experts
        self.router = Router(workload, sizes)
        self.experts = Experts(workload, sizes)
        self.shared = SwiGLU(workload.dim, sizes.shared) if sizes.shared else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, sequence, dim) -> the same."""
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows), self.router.chosen
        experts, order = chosen.flatten().sort(stable=True)
        counts = experts.new_zeros(self._experts)
        counts = counts.scatter_add(0, experts, torch.ones_like(experts))
        offs = counts.cumsum(0, dtype=torch.int32)
        y = self.experts(rows[order // chosen.shape[1]], experts, offs)
        y = (y * weights.flatten()[order].unsqueeze(-1))[order.argsort()]
        y = y.unflatten(0, chosen.shape).sum(dim=1).view_as(x)
        return y if self.shared is None else y + self.shared(x)
