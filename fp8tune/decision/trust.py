"""What is clear before it is timed, and the decisions that rest on it. Pure; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from fp8tune.config import Objective
from fp8tune.decision.judge import interval_of
from fp8tune.decision.kinds import Kind, kind_of, sizes_of
from fp8tune.decision.prior import Expected, Table, expect_near, is_whole, together
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Decision, Signature, Variant, Verdict

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from fp8tune.config import TuneConfig
    from fp8tune.decision.intervals import Interval
    from fp8tune.decision.records import Layer, Measurement

__all__ = ["Expectation", "Prior", "clear_kinds", "unsure_kinds", "with_expected"]


class Expectation(NamedTuple):
    """What is expected of a signature that is not timed.

    Attributes:
        signature: which.
        recipe: with which recipe.
        speedup: with its bounds.
        source: what that rests on, in words.
    """

    signature: Signature
    recipe: str
    speedup: Expected
    source: str


@dataclass(frozen=True)
class Prior:
    """What is known of one recipe on one device, before more is timed.

    Attributes:
        recipe: its name.
        timed: speedups of other shapes.
        table: what is published for the device, or None.
    """

    recipe: str
    timed: Mapping[Signature, Interval]
    table: Table | None = None

    @classmethod
    def of(
        cls,
        recipe: str,
        measurements: Iterable[Measurement],
        table: Table | None,
        config: TuneConfig,
    ) -> Prior:
        """What measurements of the recipe and a table say."""
        known = [x for x in measurements if not x.failure and x.recipe == recipe]
        timed = {x.signature: interval_of(x.ratios, config) for x in known}
        return cls(recipe, timed, table)

    def expect(self, signature: Signature) -> Expectation | None:
        """What other shapes on this device say, or else the table; None if neither does.

        Other shapes are those with the same dtypes, bias, gradients and recompute.
        """
        like = _without_sizes(signature)
        known = [
            (_sizes(x), y) for x, y in self.timed.items() if _without_sizes(x) == like
        ]
        found = expect_near(_sizes(signature), known)
        if found:
            return Expectation(signature, self.recipe, found, "timings of other shapes")
        if self.table is None or signature.recompute or not is_whole(signature):
            return None
        expected = self.table.expect(*_sizes(signature))
        source = f"a table of {self.table.source}"
        return Expectation(signature, self.recipe, expected, source)


def clear_kinds(
    layers: Sequence[Layer],
    wanted: Mapping[Signature, Sequence[str]],
    known: Iterable[Signature],
    priors: Mapping[str, Prior],
    config: TuneConfig,
) -> dict[Kind, list[Expectation]]:
    """The kinds that need no timing, with what is expected of each of their calls.

    A kind of which anything was timed is timed to the end, and so is one of a layer that
    has calls of another kind, since expected and timed calls do not add up.

    Args:
        layers: with their calls.
        wanted: what would be timed, and with which recipes.
        known: what was timed.
        priors: what is known, by recipe.
        config: a speedup is clear of ``min_speedup``. One above it is not enough where
            accuracy or memory decides, which nobody knows untimed.
    """
    recipes: dict[Kind, list[str]] = {}
    for signature, names in wanted.items():
        recipes.setdefault(kind_of(signature), []).extend(names)
    sizes = sizes_of(call for x in layers for call in x.calls)
    timed = {kind_of(x) for x in known} | _mixed(layers)
    found: dict[Kind, list[Expectation]] = {}
    for kind in recipes.keys() - timed:
        each = [
            [priors[x].expect(kind.at(m)) for m in sizes[kind]]
            for x in dict.fromkeys(recipes[kind])
        ]
        if _is_clear(each, config):
            found[kind] = [x for row in each for x in row if x]
    return found


def unsure_kinds(layers: Sequence[Layer], clear: Collection[Kind]) -> frozenset[Kind]:
    """The kinds of the layers' calls that are not clear."""
    called = sizes_of(call for x in layers for call in x.calls)
    return frozenset(called.keys() - set(clear))


def with_expected(
    decisions: Sequence[Decision], expected: Iterable[Expectation], config: TuneConfig
) -> tuple[Decision, ...]:
    """The decisions, those for layers that were skipped made of what is expected.

    Args:
        decisions: as timings alone make them.
        expected: of the calls that were skipped.
        config: ``min_speedup`` is used.
    """
    known: dict[tuple[Signature, str], Expectation] = {}
    for x in expected:
        known.setdefault((x.signature, x.recipe), x)
    return tuple(_decided(x, known, config) if known else x for x in decisions)


_Known = dict[tuple[Signature, str], Expectation]


def _decided(decision: Decision, known: _Known, config: TuneConfig) -> Decision:
    if decision.reason is not Reason.NOT_MEASURED:
        return decision
    calls = [signature for signature, _ in decision.signatures]
    variants = [_expected(x, calls, known, config) for x in decision.variants]
    judged = [x for x in variants if x.reason is not Reason.NOT_MEASURED and x.speedup]
    if not judged:
        return decision
    best = max(judged, key=lambda x: x.speedup or 0.0)
    faster = best.reason is Reason.EXPECTED_FASTER
    return replace(
        decision,
        verdict=Verdict.CONVERTED if faster else Verdict.REFERENCE,
        reason=best.reason,
        recipe=best.recipe if faster else None,
        speedup=best.speedup,
        speedup_low=best.speedup_low,
        speedup_high=best.speedup_high,
        detail=best.detail,
        nearest=best.recipe,
        variants=tuple(variants),
    )


def _expected(
    variant: Variant, calls: Sequence[Signature], known: _Known, config: TuneConfig
) -> Variant:
    each = [x for x in (known.get((y, variant.recipe)) for y in calls) if x]
    if variant.reason is not Reason.NOT_MEASURED or len(each) < len(calls):
        return variant
    speedup = together([x.speedup for x in each])
    reason = _REASONS.get(speedup.verdict(config.min_speedup))
    if reason is None:  # ranks that met other calls expected opposites
        return variant
    return replace(
        variant,
        reason=reason,
        speedup=speedup.middle,
        speedup_low=speedup.low,
        speedup_high=None if math.isinf(speedup.high) else speedup.high,
        detail=" and ".join(sorted({x.source for x in each})),
    )


_REASONS = {"faster": Reason.EXPECTED_FASTER, "slower": Reason.EXPECTED_SLOWER}


def _is_clear(each: Sequence[Sequence[Expectation | None]], config: TuneConfig) -> bool:
    """Whether each recipe has one clear verdict, and no two of them would have to race."""
    costs = config.min_sqnr_db is not None or config.objective is Objective.MEMORY
    verdicts = [
        {x.speedup.verdict(config.min_speedup) if x else "unknown" for x in row}
        for row in each
    ]
    faster = verdicts.count({"faster"})
    slower = verdicts.count({"slower"})
    return faster <= (0 if costs else 1) and faster + slower == len(verdicts)


def _mixed(layers: Sequence[Layer]) -> set[Kind]:
    """The kinds of layers that have calls of several kinds."""
    every = [sizes_of(x.calls) for x in layers]
    return {kind for kinds in every if len(kinds) > 1 for kind in kinds}


def _sizes(signature: Signature) -> tuple[int, int, int]:
    shape = signature.shape
    return shape.m, shape.k, shape.n


def _without_sizes(signature: Signature) -> Signature:
    return replace(signature, shape=replace(signature.shape, m=0, k=0, n=0))
