"""Decisions -> the roles that a trial tells apart, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fp8tune.folding import without_numbers
from fp8tune.records import Decision, Reason, Verdict
from fp8tune.tournament import Role, TrialPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8tune.plan import Plan
    from fp8tune.trial_records import TrialRecord

__all__ = ["after_trial", "roles_of", "start_of"]


def roles_of(decisions: Iterable[Decision], min_speedup: float) -> list[Role]:
    """Group the layers that were timed by name without numbers, K, N and signatures.

    Wq and wo of one shape are two roles, since what surrounds them differs; wq of two
    blocks is one, so that blocks stay alike.
    """
    groups: dict[object, list[Decision]] = {}
    for x in decisions:
        if x.speedup is not None:
            shapes = frozenset(signature for signature, _ in x.signatures)
            key = (without_numbers(x.fqn), x.k, x.n, shapes)
            groups.setdefault(key, []).append(x)
    return [_role(group, min_speedup) for group in groups.values()]


def _role(group: Sequence[Decision], min_speedup: float) -> Role:
    ratio = (group[0].speedup or 1.0) / min_speedup
    first = group[0].fqn
    name = without_numbers(first) if len(group) > 1 else first
    fqns = tuple(x.fqn for x in group)
    # Siblings read the same input only if they are children of one module and take K
    # numbers; whether they do is not known here, and need not be.
    family = f"{name.rpartition('.')[0]} K={group[0].k}"
    return Role(name or "(root)", fqns, max(ratio, 1 / ratio), family)


def start_of(decisions: Iterable[Decision], roles: Iterable[Role]) -> TrialPlan:
    """The roles that the decisions convert."""
    converted = {x.fqn for x in decisions if x.verdict is Verdict.FLOAT8}
    return frozenset(role for role in roles if role.fqns[0] in converted)


def after_trial(plan: Plan, trial: TrialRecord) -> Plan:
    """The per-layer plan with the verdicts of the winning trial plan.

    Layers that were timed and that the winner does not convert stay in high precision.
    """
    won, unclear = frozenset(trial.converted), frozenset(trial.unclear)
    decisions = [
        _converted(x, plan.recipe) if x.fqn in won else _left(x, x.fqn in unclear)
        for x in plan.decisions
    ]
    return replace(plan, decisions=tuple(decisions), trials=trial.results)


def _converted(decision: Decision, recipe: str) -> Decision:
    if decision.verdict is Verdict.FLOAT8:
        return decision
    return replace(
        decision,
        verdict=Verdict.FLOAT8,
        reason=Reason.FASTER_IN_TRAINING,
        recipe=decision.nearest or recipe,
    )


def _left(decision: Decision, unclear: bool) -> Decision:
    if decision.verdict is Verdict.REFERENCE:
        return decision
    reason = Reason.UNCLEAR_IN_TRAINING if unclear else Reason.SLOWER_IN_TRAINING
    return replace(decision, verdict=Verdict.REFERENCE, reason=reason, recipe=None)
