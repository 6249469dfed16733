"""Stage 3, a second look: the GEMMs of a signature by themselves.

A recipe is one choice for three GEMMs, and often one of them loses what the others gain.
So where no whole recipe is clearly faster each GEMM is timed alone in it, the others in high
precision, and those that gain make one more candidate, which is timed like any other. That
is at most four more variants of each recipe.
"""

from __future__ import annotations

import gc
from statistics import median
from typing import TYPE_CHECKING, Any

from fp8tune.decision.gemms import needed_gemms
from fp8tune.decision.judge import interval_of
from fp8tune.recipes.recipe import ByGemm
from fp8tune.timing.measure import measure_all

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fp8tune.config import TuneConfig
    from fp8tune.decision.records import Measurement
    from fp8tune.model.candidates import Sample
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.timing.clock import Clock, Work
    from fp8tune.timing.replay import CompiledBodies

__all__ = ["measure_with_parts"]

# A whole recipe this slow loses in every GEMM: to casts of a small one, or since it is
# emulated. One GEMM of three at fault would have to be four times as slow as its reference.
_HOPELESS = 0.5


def measure_with_parts(
    take: Callable[[], Sample],
    recipes: Sequence[Recipe],
    clock: Clock,
    config: TuneConfig,
    compile_options: Mapping[str, Any] | None = None,
    *,
    release: Callable[[], object] = gc.collect,
    trace: Callable[[Work, Work], None] | None = None,
    compiled: CompiledBodies | None = None,
) -> list[Measurement]:
    """Time one signature; see ``measure_all``, whose arguments these are.

    Returns:
        One record per recipe, and one more for each of which a part may be better.
    """

    def timed(
        candidates: Sequence[Recipe], trace: Callable[[Work, Work], None] | None
    ) -> list[Measurement]:
        return measure_all(
            take,
            candidates,
            clock,
            config,
            compile_options,
            release=release,
            trace=trace,
            compiled=kept,
        )

    # The reference is compiled once, however many parts it is timed against.
    kept: CompiledBodies = {} if compiled is None else compiled
    measured = timed(recipes, trace)
    if any(_is_faster(x, config) for x in measured):
        return measured
    for recipe, whole in zip(recipes, list(measured), strict=True):
        grouped = whole.signature.shape.experts > 0  # which no recipe takes apart
        if isinstance(recipe, ByGemm) and not grouped and _is_worth_it(whole):
            alone = _each_alone(recipe, whole, lambda x: timed(x, None))
            gaining = tuple(x for x, found in alone.items() if _gains(found))
            if len(gaining) == 1:
                measured.append(alone[gaining[0]])
            elif 1 < len(gaining) < len(alone):
                measured += timed([recipe.only(gaining)], trace)
    return measured


def _is_faster(whole: Measurement, config: TuneConfig) -> bool:
    ratios = whole.ratios
    return bool(ratios) and interval_of(ratios, config).low > config.min_speedup


def _is_worth_it(whole: Measurement) -> bool:
    return not whole.failure and median(whole.ratios) > _HOPELESS


def _each_alone(
    recipe: ByGemm,
    whole: Measurement,
    timed: Callable[[Sequence[Recipe]], list[Measurement]],
) -> dict[str, Measurement]:
    """The GEMMs that training needs, each timed as the only one that is converted."""
    gemms = needed_gemms(whole.signature, recipe.gemms)
    if len(gemms) < 2:
        return {}
    parts = [recipe.only((x,)) for x in gemms]
    return dict(zip(gemms, timed(parts), strict=True))


def _gains(alone: Measurement) -> bool:
    return not alone.failure and median(alone.ratios) > 1
