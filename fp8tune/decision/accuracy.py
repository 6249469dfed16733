"""What a recipe costs in accuracy, as a record."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Accuracy"]


@dataclass(frozen=True)
class Accuracy:
    """What a recipe costs in accuracy on the tensors of one signature.

    SQNR is 10 * log10(sum(exact**2) / sum((result - exact)**2)), in dB, where exact is
    float32; it is kept within -200 and 200. None is a result that is not computed.

    Attributes:
        output_db: of the output.
        grad_input_db: of the gradient of the input.
        grad_weight_db: of the gradient of the weight.
        underflow: share of the nonzero values of all GEMM operands that become zero
            when they are cast; None if the recipe does not say what it casts.
        saturation: share of them that lie beyond the largest value of the dtype.
    """

    output_db: float | None = None
    grad_input_db: float | None = None
    grad_weight_db: float | None = None
    underflow: float | None = None
    saturation: float | None = None

    @property
    def worst_db(self) -> float | None:
        """The lowest of the three."""
        every = (self.output_db, self.grad_input_db, self.grad_weight_db)
        return min((x for x in every if x is not None), default=None)
