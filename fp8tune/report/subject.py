"""What a page or a tracker is told about one tuned model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fp8tune.decision.decisions import Decisions
    from fp8tune.decision.records import Decision, Measurement

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """One tuned model, as it is shown.

    Attributes:
        title: what to call it, such as "run 2 of llama.json".
        plan: the decisions and what they are true of.
        by_signature: what would be decided for each signature alone, for the map of
            shapes; the plan's own decisions where nobody decided that.
        measurements: the raw times, for what was unsteady or synthetic.
        recorded: the day of the newest timing, as "2026-01-31", or "".
        min_speedup: the threshold of the decisions.
    """

    title: str
    plan: Decisions
    by_signature: tuple[Decision, ...]
    measurements: tuple[Measurement, ...] = ()
    recorded: str = ""
    min_speedup: float = 1.0
