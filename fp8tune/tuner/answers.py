"""What others may ask of a tuner, in any phase."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fp8tune.errors import PhaseError
from fp8tune.report import messages
from fp8tune.report.stuck import waiting_line
from fp8tune.tuner.phases import Phase
from fp8tune.tuner.subject import subject_of_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import nn

    from fp8tune.plan.plan import Plan
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.recipes.registry import Recipes
    from fp8tune.report.subject import Subject
    from fp8tune.tuner.options import Options
    from fp8tune.tuner.pace import Pace
    from fp8tune.tuner.pipeline import Pipeline
    from fp8tune.tuner.target import Target
    from fp8tune.tuner.trying import Trying

__all__ = ["Answers"]


class Answers:
    """The questions; a Tuner fills in what they are answered from.

    Attributes:
        phase: where the tuner is.
        plan: the decisions, or None while there are none.
    """

    phase: Phase | None
    plan: Plan | None
    _options: Options
    _recipes: Recipes
    _pipeline: Pipeline
    _pace: Pace
    _target: Target
    _trial: Trying

    @property
    def converted(self) -> list[nn.Linear]:
        """The Linears that are converted right now."""
        return list(self._pipeline.conversions.converted.values())

    @property
    def conversions(self) -> list[tuple[nn.Linear, Recipe]]:
        """The same, each with what it is converted to."""
        return self._pipeline.conversions.pairs()

    @contextmanager
    def reference(self) -> Generator[None]:
        """Inside the block every layer runs in high precision."""
        with self._pipeline.conversions.suspended():
            yield
        if self.phase is Phase.FROZEN and self.plan and self._pipeline.conversions.lost:
            self.plan = self._pipeline.confirmed(self.plan)

    @property
    def linears(self) -> int:
        """How many Linears the model has."""
        return len(self._pipeline.screened)

    @property
    def subject(self) -> Subject | None:
        """What a page shows, or None while there is no plan."""
        return self.plan and subject_of_plan(self.plan, self._pipeline.run)

    @property
    def target(self) -> Callable[..., Any]:
        """What to call for the model: itself, or what ``compile`` returned."""
        return self._target.call

    def status(self) -> str:
        """The table, or how far tuning has come."""
        if self.plan is not None:
            return str(self.plan)
        if self.phase is Phase.ABANDONED:
            return "tuning was abandoned; the model is in high precision"
        if self._trial.run:
            return self._trial.run.status()
        seen, wanted = self._pace.steps, self._options.watched_steps
        return f"tuning: {seen} of {wanted} warmup steps seen\n{self._start_line}"

    def _refuse_if_waiting(self) -> None:
        trial, capture = self._trial.run, self._pipeline.capture
        waiting = trial.waiting if trial else capture.waiting
        if not trial and capture.recomputes:
            waiting += capture.retained
        if waiting:
            raise PhaseError(waiting_line(waiting))

    @property
    def _start_line(self) -> str:
        return messages.start_line(self._pipeline.screened, self._recipes.name)
