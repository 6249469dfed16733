"""What a Linear is called with, as a signature."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from fp8tune.decision.records import Shape, Signature
from fp8tune.model.linears import dtype_name
from fp8tune.model.sharding import to_local

if TYPE_CHECKING:
    from torch import nn

__all__ = ["mesh_dims", "of_weight", "signature_of"]


def of_weight(shape: Shape) -> Shape:
    """A weight is the same whatever M is."""
    return replace(shape, m=0)


def mesh_dims(weight: torch.Tensor) -> int:
    """Dimensions of the mesh that a weight is sharded over; 0 for a plain tensor."""
    return weight.device_mesh.ndim if isinstance(weight, DTensor) else 0


def signature_of(
    linear: nn.Linear, tensor: torch.Tensor, *, recompute: bool
) -> Signature:
    """The signature of a call that is under way.

    Args:
        linear: the layer.
        tensor: its input, shape (..., K).
        recompute: backward repeats the call, as activation checkpointing does.
    """
    n, k = to_local(linear.weight).shape
    device_type = tensor.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else None
    shape = Shape(
        m=to_local(tensor).numel() // k,
        k=k,
        n=n,
        input_dtype=dtype_name(tensor.dtype),
        weight_dtype=dtype_name(linear.weight.dtype),
        autocast_dtype=dtype_name(dtype) if dtype else None,
        bias=linear.bias is not None,
    )
    grad = torch.is_grad_enabled()
    return Signature(
        shape,
        grad_input=grad and tensor.requires_grad,
        grad_weight=grad and linear.weight.requires_grad,
        grad_bias=grad and linear.bias is not None and linear.bias.requires_grad,
        recompute=recompute,
    )
