"""Blockwise float8 as DeepSeek-V3 trains: 1 x 128 activations, 128 x 128 weights.

Legend: M rows, K in_features, N out_features. Each scale serves 128 values along what a
GEMM sums over: K for the output, N for grad_input, M for grad_weight; a weight's scale
serves a block of 128 x 128, so it is the same for both of its GEMMs
(arXiv:2412.19437, section 3.3.2).

On Hopper torchao's prototype kernels run. Elsewhere the same casts are made by torchao's
reference functions and the GEMMs run in high precision, which is exact but slow.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fp8tune.decision.reasons import Reason
from fp8tune.model.convert import change_class, restore_class
from fp8tune.recipes.casts import CastOperand
from fp8tune.recipes.hardware import has_blockwise_gemms, runs_converted
from fp8tune.recipes.prototypes import load, on_padded_rows

__all__ = ["BLOCK", "BlockwiseLinear", "BlockwiseRecipe"]

BLOCK = 128
_ELEMENTS = torch.float8_e4m3fn
_PACKAGE = "torchao.prototype.blockwise_fp8_training"
_REFERENCES = (
    "torch_blockwise_scale_act_quant_lhs",
    "torch_blockwise_scale_weight_quant",
)


class BlockwiseLinear(nn.Linear):
    """A Linear whose three GEMMs take blockwise scaled float8 operands.

    Attributes:
        emulate: cast to float8 and back, and multiply in high precision.
    """

    emulate: bool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Shape (*, K) -> (*, N)."""
        gemm = _emulated if self.emulate else _native
        return on_padded_rows(self, input, BLOCK, gemm)


class BlockwiseRecipe:
    """Blockwise float8 against high precision.

    Args:
        device: where the model runs; decides whether the GEMMs are emulated.

    Raises:
        ConfigError: this torchao has no blockwise casts.
    """

    name = "blockwise"
    reference = "bfloat16"

    def __init__(self, device: torch.device) -> None:
        _kernels()
        self._attributes: dict[str, Any] = {"emulate": False}
        self.emulated = not (
            has_blockwise_gemms(device)
            and runs_converted(self.name, self.convert, device)
        )
        self._attributes["emulate"] = self.emulated
        self.settings = f"BlockwiseLinear, 1x128 and 128x128, emulate={self.emulated}"

    def supports(self, linear: nn.Linear) -> Reason | None:
        """Blocks of 128 must fill K and N."""
        if linear.weight.dtype not in (torch.bfloat16, torch.float32):
            return Reason.UNSUPPORTED_DTYPE
        n, k = linear.weight.shape
        return Reason.NOT_DIVISIBLE_BY_128 if k % BLOCK or n % BLOCK else None

    def static_filter(self, linear: nn.Linear) -> Reason | None:
        """No published table."""
        del linear

    def convert(self, linear: nn.Linear) -> None:
        """Give the Linear the class BlockwiseLinear."""
        change_class(linear, BlockwiseLinear, self._attributes)

    def revert(self, linear: nn.Linear) -> None:
        """Give it back the class nn.Linear."""
        restore_class(linear, BlockwiseLinear, self._attributes)

    def casts(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        grad_output: torch.Tensor,
        *,
        grad_input: bool,
        grad_weight: bool,
    ) -> Iterator[CastOperand]:
        """See ``fp8tune.recipes.casts``; each row is the values of one scale."""
        operands = [input] + ([grad_output] if grad_input else [])
        operands += [grad_output.t(), input.t()] if grad_weight else []
        blocks = [
            F.pad(x, (0, -x.shape[1] % BLOCK)).reshape(-1, BLOCK) for x in operands
        ]
        n, k = weight.shape
        tiles = weight.reshape(n // BLOCK, BLOCK, k // BLOCK, BLOCK).transpose(1, 2)
        for values in (*blocks, tiles.reshape(-1, BLOCK * BLOCK)):
            largest = values.abs().amax(1, keepdim=True).float()
            scale = torch.finfo(_ELEMENTS).max / largest
            yield CastOperand(values, scale.where(largest > 0, 1.0), _ELEMENTS)


# Dynamo would instantiate the class to trace it, which torch deprecates.
@torch.compiler.allow_in_graph
class _EmulatedGemms(torch.autograd.Function):
    """(M, K) x (N, K) -> (M, N); M, K and N are multiples of 128."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, input: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        return _rows_cast(input) @ _tiles_cast(weight).t()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_input = _rows_cast(grad_output) @ _tiles_cast(weight)
        if ctx.needs_input_grad[1]:
            grad_weight = _rows_cast(grad_output.t()) @ _rows_cast(input.t()).t()
        return grad_input, grad_weight


def _rows_cast(values: torch.Tensor) -> torch.Tensor:
    """Each 128 values of a row to float8 and back."""
    cast, inverse = _kernels().torch_blockwise_scale_act_quant_lhs(values.contiguous())
    scaled = cast.to(values.dtype).reshape(-1, BLOCK) * inverse.reshape(-1, 1)
    return scaled.reshape(values.shape).to(values.dtype)


def _tiles_cast(values: torch.Tensor) -> torch.Tensor:
    """Each 128 x 128 values to float8 and back."""
    cast, inverse = _kernels().torch_blockwise_scale_weight_quant(values.contiguous())
    scale = inverse.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return (cast.to(values.dtype) * scale).to(values.dtype)


def _emulated(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _EmulatedGemms.apply(input, weight)  # pyright: ignore[reportReturnType]


def _native(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _linear().fp8_blockwise_mm.apply(input, weight, BLOCK, input.dtype)


_load = partial(load, recipe="blockwise")


@cache
def _kernels() -> Any:
    return _load(f"{_PACKAGE}.kernels", _REFERENCES, needed="its blockwise casts")


@cache
def _linear() -> Any:
    return _load(f"{_PACKAGE}.linear", ["fp8_blockwise_mm"], needed="fp8_blockwise_mm")
