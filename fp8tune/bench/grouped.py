"""A grouped GEMM that blocks can call in any dtype, also where they are compiled.

Dynamo refuses ``F.grouped_mm`` unless its operands are bfloat16. There the call becomes an
operator of its own, which compilers take as a whole, as Transformers does it; what is
converted to bfloat16 is ``F.grouped_mm`` again, see ``fp8tune.model.rerouting``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from fp8tune.model.rerouting import stands_in

__all__ = ["grouped_mm"]


def grouped_mm(
    input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor
) -> torch.Tensor:
    """The rows of each expert, multiplied with its matrix.

    Args:
        input: shape (T, K), the rows of the first expert first.
        weight: shape (E, K, N).
        offs: shape (E,), where the rows of each expert end; int32.

    Returns:
        Shape (T, N), in the dtype of both.
    """
    if torch.compiler.is_compiling() and weight.dtype is not torch.bfloat16:
        return torch.ops.fp8tune.grouped_mm(input, weight, offs)
    return F.grouped_mm(input, weight, offs=offs)


@torch.library.custom_op("fp8tune::grouped_mm", mutates_args=())
def _forward(
    input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor
) -> torch.Tensor:
    return F.grouped_mm(input, weight, offs=offs)


@_forward.register_fake
def _(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    del offs
    return input.new_empty(input.shape[0], weight.shape[2])


@torch.library.custom_op("fp8tune::grouped_mm_backward", mutates_args=())
def _backward(
    grad: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both gradients; that of the weight lies in memory as the weight does."""
    grad_input = F.grouped_mm(grad, weight.mT, offs=offs)
    if weight.is_contiguous():
        return grad_input, F.grouped_mm(input.t(), grad, offs=offs)
    return grad_input, F.grouped_mm(grad.t(), input, offs=offs).mT


@_backward.register_fake
def _(
    grad: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    del grad, offs
    return torch.empty_like(input), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _differentiate(
    ctx: Any, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, None]:
    found = torch.ops.fp8tune.grouped_mm_backward(grad.contiguous(), *ctx.saved_tensors)
    return *found, None


_forward.register_autograd(_differentiate, setup_context=_keep)
stands_in(torch.ops.fp8tune.grouped_mm)
