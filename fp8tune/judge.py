"""Stage 5, one recipe at a time: its numbers on a layer, and whether it passes.

A layer that was called with one signature has that signature's speedup and interval. A
layer called with several (say M = 8192 in most steps and a ragged last batch) is judged
by its whole time: with c calls of reference time r and speedup s,

    speedup = sum(c * r) / sum(c * r / s)

and the bounds take every signature's own bound for s, so they are wider than need be,
never narrower.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

from fp8tune.config import Objective, TuneConfig
from fp8tune.intervals import Interval, looks, speedup_interval
from fp8tune.records import Layer, Measurement, Reason, Signature, Variant

__all__ = ["Index", "Tried", "combined", "try_recipe"]

Index = Mapping[tuple[Signature, str], Measurement]


class Tried(NamedTuple):
    """A recipe on a layer: what is said of it, and the raw times behind it."""

    variant: Variant
    measured: Sequence[Measurement] = ()
    counts: Sequence[int] = ()

    @property
    def passes(self) -> bool:
        """Whether the layer may be converted to it."""
        return self.variant.reason in (Reason.FASTER, Reason.LESS_MEMORY)


def try_recipe(layer: Layer, recipe: str, index: Index, config: TuneConfig) -> Tried:
    """Judge one recipe on a layer that was called.

    Args:
        layer: a candidate.
        recipe: its name.
        index: what was measured, by signature and recipe.
        config: as for ``decide``.
    """
    excluded = dict(layer.excluded).get(recipe)
    if excluded:
        return Tried(Variant(recipe, excluded))
    found = [index.get((signature, recipe)) for signature, _ in layer.calls]
    measured = [x for x in found if x is not None and x.failure is None]
    if len(measured) < len(found):
        return Tried(_failed(recipe, found))
    counts = [count for _, count in layer.calls]
    variant = _measured_variant(recipe, measured, counts, config)
    return Tried(variant, measured, counts)


def _failed(recipe: str, found: Sequence[Measurement | None]) -> Variant:
    for measurement in found:
        if measurement is not None and measurement.failure:
            return Variant(recipe, measurement.failure, detail=measurement.detail)
    detail = "no measurement of its signature"
    return Variant(recipe, Reason.NOT_MEASURED, detail=detail)


def _measured_variant(
    recipe: str,
    measured: Sequence[Measurement],
    counts: Sequence[int],
    config: TuneConfig,
) -> Variant:
    times = [median(x.reference_ms) for x in measured]
    speedup = combined([x.ratios for x in measured], counts, times, config)
    total = sum(c * t for c, t in zip(counts, times, strict=True))
    reference_ms = total / sum(counts)
    known = [x.accuracy for x in measured]
    variant = Variant(
        recipe,
        Reason.NOT_MEASURED,
        reference_ms=reference_ms,
        float8_ms=reference_ms / speedup.middle,
        speedup=speedup.middle,
        speedup_low=speedup.low,
        speedup_high=None if math.isinf(speedup.high) else speedup.high,
        samples=sum(len(x.reference_ms) for x in measured),
        sqnr_db=_if_all(min, [x and x.worst_db for x in known]),
        underflow=_if_all(max, [x and x.underflow for x in known]),
        saturation=_if_all(max, [x and x.saturation for x in known]),
        reference_bytes=_if_all(max, [x.reference_bytes for x in measured]),
        float8_bytes=_if_all(max, [x.candidate_bytes for x in measured]),
    )
    reason, detail = _judge(variant, speedup, config)
    return replace(variant, reason=reason, detail=detail)


def _if_all(pick: Any, values: Sequence[Any]) -> Any:
    """The smallest or largest value, or None where one is not known."""
    return None if None in values else pick(values)


def _judge(
    variant: Variant, speedup: Interval, config: TuneConfig
) -> tuple[Reason, str]:
    """Why the recipe passes or does not, and in which detail."""
    reason = _time_reason(speedup, config.min_speedup)
    detail = ""
    if config.objective is Objective.MEMORY and reason is not Reason.SLOWER:
        reason, detail = _memory_reason(variant)
    if reason in (Reason.FASTER, Reason.LESS_MEMORY):
        problem = _accuracy_problem(variant.sqnr_db, config.min_sqnr_db)
        if problem:
            return Reason.ACCURACY, problem
    return reason, detail


def _time_reason(speedup: Interval, threshold: float) -> Reason:
    if speedup.low > threshold:
        return Reason.FASTER
    if speedup.high < threshold:
        return Reason.SLOWER
    return Reason.NO_CLEAR_DIFFERENCE


def _memory_reason(variant: Variant) -> tuple[Reason, str]:
    if variant.float8_bytes is None or variant.reference_bytes is None:
        return Reason.NOT_MEASURED, "peak memory is measured on GPUs only"
    less = variant.float8_bytes < variant.reference_bytes
    return (Reason.LESS_MEMORY if less else Reason.MORE_MEMORY), ""


def _accuracy_problem(sqnr_db: float | None, wanted: float | None) -> str:
    if wanted is None or (sqnr_db is not None and sqnr_db >= wanted):
        return ""
    if sqnr_db is None:
        return f"its accuracy is not known, and min_sqnr_db is {wanted:g}"
    return f"its SQNR is {sqnr_db:.1f} dB, and min_sqnr_db is {wanted:g}"


def combined(
    ratios: Sequence[Sequence[float]],
    counts: Sequence[int],
    times: Sequence[float],
    config: TuneConfig,
) -> Interval:
    """The speedup of all calls together, from that of each signature."""
    number = len(looks(config.max_samples))
    intervals = [speedup_interval(x, config.confidence, number) for x in ratios]
    total = sum(c * t for c, t in zip(counts, times, strict=True))

    def whole(bounds: Sequence[float]) -> float:
        parts = zip(counts, times, bounds, strict=True)
        if not all(bounds):
            return 0.0
        candidate = sum(c * t / s for c, t, s in parts)
        return total / candidate if candidate else math.inf

    low, middle, high = zip(*intervals, strict=True)
    return Interval(whole(low), whole(middle), whole(high))
