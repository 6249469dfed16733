"""The decisions for one model, and what a trial of whole plans makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from fp8tune.decision.coverage import Coverage  # noqa: TC001
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Decision, Verdict

# The codec reads the types of the fields while it runs.
from fp8tune.decision.trials import GATHER, TrialRecord, TrialResult

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Decisions", "after_trial", "verdicts_after", "with_uncounted"]

_Plan = TypeVar("_Plan", bound="Decisions")


@dataclass(frozen=True)
class Decisions:
    """The decisions for one model, in model order, and what they are true of.

    Attributes:
        decisions: one per Linear or grouped GEMM, those left out included.
        recipe: name of the recipe that was measured, or names with commas between.
        reference: name of the dtype that the recipe is made to be compared with.
        emulated: the device had no GEMMs for the recipe and emulated them.
        timing: "eager" or "compiled".
        environment: sorted (field, value) pairs of hardware and software.
        trial: what whole training steps measured, or None if there was no trial.
        coverage: what candidates are of the step's matrix products, or None if nobody
            counted.
    """

    decisions: tuple[Decision, ...]
    recipe: str
    reference: str
    emulated: bool
    timing: str
    environment: tuple[tuple[str, str], ...]
    trial: TrialRecord | None = None
    coverage: Coverage | None = None

    @property
    def trials(self) -> tuple[TrialResult, ...]:
        """What each plan of the trial measured, the fastest first; empty without one."""
        return self.trial.results if self.trial else ()

    @cached_property
    def by_name(self) -> dict[str, Decision]:
        """Each decision by the name of its Linear."""
        return {x.fqn: x for x in self.decisions}

    @property
    def timed_against(self) -> str:
        """The dtypes in which reference GEMMs ran: autocast's, or else the inputs'."""
        timed = (x for x in self.decisions if x.reference_ms is not None)
        shapes = [signature.shape for x in timed for signature, _ in x.signatures]
        ran = dict.fromkeys(x.autocast_dtype or x.input_dtype for x in shapes)
        return " or ".join(ran) or self.reference

    @property
    def converted_fqns(self) -> list[str]:
        """Names of the Linears that are converted, in model order."""
        return [x.fqn for x in self.decisions if x.verdict is Verdict.CONVERTED]

    @property
    def gathers(self) -> bool:
        """Whether FSDP2 gathers what is converted in float8, since a trial chose that."""
        return self.trial is not None and GATHER in self.trial.converted

    @property
    def switched_on(self) -> list[str]:
        """Names of all that is converted, with GATHER where the trial chose it."""
        return [*self.converted_fqns, *([GATHER] if self.gathers else [])]

    @property
    def reference_fqns(self) -> list[str]:
        """Names of the Linears that stay in high precision, in model order."""
        return [x.fqn for x in self.decisions if x.verdict is Verdict.REFERENCE]


def with_uncounted(plan: _Plan, uncounted: Iterable[tuple[str, Reason]]) -> _Plan:
    """The plan with what became of calls that did not count, beside never called.

    Args:
        plan: as decided.
        uncounted: (name, reason) on each rank, in the order of the ranks.
    """
    known: dict[str, Reason] = {}
    for fqn, reason in uncounted:
        known.setdefault(fqn, reason)

    def told(decision: Decision) -> Decision:
        uncalled = (Reason.NEVER_CALLED, Reason.NO_GROUPED_GEMM)
        called = decision.reason in uncalled and decision.fqn in known
        return replace(decision, reason=known[decision.fqn]) if called else decision

    return replace(plan, decisions=tuple(map(told, plan.decisions)))


def after_trial(plan: _Plan, trial: TrialRecord) -> _Plan:
    """The per-layer plan with the verdicts of the winning trial plan."""
    decisions = verdicts_after(plan.decisions, trial, plan.recipe)
    return replace(plan, decisions=decisions, trial=trial)


def verdicts_after(
    decisions: tuple[Decision, ...], trial: TrialRecord, recipe: str
) -> tuple[Decision, ...]:
    """What layers measured alone, with the verdicts of the winning trial plan.

    Layers that were timed and that the winner does not convert stay in high precision.

    Args:
        decisions: of each layer alone.
        trial: how whole training steps ended.
        recipe: what a layer is converted to that came near no recipe alone.
    """
    won, unclear = frozenset(trial.converted), frozenset(trial.unclear)
    return tuple(
        _converted(x, recipe) if x.fqn in won else _left(x, x.fqn in unclear)
        for x in decisions
    )


def _converted(decision: Decision, recipe: str) -> Decision:
    if decision.verdict is Verdict.CONVERTED:
        return decision
    return replace(
        decision,
        verdict=Verdict.CONVERTED,
        reason=Reason.FASTER_IN_TRAINING,
        recipe=decision.nearest or recipe,
    )


def _left(decision: Decision, unclear: bool) -> Decision:
    if decision.verdict is Verdict.REFERENCE:
        return decision
    reason = Reason.UNCLEAR_IN_TRAINING if unclear else Reason.SLOWER_IN_TRAINING
    return replace(decision, verdict=Verdict.REFERENCE, reason=reason, recipe=None)
