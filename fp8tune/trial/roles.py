"""Decisions -> the roles that a trial tells apart."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from fp8tune.decision.folding import without_numbers
from fp8tune.decision.kinds import has_many_sizes
from fp8tune.decision.records import Decision, Verdict
from fp8tune.trial.plans import Role, TrialPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8tune.decision.records import Layer

__all__ = ["roles_of", "sizes_vary", "start_of"]

# Standard deviations between the bounds of an interval of 95%.
_INTERVAL = 4.0

# Of a layer's own time in the step: what its neighbours, with which the compiler fuses its
# casts, may add to or take from its gain; chosen, not measured.
_CONTEXT = 0.1


def roles_of(decisions: Iterable[Decision], steps: int) -> list[Role]:
    """Group the layers that were timed by name without numbers, K, N and signatures.

    Wq and wo of one shape are two roles, since what surrounds them differs; wq of two
    blocks is one, so that blocks stay alike.

    Args:
        decisions: of the layers, with the calls of all warmup steps.
        steps: how many warmup steps that were.

    Returns:
        One for each group. What a layer saves whose speedup is only expected follows from
        the times of the others; where nothing was timed there are no roles.
    """
    decisions = tuple(decisions)
    rate = _ms_per_product(decisions)
    groups: dict[object, list[Decision]] = {}
    for x in (_with_ms(x, rate) for x in decisions):
        if x.speedup is not None and x.reference_ms is not None:
            shapes = frozenset(signature for signature, _ in x.signatures)
            key = (without_numbers(x.fqn), x.k, x.n, shapes)
            groups.setdefault(key, []).append(x)
    return [_role(group, max(1, steps)) for group in groups.values()]


def _ms_per_product(decisions: Iterable[Decision]) -> float | None:
    """Milliseconds that high precision takes for a product, or None if none was timed."""
    timed = [(x.reference_ms, _products(x)) for x in decisions if x.reference_ms]
    products = sum(each for _, each in timed)
    return sum(ms or 0.0 for ms, _ in timed) / products if products else None


def _with_ms(decision: Decision, rate: float | None) -> Decision:
    if decision.reference_ms is not None or rate is None:
        return decision
    return replace(decision, reference_ms=rate * _products(decision))


def _products(decision: Decision) -> float:
    """M * K * N of a call, in the mean over the layer's calls."""
    calls = decision.signatures
    work = sum(count * x.shape.m * x.shape.k * x.shape.n for x, count in calls)
    return work / max(1, sum(count for _, count in calls))


def sizes_vary(layers: Iterable[Layer], steps: int) -> bool:
    """Whether steps differ in size: some layer did not meet the same M in each of them.

    Args:
        layers: with the calls of all warmup steps.
        steps: how many warmup steps that were; one shows nothing.
    """
    return any(
        has_many_sizes(x.calls) and any(count % max(1, steps) for _, count in x.calls)
        for x in layers
        if x.reason is None
    )


def _role(group: Sequence[Decision], steps: int) -> Role:
    first = group[0].fqn
    name = without_numbers(first) if len(group) > 1 else first
    saved = [_saved_ms(x, steps) for x in group]
    return Role(
        name=name or "(root)",
        fqns=tuple(x.fqn for x in group),
        # Siblings read the same input only if they are children of one module and take K
        # numbers; whether they do is not known here, and need not be.
        family=f"{name.rpartition('.')[0]} K={group[0].k}",
        gain_ms=sum(gain for gain, _ in saved),
        # Layers of one signature share its measurement, and so its error.
        spread_ms=sum(spread for _, spread in saved),
    )


def _saved_ms(decision: Decision, steps: int) -> tuple[float, float]:
    """What converting saves a step, and its standard deviation, in milliseconds."""
    speedup, low = decision.speedup or 1.0, decision.speedup_low
    calls = sum(count for _, count in decision.signatures) / decision.shared_by
    a_step = calls / steps
    reference = (decision.reference_ms or 0.0) * a_step
    fastest = 0.0 if decision.speedup_high is None else 1 / decision.speedup_high
    slowest = 1 / low if low else 2 / speedup
    interval = (slowest - fastest) / _INTERVAL
    return reference * (1 - 1 / speedup), reference * math.sqrt(
        interval**2 + _CONTEXT**2
    )


def start_of(decisions: Iterable[Decision], roles: Iterable[Role]) -> TrialPlan:
    """The roles that the decisions convert."""
    converted = {x.fqn for x in decisions if x.verdict is Verdict.CONVERTED}
    return frozenset(role for role in roles if role.fqns[0] in converted)
