"""What the recipes share that convert grouped GEMMs of experts.

Float8 GEMMs want the rows of each expert to be a multiple of some number, which routing
never gives. So each group gets rows of zeros at its end, without asking the device for the
sizes of the groups: the room that suffices for any routing follows from T and E alone.
Operands are bfloat16, as grouped GEMMs on a GPU take them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from fp8tune.model.experts import GroupedLinear

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PaddedExperts", "from_padded", "to_padded"]


def to_padded(
    rows: torch.Tensor, offs: torch.Tensor, multiple: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of zeros behind each group, so that its size is a multiple.

    Args:
        rows: shape (T, K), those of the first expert first.
        offs: shape (E,), where the rows of each expert end; empty groups stay empty.
        multiple: what the size of each group shall be one of.

    Returns:
        The padded rows, whose number depends on T and E only; where the padded groups
        end, shape (E,), int32; and where each row went, shape (T,). Rows behind the last
        expert's stay behind them.
    """
    sizes = offs.diff(prepend=offs.new_zeros(1))
    padded_sizes = (sizes + multiple - 1) // multiple * multiple
    ends = padded_sizes.cumsum(0).to(torch.int32)
    # How far each group moves; the last number is for rows that belong to nobody.
    moved = F.pad(ends - offs, (1, 0))
    numbers = torch.arange(len(rows), device=rows.device, dtype=offs.dtype)
    places = numbers + moved[torch.searchsorted(offs, numbers, right=True)]
    most = len(rows) + len(offs) * (multiple - 1)
    room = (most + multiple - 1) // multiple * multiple
    padded = rows.new_zeros(room, rows.shape[1])
    return padded.index_copy(0, places.long(), rows), ends, places.long()


def from_padded(padded: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The rows that ``to_padded`` moved, shape (T, N)."""
    return _Taken.apply(padded, places)  # pyright: ignore[reportUnknownVariableType, reportReturnType]


# Dynamo would trace it with a warning of torch's own.
@torch.compiler.allow_in_graph
class _Taken(torch.autograd.Function):
    """index_select, whose own backward would add where it is enough to copy."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.room = len(padded)
        return padded.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.room, grad.shape[1]).index_copy(0, places, grad), None


class PaddedExperts(GroupedLinear):
    """A grouped GEMM of padded groups, by a function of torchao's that casts its operands.

    Attributes:
        multiple: what the rows of each expert are padded to.
        product: (T, K), (E, K, N), (E,) -> (T, N), all in bfloat16: contiguous rows,
            column-major matrices, and where groups end as int32. It is kept here since a
            compiler cannot trace what imports it.
        arguments: by keyword, what it is told besides.
    """

    multiple: int
    product: Callable[..., torch.Tensor]
    arguments: dict[str, Any]

    def forward(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        offs: torch.Tensor,
        call: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Shapes (T, K) and (E, K, N) -> (T, N), in the dtype of the input."""
        del call
        low = torch.bfloat16
        rows, ends, places = to_padded(input.to(low), offs, self.multiple)
        # (K, N) of each expert lie as (N, K), which torchao's kernels need.
        lying = weight.to(low).transpose(-2, -1).contiguous().transpose(-2, -1)
        output = self.product(rows, lying, ends, **self.arguments)
        return from_padded(output, places).to(input.dtype)
