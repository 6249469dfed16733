"""Signatures in a few words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fp8tune.records import Shape, Signature

__all__ = ["describe_signature"]


def describe_signature(signature: Signature) -> str:
    """One signature in a few words, for log lines."""
    shape = signature.shape
    parts = [f"M={shape.m} K={shape.k} N={shape.n}", _dtypes(shape)]
    wanted = {
        "input": signature.grad_input,
        "weight": signature.grad_weight,
        "bias": signature.grad_bias,
    }
    grads = [name for name, needed in wanted.items() if needed]
    parts.append(f"grads of {'+'.join(grads)}" if grads else "forward only")
    if signature.recompute:
        parts.append("recomputed")
    return ", ".join(parts)


def _dtypes(shape: Shape) -> str:
    same = shape.input_dtype == shape.weight_dtype
    names = (
        shape.weight_dtype if same else f"{shape.input_dtype} x {shape.weight_dtype}"
    )
    return (
        f"{names} under {shape.autocast_dtype} autocast"
        if shape.autocast_dtype
        else names
    )
