"""What checks of the accuracy during training make of decisions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8tune.decision.records import Decision

__all__ = ["Fallen", "decisions_after_checks", "lowest", "still_fallen"]


@dataclass(frozen=True, order=True)
class Fallen:
    """A converted layer whose accuracy a check found below ``min_sqnr_db``.

    Attributes:
        fqn: its name.
        sqnr_db: the lowest SQNR that was found, in dB.
        least_db: ``min_sqnr_db`` of that run, in dB.
        steps: training steps after the freeze.
        reverted: it went back to high precision; otherwise it was only said.
    """

    fqn: str
    sqnr_db: float
    least_db: float
    steps: int
    reverted: bool


def lowest(found: Iterable[Fallen]) -> tuple[Fallen, ...]:
    """Of each layer what the rank found that saw it fall lowest, by name."""
    worst: dict[str, Fallen] = {}
    for x in found:
        known = worst.get(x.fqn)
        worst[x.fqn] = x if known is None else min(x, known)
    return tuple(worst[fqn] for fqn in sorted(worst))


def still_fallen(known: Iterable[Fallen], least_db: float | None) -> tuple[Fallen, ...]:
    """What of an earlier run's checks counts in a later one.

    Args:
        known: what they found.
        least_db: the later run's ``min_sqnr_db``; None leaves each to its own.
    """
    return tuple(
        x for x in known if x.sqnr_db < (x.least_db if least_db is None else least_db)
    )


def decisions_after_checks(
    decisions: Sequence[Decision], fallen: Iterable[Fallen]
) -> tuple[Decision, ...]:
    """The decisions that say of these layers what a check found.

    Args:
        decisions: of each layer so far.
        fallen: layers that are not among the converted ones are left out.
    """
    by_name = {x.fqn: x for x in fallen}
    return tuple(_told(x, by_name.get(x.fqn)) for x in decisions)


def _told(decision: Decision, fallen: Fallen | None) -> Decision:
    if fallen is None or decision.verdict is not Verdict.CONVERTED:
        return decision
    detail = (
        f"its SQNR was {fallen.sqnr_db:.1f} dB, below min_sqnr_db={fallen.least_db:g}, "
        f"{fallen.steps} steps after the freeze"
    )
    told = replace(decision, sqnr_db=fallen.sqnr_db, detail=detail)
    if not fallen.reverted:
        return told
    verdict, reason = Verdict.REFERENCE, Reason.ACCURACY_FELL
    return replace(told, verdict=verdict, reason=reason, recipe=None)
