"""A trial on one model: from the per-layer plan to the one that training confirmed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fp8tune import report_trial
from fp8tune.dynamo import CompiledPlans
from fp8tune.roles import after_trial, start_of
from fp8tune.tournament import Role, Tournament, TrialPlan
from fp8tune.trial import Trial
from fp8tune.trial_records import TrialRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from fp8tune.options import Options
    from fp8tune.pipeline import Pipeline
    from fp8tune.plan import Plan

__all__ = ["TrialRun"]


class TrialRun:
    """Wires a tournament to a model's layers, its clock and Dynamo's cache.

    Args:
        proposed: the per-layer plan.
        roles: what can be converted.
        pipeline: converts layers.
        options: the arguments of AutoFloat8.
        max_steps: training steps that may be spent.
        say: logs on the first rank.
    """

    def __init__(
        self,
        proposed: Plan,
        roles: Sequence[Role],
        pipeline: Pipeline,
        options: Options,
        *,
        max_steps: int,
        say: Callable[[int, object], None],
    ) -> None:
        self._proposed = proposed
        self._pipeline = pipeline
        self._say = say
        self._compiled = CompiledPlans()
        config = options.config
        self._tournament = Tournament(
            roles,
            start_of(proposed.decisions, roles),
            confidence=config.confidence,
            min_speedup=config.min_speedup,
            max_steps=max_steps,
        )
        trained = pipeline.trained_parameters()
        clock = pipeline.clock()
        self._trial = Trial(
            self._tournament, trained, self._switch, clock, options.ranks
        )
        plans = len(self._tournament.order())
        say(logging.INFO, report_trial.trial_start_line(plans, max_steps))

    def _switch(self, plan: TrialPlan) -> None:
        if self._tournament.finished:
            self._compiled.keep_only(plan)
        self._compiled.activate(plan)
        self._pipeline.convert([fqn for role in plan for fqn in role.fqns])

    def follow(self, module: nn.Module) -> None:
        """Track the forward that is under way, whose backward must come first."""

        def ended(module: nn.Module, args: object, output: object) -> None:
            del module, args
            handle.remove()
            self._trial.after(output)

        handle = module.register_forward_hook(ended)

    def before(self) -> bool:
        """Called before each forward of a training step.

        Returns:
            Whether the trial is over.
        """
        self._trial.before()
        return self._trial.settled

    def after(self, output: Any) -> None:
        """Called with what that forward returned."""
        self._trial.after(output)

    @property
    def waiting(self) -> int:
        """Forward passes that wait for their backward."""
        return self._trial.passes.waiting

    def status(self) -> str:
        """How far the trial has come."""
        steps, plans = self._tournament.steps, len(self._tournament.order())
        return f"trying {plans} plans, {steps} training steps so far\n{self._proposed}"

    def close(self) -> Plan:
        """End here, with the best plan so far; lets go of the others' compiled code."""
        best = self._tournament.best
        if not self._trial.finished:
            self._compiled.keep_only(best)
            self._pipeline.convert([fqn for role in best for fqn in role.fqns])
        self._compiled.close()
        record = TrialRecord(
            tuple(fqn for role in best for fqn in role.fqns),
            tuple(fqn for role in self._tournament.unclear for fqn in role.fqns),
            self._tournament.results(self._trial.peaks),
        )
        plan = after_trial(self._proposed, record)
        if self._trial.finished:
            self._pipeline.remember_trial(record)
        self._log(plan)
        return plan

    def _log(self, plan: Plan) -> None:
        trial, tournament = self._trial, self._tournament
        self._say(logging.INFO, plan)
        line = report_trial.trial_end_line(
            tournament.steps, trial.seconds, tournament.lost_ms
        )
        self._say(logging.INFO, line)
