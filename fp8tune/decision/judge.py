"""Stage 5, one recipe at a time: its numbers on a layer, and whether it passes.

A layer that was called with one signature has that signature's speedup and interval. A
layer called with several (say M = 8192 in most steps and a ragged last batch) is judged
by its whole time: with c calls of reference time r and speedup s,

    speedup = sum(c * r) / sum(c * r / s)

and the bounds take every signature's own bound for s, so they are wider than need be,
never narrower. Where M was not timed, r and s are those of ``fp8tune.decision.curves``.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

from fp8tune.config import Objective, TuneConfig
from fp8tune.decision.curves import Point, point_at
from fp8tune.decision.intervals import Interval, looks, speedup_interval
from fp8tune.decision.kinds import Calls, Kind, kind_of, sizes_of
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Layer, Measurement, Signature, Variant

__all__ = [
    "Index",
    "Tried",
    "combined",
    "index_of",
    "interval_of",
    "points_of",
    "try_recipe",
]

# The speedup below which a candidate is not worth more than a first round.
_HOPELESS = 0.5

Timed = Mapping[Kind, Sequence[Measurement]]
Index = Mapping[str, Timed]


class Whole(NamedTuple):
    """Many calls together: their time in ms, their speedup, and what it rests on."""

    time_ms: float
    speedup: Interval
    used: frozenset[Signature]


class Tried(NamedTuple):
    """A recipe on a layer: what is said of it, and the raw times behind it."""

    variant: Variant
    calls: Calls = ()
    measured: tuple[Measurement, ...] = ()

    @property
    def passes(self) -> bool:
        """Whether the layer may be converted to it."""
        return self.variant.reason in (Reason.FASTER, Reason.LESS_MEMORY)


def index_of(measurements: Iterable[Measurement]) -> Index:
    """Measurements by recipe and kind, in the order of M."""
    index: dict[str, dict[Kind, dict[int, Measurement]]] = {}
    for x in measurements:
        kinds = index.setdefault(x.recipe, {})
        kinds.setdefault(kind_of(x.signature), {})[x.signature.shape.m] = x
    return {
        recipe: {kind: [by_m[m] for m in sorted(by_m)] for kind, by_m in kinds.items()}
        for recipe, kinds in index.items()
    }


def try_recipe(layer: Layer, recipe: str, index: Index, config: TuneConfig) -> Tried:
    """Judge one recipe on a layer that was called.

    Args:
        layer: a candidate.
        recipe: its name.
        index: what was measured, see ``index_of``.
        config: as for ``decide``.
    """
    excluded = dict(layer.excluded).get(recipe)
    if excluded:
        return Tried(Variant(recipe, excluded))
    found = {x: index.get(recipe, {}).get(x, ()) for x in sizes_of(layer.calls)}
    failed = _failed(recipe, layer.calls, found)
    if failed:
        return Tried(failed)
    timed = {k: [x for x in each if not x.failure] for k, each in found.items()}
    curves = {kind: points_of(each, config) for kind, each in timed.items()}
    whole = combined(layer.calls, curves)
    every = itertools.chain.from_iterable(timed.values())
    measured = tuple(x for x in every if x.signature in whole.used)
    reference_ms = whole.time_ms / sum(count for _, count in layer.calls)
    variant = _measured_variant(recipe, reference_ms, whole.speedup, measured, config)
    return Tried(variant, layer.calls, measured)


def _failed(recipe: str, calls: Calls, found: Timed) -> Variant | None:
    """Why there is no time for one of the calls, or None if there is for all."""
    called = {signature for signature, _ in calls}
    for measurement in itertools.chain.from_iterable(found.values()):
        if measurement.failure and measurement.signature in called:
            return Variant(recipe, measurement.failure, detail=measurement.detail)
    for kind, sizes in sizes_of(calls).items():
        known = {x.signature.shape.m for x in found[kind] if not x.failure}
        if len(known) < 2 and not known.issuperset(sizes):
            detail = "no measurement of its signature"
            return Variant(recipe, Reason.NOT_MEASURED, detail=detail)
    return None


def _measured_variant(
    recipe: str,
    reference_ms: float,
    speedup: Interval,
    measured: Sequence[Measurement],
    config: TuneConfig,
) -> Variant:
    known = [x.accuracy for x in measured]
    worst = [x.worst_db for x in known if x and x.worst_db is not None]
    variant = Variant(
        recipe,
        Reason.NOT_MEASURED,
        reference_ms=reference_ms,
        candidate_ms=reference_ms / speedup.middle,
        speedup=speedup.middle,
        speedup_low=speedup.low,
        speedup_high=None if math.isinf(speedup.high) else speedup.high,
        samples=sum(len(x.reference_ms) for x in measured),
        # Of tensors that were not finite nothing is known, nor held against a recipe.
        sqnr_db=None if None in known else min(worst, default=None),
        underflow=_if_all(max, [x and x.underflow for x in known]),
        saturation=_if_all(max, [x and x.saturation for x in known]),
        reference_bytes=_if_all(max, [x.reference_bytes for x in measured]),
        candidate_bytes=_if_all(max, [x.candidate_bytes for x in measured]),
    )
    wanted = None if known and not (worst or None in known) else config.min_sqnr_db
    reason, detail = _judge(variant, speedup, config, wanted)
    return replace(variant, reason=reason, detail=detail)


def _if_all(pick: Any, values: Sequence[Any]) -> Any:
    """The smallest or largest value, or None where one is not known."""
    return None if None in values else pick(values)


def _judge(
    variant: Variant, speedup: Interval, config: TuneConfig, min_sqnr_db: float | None
) -> tuple[Reason, str]:
    """Why the recipe passes or does not, and in which detail."""
    reason = _time_reason(speedup, config.min_speedup)
    detail = ""
    if config.objective is Objective.MEMORY and reason is not Reason.SLOWER:
        reason, detail = _memory_reason(variant)
    if reason in (Reason.FASTER, Reason.LESS_MEMORY):
        problem = _accuracy_problem(variant.sqnr_db, min_sqnr_db)
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
    if variant.candidate_bytes is None or variant.reference_bytes is None:
        return Reason.NOT_MEASURED, "peak memory is measured on GPUs only"
    less = variant.candidate_bytes < variant.reference_bytes
    return (Reason.LESS_MEMORY if less else Reason.MORE_MEMORY), ""


def _accuracy_problem(sqnr_db: float | None, wanted: float | None) -> str:
    if wanted is None or (sqnr_db is not None and sqnr_db >= wanted):
        return ""
    if sqnr_db is None:
        return f"its accuracy is not known, and min_sqnr_db is {wanted:g}"
    return f"its SQNR is {sqnr_db:.1f} dB, and min_sqnr_db is {wanted:g}"


def points_of(timed: Sequence[Measurement], config: TuneConfig) -> list[Point]:
    """The reference's time and the speedup at each M of one kind."""
    return [
        Point(
            x.signature.shape.m,
            median(x.reference_ms),
            interval_of(x.ratios, config),
        )
        for x in timed
    ]


