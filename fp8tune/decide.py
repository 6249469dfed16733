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
from fp8tune.judge import Index, Tried, combined, try_recipe
from fp8tune.records import Decision, Layer, Measurement, Reason, Variant, Verdict

__all__ = ["decide"]


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
    index = {(x.signature, x.recipe): x for x in measurements}
    # Alike layers are decided once: a large model has thousands of few kinds.
    kinds = [(x.k, x.n, x.reason, x.calls, x.excluded) for x in layers]
    distinct = dict(zip(kinds, layers, strict=True))
    decided = {
        kind: _decide_layer(layer, index, recipes, config)
        for kind, layer in distinct.items()
    }
    return tuple(
        replace(decided[kind], fqn=layer.fqn)
        for kind, layer in zip(kinds, layers, strict=True)
    )


def _decide_layer(
    layer: Layer, index: Index, recipes: Sequence[str], config: TuneConfig
) -> Decision:
    if layer.reason:
        return _reference(layer, layer.reason)
    if not layer.calls:
        return _reference(layer, Reason.NEVER_CALLED)
    tried = [try_recipe(layer, recipe, index, config) for recipe in recipes]
    passed = [x for x in tried if x.passes]
    chosen = _choose(passed, config) if passed else None
    nearest = chosen or min(tried, key=_distance)
    shown = nearest.variant
    variants = [_compared(x, chosen, config) for x in tried]
    return Decision(
        layer.fqn,
        layer.k,
        layer.n,
        Verdict.FLOAT8 if chosen else Verdict.REFERENCE,
        shown.reason,
        recipe=shown.recipe if chosen else None,
        signatures=layer.calls,
        reference_ms=shown.reference_ms,
        float8_ms=shown.float8_ms,
        speedup=shown.speedup,
        speedup_low=shown.speedup_low,
        speedup_high=shown.speedup_high,
        samples=shown.samples,
        detail=shown.detail,
        sqnr_db=shown.sqnr_db,
        reference_bytes=shown.reference_bytes,
        float8_bytes=shown.float8_bytes,
        nearest=shown.recipe,
        variants=tuple(variants),
    )


def _reference(layer: Layer, reason: Reason) -> Decision:
    return Decision(
        layer.fqn,
        layer.k,
        layer.n,
        Verdict.REFERENCE,
        reason,
        signatures=layer.calls,
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
        return min(passed, key=lambda x: (x.variant.float8_bytes or 0, -_speed(x)))
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
    pairs = list(zip(slow.measured, fast.measured, strict=True))
    # Rounds of different lengths are those of different runs, one of them cached.
    ratios = [
        [b / a for a, b in zip(x.ratios, y.ratios, strict=False)] for x, y in pairs
    ]
    times = [median(x.candidate_ms) for x, _ in pairs]
    return combined(ratios, slow.counts, times, config).low > 1


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
