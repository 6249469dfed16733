"""What a recipe may say about the casts of its GEMMs, for the report on accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

__all__ = ["CastOperand", "Casts"]


class CastOperand(NamedTuple):
    """One operand of one GEMM right before it is cast.

    Attributes:
        values: two dimensions, in high precision.
        scale: what they are multiplied with; broadcasts to ``values``.
        dtype: what the product is cast to.
    """

    values: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype


@runtime_checkable
class Casts(Protocol):
    """A recipe that can say what it casts; others have no underflow share."""

    def casts(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        grad_output: torch.Tensor,
        *,
        grad_input: bool,
        grad_weight: bool,
    ) -> Iterator[CastOperand]:
        """Every operand that forward + backward cast.

        Args:
            input: (M, K).
            weight: (N, K).
            grad_output: (M, N).
            grad_input: whether backward computes the gradient of the input.
            grad_weight: whether it computes that of the weight.
        """
        ...