def interval_of(ratios: Sequence[float], config: TuneConfig) -> Interval:
    """The interval of one signature, as sampling has looked at it.

    Pairs that are too few for an interval are all that is timed of a candidate that takes
    more than twice as long in each of them. Its upper bound is twice the largest ratio:
    noise that hides a true gain would have to double the time again and again.
    """
    number = len(looks(config.max_samples))
    interval = speedup_interval(ratios, config.confidence, number)
    if math.isinf(interval.high) and max(ratios) < _HOPELESS:
        return interval._replace(high=max(ratios) / _HOPELESS)
    return interval


def combined(calls: Calls, curves: Mapping[Kind, Sequence[Point]]) -> Whole:
    """The speedup of all calls together, from those of the M that were timed.

    Args:
        calls: at least one.
        curves: for each of their kinds at least one point, in the order of M.
    """
    total, used = 0.0, set[Signature]()
    parts: list[tuple[float, Interval]] = []
    for signature, count in calls:
        kind = kind_of(signature)
        point, timed = point_at(curves[kind], signature.shape.m)
        used.update(kind.at(x.m) for x in timed)
        total += count * point.time_ms
        parts.append((count * point.time_ms, point.speedup))

    def whole(bounds: Sequence[float]) -> float:
        if not all(bounds):
            return 0.0
        pairs = zip(parts, bounds, strict=True)
        candidate = sum(time_ms / bound for (time_ms, _), bound in pairs)
        return total / candidate if candidate else math.inf

    low, middle, high = zip(*(speedup for _, speedup in parts), strict=True)
    speedup = Interval(whole(low), whole(middle), whole(high))
    return Whole(total, speedup, frozenset(used))
