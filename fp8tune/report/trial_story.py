"""What a trial of whole plans says of one layer, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8tune.decision.records import Verdict
from fp8tune.report.trials import winner_of

if TYPE_CHECKING:
    from fp8tune.decision.records import Decision
    from fp8tune.decision.trials import RoleGain, TrialRecord, TrialResult

__all__ = ["role_of", "trial_sentences"]


def trial_sentences(
    trial: TrialRecord | None, alone: Decision, ended: Decision
) -> list[str]:
    """What was tried, what the layer saved there, and what that changed.

    Args:
        trial: of the layer's run, or None if there was none.
        alone: the decision from the layer's own timing.
        ended: the decision after the trial.
    """
    if trial is None or alone.speedup is None:
        return []
    role = role_of(trial, alone.fqn)
    return [
        *_what_was_tried(trial),
        *([_what_it_saved(role)] if role else []),
        _what_that_changed(alone, ended),
    ]


def role_of(trial: TrialRecord, fqn: str) -> RoleGain | None:
    """The role of a layer, or None where the trial had none for it."""
    return next((x for x in trial.roles if fqn in x.fqns), None)


def _what_was_tried(trial: TrialRecord) -> list[str]:
    plans, steps = trial.results, sum(x.rounds for x in trial.results)
    text = f"Then {len(plans)} whole plans ran in turns in {steps} training steps."
    winner = winner_of(trial)
    if winner is None:
        return [text]
    kept = f"The one that was kept converts {winner.layers} layers"
    return [
        text,
        f"{kept} and took {winner.step_ms:.2f} ms a step{_times_faster(winner)}.",
    ]


def _times_faster(result: TrialResult) -> str:
    if not result.converted:
        return "; no other was clearly faster"
    high = "unbounded" if result.speedup_high is None else f"{result.speedup_high:.3f}"
    bounds = f"between {result.speedup_low:.3f} and {high}"
    return f", {result.speedup:.3f} times faster than high precision ({bounds})"


def _what_it_saved(role: RoleGain) -> str:
    many = f" ({len(role.fqns)} layers)" if len(role.fqns) > 1 else ""
    alone = _saving(role.alone_ms, role.alone_spread_ms)
    text = f"By its own timing, converting {role.name}{many} {alone} a training step"
    if role.in_step_ms is None:
        return f"{text}; too few steps were counted to tell what it does there."
    in_step = _saving(role.in_step_ms, role.in_step_spread_ms or 0.0)
    return f"{text}; in whole steps, beside the rest of the plan that was kept, it {in_step}."


def _saving(ms: float, spread: float) -> str:
    """Two standard deviations, as everywhere."""
    verb = "saves" if ms >= 0 else "costs"
    return f"{verb} {abs(ms):.3f} ± {2 * spread:.3f} ms"


def _what_that_changed(alone: Decision, ended: Decision) -> str:
    def where(decision: Decision) -> str:
        converted = decision.verdict is Verdict.CONVERTED
        return "converted" if converted else "in high precision"

    if alone.verdict is ended.verdict:
        return f"So it is {where(ended)}, as by its own timing."
    return (
        f"By its own timing it would be {where(alone)}; it is {where(ended)}, since "
        f"{ended.reason.sentence}."
    )
