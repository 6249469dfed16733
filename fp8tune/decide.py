"""Stage 5: measurements -> decisions. Pure statistics; imports no torch.

A layer that was called with one signature has that signature's speedup and interval. A
layer called with several (say M = 8192 in most steps and a ragged last batch) is judged
by its whole time: with c calls of reference time r and speedup s,

    speedup = sum(c * r) / sum(c * r / s)

and the bounds take every signature's own bound for s, so they are wider than need be,
never narrower.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median

from fp8tune.config import TuneConfig
from fp8tune.intervals import Interval, looks, speedup_interval
from fp8tune.records import (
    Decision,
    Layer,
    Measurement,
    Reason,
    Signature,
    Verdict,
)

__all__ = ["decide"]


def decide(
    layers: Sequence[Layer],
    measurements: Mapping[Signature, Measurement],
    recipe: str,
    config: TuneConfig,
) -> tuple[Decision, ...]:
    """One decision per layer, in the order of ``layers``.

    Args:
        layers: every Linear of the model and how it was called.
        measurements: one per signature that any candidate was called with.
        recipe: name of the recipe that was measured.
        config: ``min_speedup``, ``confidence`` and ``max_samples`` are used.

    Returns:
        Decisions; a layer is float8 only if the lower end of its speedup's interval lies
        above ``min_speedup``.
    """
    return tuple(_decide_layer(x, measurements, recipe, config) for x in layers)


def _decide_layer(
    layer: Layer,
    measurements: Mapping[Signature, Measurement],
    recipe: str,
    config: TuneConfig,
) -> Decision:
    if layer.reason:
        return _reference(layer, layer.reason)
    if not layer.calls:
        return _reference(layer, Reason.NEVER_CALLED)
    found = [measurements.get(signature) for signature, _ in layer.calls]
    measured = [x for x in found if x is not None and x.failure is None]
    if len(measured) < len(found):
        return _failed(layer, found)
    return _judged(layer, measured, recipe, config)


def _reference(layer: Layer, reason: Reason, detail: str = "") -> Decision:
    return Decision(
        layer.fqn,
        layer.k,
        layer.n,
        Verdict.REFERENCE,
        reason,
        signatures=layer.calls,
        detail=detail,
    )


def _failed(layer: Layer, found: Sequence[Measurement | None]) -> Decision:
    failure = next((x for x in found if x is not None and x.failure), None)
    if failure is None or failure.failure is None:
        return _reference(layer, Reason.NOT_MEASURED, "no measurement of its signature")
    return _reference(layer, failure.failure, failure.detail)


def _judged(
    layer: Layer, measured: Sequence[Measurement], recipe: str, config: TuneConfig
) -> Decision:
    counts = [count for _, count in layer.calls]
    times = [median(x.reference_ms) for x in measured]
    total = sum(c * t for c, t in zip(counts, times, strict=True))
    speedup = _combined(measured, counts, times, config)
    reason = _reason(speedup, config.min_speedup)
    reference_ms = total / sum(counts)
    return Decision(
        layer.fqn,
        layer.k,
        layer.n,
        Verdict.FLOAT8 if reason is Reason.FASTER else Verdict.REFERENCE,
        reason,
        recipe=recipe if reason is Reason.FASTER else None,
        signatures=layer.calls,
        reference_ms=reference_ms,
        float8_ms=reference_ms / speedup.middle,
        speedup=speedup.middle,
        speedup_low=speedup.low,
        speedup_high=None if math.isinf(speedup.high) else speedup.high,
        samples=sum(len(x.reference_ms) for x in measured),
    )


def _combined(
    measured: Sequence[Measurement],
    counts: Sequence[int],
    times: Sequence[float],
    config: TuneConfig,
) -> Interval:
    number = len(looks(config.max_samples))
    intervals = [
        speedup_interval(x.ratios, config.confidence, number) for x in measured
    ]
    total = sum(c * t for c, t in zip(counts, times, strict=True))

    def whole(bounds: Sequence[float]) -> float:
        parts = zip(counts, times, bounds, strict=True)
        if not all(bounds):
            return 0.0
        candidate = sum(c * t / s for c, t, s in parts)
        return total / candidate if candidate else math.inf

    low, middle, high = zip(*intervals, strict=True)
    return Interval(whole(low), whole(middle), whole(high))


def _reason(speedup: Interval, threshold: float) -> Reason:
    if speedup.low > threshold:
        return Reason.FASTER
    if speedup.high < threshold:
        return Reason.SLOWER
    return Reason.NO_CLEAR_DIFFERENCE
