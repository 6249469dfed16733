"""Screened Linears as the records that ranks compare and caches keep."""

from fp8tune.linears import dtype_name
from fp8tune.records import Candidate, Layer, LeftOut, Signature

__all__ = ["layer_of"]


def layer_of(
    record: Candidate | LeftOut, calls: tuple[tuple[Signature, int], ...] = ()
) -> Layer:
    """The record of one Linear, with how it was called."""
    linear = record.linear
    return Layer(
        record.fqn,
        linear.in_features,
        linear.out_features,
        dtype_name(linear.weight.dtype),
        linear.weight.requires_grad,
        None if isinstance(record, Candidate) else record.reason,
        calls,
        record.excluded if isinstance(record, Candidate) else (),
    )
