"""bfloat16 GEMMs inside a float32 model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from fp8tune.decision.reasons import Reason
from fp8tune.model.convert import change_class, restore_class
from fp8tune.model.experts import GroupedLinear

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BFloat16Experts", "BFloat16Linear", "BFloat16Recipe"]


class BFloat16Linear(nn.Linear):
    """A Linear with float32 weights, inputs and outputs whose GEMMs run in bfloat16."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Shape (*, K) -> (*, N), in the dtype of the input."""
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        weight = self.weight.to(torch.bfloat16)
        return F.linear(input.to(torch.bfloat16), weight, bias).to(input.dtype)


class BFloat16Experts(GroupedLinear):
    """A grouped GEMM in bfloat16 of experts whose weights and rows are float32."""

    def forward(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        offs: torch.Tensor,
        call: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Shapes (T, K) and (E, K, N) -> (T, N), in the dtype of the input."""
        del call  # Transformers' own operator is a loop
        low = torch.bfloat16
        product = F.grouped_mm(input.to(low), weight.to(low), offs=offs)
        return product.to(input.dtype)


class BFloat16Recipe:
    """bfloat16 GEMMs inside a float32 model, against float32.

    It needs no GPU and has a real crossover on CPUs with AMX or AVX512-bf16, where small
    GEMMs lose to the cost of the casts.
    """

    name = "bf16"
    reference = "float32"
    settings = "BFloat16Linear"
    emulated = False
    takes_experts = True

    def supports(self, linear: nn.Linear) -> Reason | None:
        """Only float32 weights have something to gain."""
        fits = linear.weight.dtype is torch.float32
        return None if fits else Reason.UNSUPPORTED_DTYPE

    def static_filter(self, linear: nn.Linear) -> Reason | None:
        """No published table."""
        del linear

    def convert(self, linear: nn.Linear) -> None:
        """Give the Linear the class BFloat16Linear, or BFloat16Experts."""
        change_class(linear, _class_for(linear), {})

    def revert(self, linear: nn.Linear) -> None:
        """Give it back its class."""
        restore_class(linear, _class_for(linear), {})


def _class_for(linear: nn.Linear) -> type[nn.Linear]:
    return BFloat16Experts if isinstance(linear, GroupedLinear) else BFloat16Linear
