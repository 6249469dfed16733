"""What whole training steps measured -> lines of text. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8tune.report.columns import Column, column_lines

if TYPE_CHECKING:
    from fp8tune.decision.decisions import Decisions
    from fp8tune.decision.trials import TrialRecord, TrialResult

__all__ = [
    "BOUND_ELSEWHERE",
    "OTHER_TRIAL",
    "OVERLAPPING",
    "TRIAL_HEADINGS",
    "UNSIZED",
    "compile_line",
    "endless_trial_line",
    "plan_name",
    "trial_end_line",
    "trial_lines",
    "trial_rows",
    "trial_start_line",
    "winner_of",
]

TRIAL_HEADINGS = ("trial plan", "layers", "step ms", "speedup", "peak GiB", "rounds")
_COLUMNS = tuple(Column(x, right=i > 0) for i, x in enumerate(TRIAL_HEADINGS))


def trial_lines(plan: Decisions, width: int) -> list[str]:
    """What whole training steps measured, as a table, the fastest plan first."""
    rows = trial_rows(plan)
    return column_lines(_COLUMNS, rows, width) if rows else []


def trial_rows(plan: Decisions) -> list[list[str]]:
    """The cells under ``TRIAL_HEADINGS`` of each plan, the fastest first."""
    return [_trial_cells(x, plan.timed_against) for x in plan.trials]


def plan_name(result: TrialResult) -> str:
    """The roles that a trial plan converts."""
    return ", ".join(result.converted) or "nothing converted"


def winner_of(trial: TrialRecord) -> TrialResult | None:
    """What the plan that was kept measured, or None where that is not known."""
    won = set(trial.converted)
    names = sorted(x.name for x in trial.roles if won.issuperset(x.fqns))
    if not trial.roles:
        return None
    return next((x for x in trial.results if list(x.converted) == names), None)


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


# What trials take as a rule: three plans, and about one more for every second role. As
# simulated in tests/trial at 1% noise, rounded up.
_FIRST_PLANS, _STEPS_A_PLAN = 3, 16

BOUND_ELSEWHERE = (
    "training steps are bound by something else than the device: plans that save time in "
    "forward and backward do not make the loop as much faster, from the start of a step to "
    "that of the next. Look at data loading, the optimizer and Python's launches; the plan "
    "is not one that makes the loop clearly slower"
)

UNSIZED = (
    "plans cannot be compared: training steps differ in size, and what the model is called "
    "with holds no tensors that tell it; what layers measured alone is kept. Pass the "
    "batch to the model's forward"
)

OVERLAPPING = (
    "plans cannot be compared: each step begins while results of earlier ones are kept and "
    "may be differentiated yet; what layers measured alone is kept. Delete or detach "
    "results that are only looked at"
)

OTHER_TRIAL = (
    "the trial in the checkpoint is of other layers and is not used; plans are tried from "
    "the beginning"
)


def trial_start_line(roles: int, steps: int, seconds: float) -> str:
    """What is tried next, and what it may take."""
    plans = min(_FIRST_PLANS + (roles + 1) // 2, 2**roles)
    about = min(_STEPS_A_PLAN * plans, steps)
    return (
        f"trying about {plans} plans in the about {about} training steps to come, at most "
        f"{steps} of them and {seconds:g} s, compiling included; the first step of each "
        "plan compiles"
    )


def compile_line(seconds: float) -> str:
    """What the first plan took to compile."""
    return (
        f"compiling a plan takes about {seconds:.1f} s; how many are tried follows from "
        "trial_seconds"
    )


def endless_trial_line(steps: int) -> str:
    """Why the trial ended without a winner."""
    return (
        f"the trial makes no progress: after {steps} steps none has ended any more, since "
        "no optimizer of the model steps and gradients are never reset; what layers "
        "measured alone is kept"
    )


def trial_end_line(steps: int, seconds: float, lost_ms: float) -> str:
    """What the trial cost."""
    return (
        f"the trial took {steps} training steps in {seconds:.1f} s, of which "
        f"{lost_ms / 1e3:.2f} s were lost to slower plans, compilation apart"
    )
