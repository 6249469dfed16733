"""What the plans of a trial measured, as it is kept in plans and caches."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from fp8tune.decision.trials import (
    MOST_STEPS,
    RoleGain,
    TrialRecord,
    TrialResult,
    TrialSteps,
)
from fp8tune.trial.plans import TrialPlan, layers_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8tune.trial.plans import Role
    from fp8tune.trial.search import Search

__all__ = ["lost_ms", "record_of", "results_of", "unclear"]


def record_of(
    search: Search, best: TrialPlan, peaks: Mapping[TrialPlan, int]
) -> TrialRecord:
    """How a trial ended.

    Args:
        search: has seen the steps.
        best: the plan that is kept.
        peaks: most memory that a step of each plan had allocated, on a GPU.
    """
    masks = _ranked(search)
    return TrialRecord(
        tuple(fqn for role in best for fqn in role.fqns),
        tuple(fqn for role in unclear(search, best) for fqn in role.fqns),
        tuple(_result(search, x, peaks) for x in masks),
        tuple(_gain(search, best, x) for x in search.roles),
        _steps(search, masks),
    )


def results_of(
    search: Search, peaks: Mapping[TrialPlan, int]
) -> tuple[TrialResult, ...]:
    """What each plan measured, the fastest first; arguments as of ``record_of``."""
    return tuple(_result(search, x, peaks) for x in _ranked(search))


def _ranked(search: Search) -> list[int]:
    seen = search.seen
    return sorted(seen.counted(), key=lambda x: -seen.speedup(0, x).middle)


def _result(search: Search, mask: int, peaks: Mapping[TrialPlan, int]) -> TrialResult:
    seen, plan = search.seen, search.plan(mask)
    low, middle, high = seen.speedup(0, mask)
    return TrialResult(
        converted=tuple(sorted(role.name for role in plan)),
        layers=layers_of(plan),
        step_ms=median(x[mask] for x in seen.rounds if mask in x),
        speedup=middle,
        speedup_low=low,
        speedup_high=None if high == float("inf") else high,
        rounds=seen.number(mask),
        peak_bytes=peaks.get(plan),
    )


def _gain(search: Search, best: TrialPlan, role: Role) -> RoleGain:
    alone = RoleGain(role.name, role.fqns, role.gain_ms, role.spread_ms)
    model = search.model
    if model is None:
        return alone
    without = search.mask(best - {role})
    by = model.gain(without, search.mask(best | {role}))
    ms = model.reference_ms
    return RoleGain(
        role.name,
        role.fqns,
        role.gain_ms,
        role.spread_ms,
        by.gain * ms,
        by.spread * ms,
    )


def _steps(search: Search, masks: list[int]) -> TrialSteps:
    places = {mask: i for i, mask in enumerate(masks)}
    every = search.seen.in_order()
    kept = every[-MOST_STEPS:]
    return TrialSteps(
        len(every) - len(kept),
        tuple(places[mask] if counts else -1 for mask, _, counts in kept),
        # To a part in a hundred thousand, which no step's time is steady to.
        tuple(float(f"{ms:.5g}") for _, ms, _ in kept),
    )


def unclear(search: Search, best: TrialPlan) -> TrialPlan:
    """Roles that the best plan leaves out, though it is not clearly faster for it."""
    model, mask = search.model, search.mask(best)
    left = [x for x in search.roles if x not in best]
    if model is None:
        return TrialPlan(left)
    return TrialPlan(
        x for x in left if model.gain(mask | search.mask([x]), mask).least <= 0
    )


def lost_ms(search: Search) -> float:
    """What training lost to plans slower than the best, in counted steps."""
    if search.model is None:
        return 0.0
    best = search.model.time(search.mask(search.best))
    lost = (ms - x[0] * best for x in search.seen.rounds for ms in x.values())
    return sum(max(0.0, ms) for ms in lost)
