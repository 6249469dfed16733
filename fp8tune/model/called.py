"""What a layer is called with, as a signature."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from fp8tune.decision.records import Shape, Signature
from fp8tune.model.experts import GroupedLinear, is_transposed
from fp8tune.model.linears import dtype_name
from fp8tune.model.sharding import to_local

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

__all__ = ["Call", "call_of", "mesh_dims", "of_weight", "signature_of"]


def of_weight(shape: Shape) -> Shape:
    """A weight is the same whatever M is."""
    return replace(shape, m=0)


def mesh_dims(weight: torch.Tensor) -> int:
    """Dimensions of the mesh that a weight is sharded over; 0 for a plain tensor."""
    return weight.device_mesh.ndim if isinstance(weight, DTensor) else 0


class Call(NamedTuple):
    """What a layer is called with.

    Attributes:
        input: shape (..., K).
        weights: of a grouped GEMM, as they are multiplied, shape (E, K, N).
        offs: of a grouped GEMM, where the rows of each expert end, shape (E,).
    """

    input: torch.Tensor
    weights: torch.Tensor | None = None
    offs: torch.Tensor | None = None


def call_of(linear: nn.Linear, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """The arguments of a layer's call, as a hook gets them."""
    if isinstance(linear, GroupedLinear):
        return Call(*args[:3])
    return Call(args[0] if args else kwargs["input"])


def signature_of(linear: nn.Linear, call: Call, *, recompute: bool) -> Signature:
    """The signature of a call that is under way.

    Args:
        linear: the layer.
        call: what it is called with.
        recompute: backward repeats the call, as activation checkpointing does.
    """
    tensor, grouped = call.input, call.weights is not None
    weight = linear.weight if call.weights is None else call.weights
    local = to_local(weight)
    k, n = local.shape[-2:] if grouped else reversed(local.shape)
    device_type = tensor.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else None
    shape = Shape(
        m=to_local(tensor).numel() // k,
        k=k,
        n=n,
        input_dtype=dtype_name(tensor.dtype),
        weight_dtype=dtype_name(weight.dtype),
        autocast_dtype=dtype_name(dtype) if dtype else None,
        bias=linear.bias is not None,
        experts=len(local) if grouped else 0,
        transposed=grouped and is_transposed(local),
    )
    grad = torch.is_grad_enabled()
    return Signature(
        shape,
        grad_input=grad and tensor.requires_grad,
        grad_weight=grad and weight.requires_grad,
        grad_bias=grad and linear.bias is not None and linear.bias.requires_grad,
        recompute=recompute,
    )
