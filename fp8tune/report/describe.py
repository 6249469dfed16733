"""Signatures in a few words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8tune.decision.kinds import MOST_TIMED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fp8tune.decision.records import Decision, Layer, Shape, Signature

__all__ = ["describe_signature", "layers_word", "rows_words", "sizes_words"]


def layers_word(layers: Iterable[Decision | Layer]) -> str:
    """What they are called: "Linears", or "GEMMs" where some are experts'."""
    return "GEMMs" if any(x.experts for x in layers) else "Linears"


def rows_words(decision: Decision) -> str:
    """The M of a layer's calls: each of a few, or the ends of a range: "12..812"."""
    sizes = _sizes(decision)
    if len(sizes) > MOST_TIMED:
        return f"{sizes[0]}..{sizes[-1]}"
    return ",".join(map(str, sizes)) or "-"


def sizes_words(decision: Decision) -> str:
    """What a range stands for: "M 12..812, 37 sizes, 4 timed"; "" for a few M."""
    sizes = _sizes(decision)
    if len(sizes) <= MOST_TIMED:
        return ""
    timed = len(decision.timed_m)
    return f"M {rows_words(decision)}, {len(sizes)} sizes, {timed} timed"


def _sizes(decision: Decision) -> list[int]:
    return sorted({signature.shape.m for signature, _ in decision.signatures})


def describe_signature(signature: Signature) -> str:
    """One signature in a few words, for log lines."""
    shape = signature.shape
    experts = f" E={shape.experts}" if shape.experts else ""
    parts = [f"M={shape.m} K={shape.k} N={shape.n}{experts}", _dtypes(shape)]
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
