"""What whole training steps measured -> lines of text. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8tune.columns import Column, column_lines

if TYPE_CHECKING:
    from fp8tune.plan import Plan
    from fp8tune.trial_records import TrialResult

__all__ = ["trial_end_line", "trial_lines", "trial_start_line"]

_TRIAL_COLUMNS = (
    Column("trial plan"),
    *(Column(x, right=True) for x in ("layers", "step ms", "speedup", "peak GiB")),
    Column("rounds", right=True),
)


def trial_lines(plan: Plan, width: int) -> list[str]:
    """What whole training steps measured, as a table, the fastest plan first."""
    rows = [_trial_cells(x, plan.reference) for x in plan.trials]
    return column_lines(_TRIAL_COLUMNS, rows, width) if rows else []


def _trial_cells(result: TrialResult, reference: str) -> list[str]:
    high = "inf" if result.speedup_high is None else f"{result.speedup_high:.3f}"
    peak = "-" if result.peak_bytes is None else f"{result.peak_bytes / 2**30:.2f}"
    return [
        ", ".join(result.converted) or f"all {reference}",
        str(result.layers),
        f"{result.step_ms:.2f}",
        f"{result.speedup:.3f} [{result.speedup_low:.3f}, {high}]",
        peak,
        str(result.rounds),
    ]


def trial_start_line(plans: int, steps: int) -> str:
    """What is tried next, and how many training steps it may take."""
    return (
        f"trying {plans} plans in the training steps to come, at most {steps} of them; "
        "the first step of each compiles"
    )


def trial_end_line(steps: int, seconds: float, lost_ms: float) -> str:
    """What the trial cost."""
    return (
        f"the trial took {steps} training steps in {seconds:.1f} s, of which "
        f"{lost_ms / 1e3:.2f} s were lost to slower plans, compilation apart"
    )
