"""What a check of the accuracy during training makes of a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from fp8tune.decision.decisions import Decisions
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fp8tune.decision.records import Decision

__all__ = ["Fallen", "after_check", "lowest"]

_Plan = TypeVar("_Plan", bound=Decisions)


@dataclass(frozen=True, order=True)
class Fallen:
    """A converted layer whose accuracy is below ``min_sqnr_db`` by now.

    Attributes:
        fqn: its name.
        sqnr_db: the lowest SQNR of its output and its gradients, in dB.
    """

    fqn: str
    sqnr_db: float


def lowest(found: Iterable[Fallen]) -> dict[str, float]:
    """The lowest SQNR of each layer that some rank saw fall, by name."""
    worst: dict[str, float] = {}
    for x in found:
        worst[x.fqn] = min(x.sqnr_db, worst.get(x.fqn, x.sqnr_db))
    return worst


def after_check(
    plan: _Plan, fallen: Mapping[str, float], step: int, *, reverted: bool
) -> _Plan:
    """The plan that says of these layers what a check found.

    Args:
        plan: the plan so far.
        fallen: SQNR in dB by the name of a layer; names that it has not are left out.
        step: training steps after the freeze.
        reverted: the layers go back to high precision.
    """

    def told(decision: Decision) -> Decision:
        sqnr_db = fallen.get(decision.fqn)
        if sqnr_db is None:
            return decision
        detail = f"its SQNR was {sqnr_db:.1f} dB, {step} steps after the freeze"
        told = replace(decision, sqnr_db=sqnr_db, detail=detail)
        if not reverted:
            return told
        verdict, reason = Verdict.REFERENCE, Reason.ACCURACY_FELL
        return replace(told, verdict=verdict, reason=reason, recipe=None)

    return replace(plan, decisions=tuple(map(told, plan.decisions)))
