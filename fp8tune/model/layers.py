"""Screened layers as the records that ranks compare and caches keep."""

from fp8tune.decision.records import Layer, Signature
from fp8tune.model.candidates import Candidate, LeftOut
from fp8tune.model.experts import experts_in
from fp8tune.model.linears import dtype_name

__all__ = ["layer_of"]


def layer_of(
    record: Candidate | LeftOut, calls: tuple[tuple[Signature, int], ...] = ()
) -> Layer:
    """The record of one layer, with how it was called."""
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
        experts_in(linear),
    )
