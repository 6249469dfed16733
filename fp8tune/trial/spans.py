"""Marks on the device around one forward with its backward, and around a whole step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fp8tune.trial.search import TrialPlan

__all__ = ["Span", "Step"]


class Span(NamedTuple):
    """One forward with its backward: marks on the device, and seconds of the wall."""

    start: Any
    end: Any
    seconds: float


class Step(NamedTuple):
    """One step of one plan, whose times are read at the end of the round.

    ``whole`` is from its start to that of the next, None where something else ran too.
    """

    plan: TrialPlan
    spans: tuple[Span, ...]
    size: int
    whole: Span | None
