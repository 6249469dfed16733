"""Stage 5: measurements -> decisions. Pure statistics; imports no torch.

Each recipe that a layer could take is judged against high precision, and the best of
those that pass is chosen:

* objective "time": the fastest; but among those that do not differ clearly from it the
  most accurate. A recipe passes if it is clearly faster than ``min_speedup``.
* objective "memory": the one that needs the least memory. A recipe passes if it needs
  less than high precision and is not clearly slower than ``min_speedup``.

Two recipes are compared as a recipe and high precision are, with the one in the place of
the reference; both relate to the reference's time in the same round, which cancels out.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median

from fp8tune.config import Objective, TuneConfig
from fp8tune.decision.curves import Point
from fp8tune.decision.gemms import base_of, is_part
from fp8tune.decision.judge import (
    Index,
    Tried,
    combined,
    index_of,
    interval_of,
    try_recipe,
)
from fp8tune.decision.kinds import Kind, kind_of, sizes_of
from fp8tune.decision.pooling import pool, sharing_of
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Decision, Layer, Measurement, Variant, Verdict

__all__ = ["decide", "reference_of"]


def decide(
    layers: Sequence[Layer],
    measurements: Iterable[Measurement],
    recipes: Sequence[str],
    config: TuneConfig,
) -> tuple[Decision, ...]:
    """One decision per layer, in the order of ``layers``.

    Args:
        layers: every Linear of the model and how it was called.
        measurements: one per recipe and signature that any candidate was called with.
        recipes: names of the recipes that were measured, in the user's order.
        config: ``min_speedup``, ``confidence``, ``max_samples``, ``min_sqnr_db`` and
            ``objective`` are used.

    Returns:
        Decisions; a layer is float8 only if some recipe passes.
    """
    index = index_of(measurements)
    pooled = pool(layers)
    # Alike layers are decided once: a large model has thousands of few sorts.
    sorts = [(x.k, x.n, x.experts, x.reason, x.calls, x.excluded) for x in pooled]
    distinct = dict(zip(sorts, pooled, strict=True))
    decided = {
        sort: _decide_layer(layer, index, recipes, config)
        for sort, layer in distinct.items()
    }
    sharing = sharing_of(layers, pooled)
    return tuple(
        replace(decided[sort], fqn=layer.fqn, shared_by=sharing.get(layer.fqn, 1))
        for sort, layer in zip(sorts, layers, strict=True)
    )


def _decide_layer(
    layer: Layer, index: Index, recipes: Sequence[str], config: TuneConfig
) -> Decision:
    if layer.reason:
        return _reference(layer, layer.reason)
    if not layer.calls:
        grouped = layer.experts > 0
        why = Reason.NO_GROUPED_GEMM if grouped else Reason.NEVER_CALLED
        return _reference(layer, why)
    names = _with_parts(layer, recipes, index)
    tried = [try_recipe(layer, name, index, config) for name in names]
    passed = [x for x in tried if x.passes]
    chosen = _choose(passed, config) if passed else None
    nearest = chosen or min(tried, key=_distance)
    shown = nearest.variant
    variants = [_compared(x, chosen, config) for x in tried]
    return Decision(
        layer.fqn,
        *_whole_sizes(layer),
        Verdict.CONVERTED if chosen else Verdict.REFERENCE,
        shown.reason,
        recipe=shown.recipe if chosen else None,
        signatures=layer.calls,
        reference_ms=shown.reference_ms,
        candidate_ms=shown.candidate_ms,
        speedup=shown.speedup,
        speedup_low=shown.speedup_low,
        speedup_high=shown.speedup_high,
        samples=shown.samples,
        detail=shown.detail,
        sqnr_db=shown.sqnr_db,
        reference_bytes=shown.reference_bytes,
        candidate_bytes=shown.candidate_bytes,
        nearest=shown.recipe,
        timed_m=tuple(sorted({x.signature.shape.m for x in nearest.measured})),
        variants=tuple(variants),
        experts=layer.experts,
    )


def _with_parts(layer: Layer, recipes: Sequence[str], index: Index) -> list[str]:
    """The recipes, and behind each the parts of it that were timed of all the calls."""
    names: list[str] = []
    for recipe in recipes:
        names.append(recipe)
        if recipe not in dict(layer.excluded):
            parts = (x for x in sorted(index) if is_part(x) and base_of(x) == recipe)
            names += [x for x in parts if _is_timed_alike(layer, index, recipe, x)]
    return list(dict.fromkeys(names))


def _is_timed_alike(layer: Layer, index: Index, whole: str, part: str) -> bool:
    """Whether a part was timed with each M that its whole recipe was timed with."""

    def sizes(name: str, kind: Kind) -> set[int]:
        return {x.signature.shape.m for x in index.get(name, {}).get(kind, ())}

    return all(sizes(whole, x) <= sizes(part, x) for x in sizes_of(layer.calls))


def reference_of(layer: Layer) -> Decision:
    """The decision for a layer that was left out."""
    return _reference(layer, layer.reason or Reason.NOT_MEASURED)


def _whole_sizes(layer: Layer) -> tuple[int, int]:
    """K and N, which of experts only their calls tell.

    A rank may multiply a part of one of them, and then has the whole of the other.
    """
    shape = layer.calls[0][0].shape if layer.experts and layer.calls else None
    if shape is None or shape.k == layer.k or shape.n == layer.n:
        return layer.k, layer.n
    return layer.n, layer.k


def _reference(layer: Layer, reason: Reason) -> Decision:
    return Decision(
        layer.fqn,
        *_whole_sizes(layer),
        Verdict.REFERENCE,
        reason,
        signatures=layer.calls,
        experts=layer.experts,
    )


# Of several recipes that do not pass, the one that came nearest says why.
_NEAREST_FIRST = (
    Reason.ACCURACY,
    Reason.NO_CLEAR_DIFFERENCE,
    Reason.MORE_MEMORY,
    Reason.SLOWER,
    Reason.OUT_OF_MEMORY,
    Reason.NOT_MEASURED,
)


def _distance(tried: Tried) -> tuple[int, float]:
    reason = tried.variant.reason
    known = reason in _NEAREST_FIRST
    rank = _NEAREST_FIRST.index(reason) if known else len(_NEAREST_FIRST)
    return rank, -(tried.variant.speedup or 0.0)


def _choose(passed: Sequence[Tried], config: TuneConfig) -> Tried:
    if config.objective is Objective.MEMORY:
        return min(passed, key=lambda x: (x.variant.candidate_bytes or 0, -_speed(x)))
    fastest = max(passed, key=_speed)
    close = [x for x in passed if x is fastest or not _is_beaten(x, fastest, config)]
    return max(close, key=lambda x: (_sqnr_db(x), _speed(x)))


def _speed(tried: Tried) -> float:
    return tried.variant.speedup or 0.0


def _sqnr_db(tried: Tried) -> float:
    known = tried.variant.sqnr_db
    return -math.inf if known is None else known


def _is_beaten(slow: Tried, fast: Tried, config: TuneConfig) -> bool:
    """Whether ``fast`` is clearly faster, round by round."""
    others = {x.signature: x for x in fast.measured}
    curves: dict[Kind, list[Point]] = {}
    for x in slow.measured:
        if y := others.get(x.signature):
            # Rounds of different lengths are those of different runs, one of them cached.
            pairs = zip(x.ratios, y.ratios, strict=False)
            speedup = interval_of([b / a for a, b in pairs], config)
            point = Point(x.signature.shape.m, median(x.candidate_ms), speedup)
            curves.setdefault(kind_of(x.signature), []).append(point)
    # Recipes that share no timing cannot be told apart.
    if curves.keys() != sizes_of(slow.calls).keys():
        return False
    return combined(slow.calls, curves).speedup.low > 1


def _compared(tried: Tried, chosen: Tried | None, config: TuneConfig) -> Variant:
    """What is said of a recipe beside the one that was chosen."""
    if chosen is None or tried is chosen or not tried.passes:
        return tried.variant
    if config.objective is Objective.MEMORY:
        reason = Reason.MORE_MEMORY
    elif _is_beaten(tried, chosen, config) or _sqnr_db(tried) >= _sqnr_db(chosen):
        reason = Reason.NOT_THE_FASTEST
    else:
        reason = Reason.LESS_ACCURATE
    return replace(tried.variant, reason=reason)
