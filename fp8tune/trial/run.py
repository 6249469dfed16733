"""A trial on one model: from the per-layer plan to the one that training confirmed."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from fp8tune.compiling.dynamo import CompiledPlans
from fp8tune.decision.decisions import after_trial
from fp8tune.report.trials import (
    BOUND_ELSEWHERE,
    OTHER_TRIAL,
    OVERLAPPING,
    UNSIZED,
    compile_line,
    endless_trial_line,
    trial_end_line,
    trial_start_line,
)
from fp8tune.timing.memory import PeakMemory
from fp8tune.trial.results import lost_ms, record_of
from fp8tune.trial.roles import start_of
from fp8tune.trial.search import Role, Search, TrialPlan
from fp8tune.trial.steps import Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Mapping, Sequence

    from torch import nn

    from fp8tune.config import TuneConfig
    from fp8tune.decision.trials import TrialRecord
    from fp8tune.model.steps import Steps
    from fp8tune.plan.plan import Plan
    from fp8tune.ranks.group import Ranks
    from fp8tune.timing.clock import Clock

__all__ = ["TrialRun"]


class Stages(Protocol):
    """What a trial needs of the stages on the model."""

    def convert(self, fqns: Collection[str]) -> None:
        """Make exactly these candidates converted and the others plain."""
        ...

    def clock(self) -> Clock:
        """What times the device's work."""
        ...

    @property
    def steps(self) -> Steps:
        """Where training steps begin."""
        ...

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that take gradients."""
        ...

    def remember_trial(self, trial: TrialRecord) -> None:
        """Save how the trial ended."""
        ...


class TrialRun:
    """Wires a search to a model's layers, its clock and Dynamo's cache.

    Args:
        proposed: the per-layer plan.
        roles: what can be converted.
        stages: converts layers, and more.
        config: see TuneConfig.
        ranks: who must run the same plans.
        max_steps: training steps that may be spent.
        say: logs on the first rank.
        ragged: steps differ in size.

    Attributes:
        proposed: as given.
    """

    def __init__(
        self,
        proposed: Plan,
        roles: Sequence[Role],
        stages: Stages,
        config: TuneConfig,
        ranks: Ranks,
        *,
        max_steps: int,
        say: Callable[[int, object], None],
        ragged: bool = False,
    ) -> None:
        self.proposed = proposed
        self._stages = stages
        self._say = say
        self._roles = roles
        self._compiled = CompiledPlans()
        self._search = Search(
            roles,
            start_of(proposed.decisions, roles),
            confidence=config.confidence,
            min_speedup=config.min_speedup,
            max_steps=max_steps,
            max_seconds=config.trial_seconds,
        )
        self._trial = Trial(
            self._search,
            stages.steps,
            self._switch,
            stages.clock(),
            ranks,
            memory=PeakMemory(x.device for x in stages.trained_parameters()),
            ragged=ragged,
        )
        self._trial.recomputes = any(
            signature.recompute
            for decision in proposed.decisions
            for signature, _ in decision.signatures
        )
        self._said = False
        say(logging.INFO, trial_start_line(len(roles), max_steps, config.trial_seconds))

    def _switch(self, plan: TrialPlan) -> None:
        if self._search.finished:
            self._compiled.keep_only(plan)
        self._activate(plan)

    def _activate(self, plan: TrialPlan) -> None:
        self._compiled.activate(plan)
        self._stages.convert([fqn for role in plan for fqn in role.fqns])

    @contextmanager
    def without_gradients(self, *, evaluates: bool) -> Generator[None]:
        """Around a forward without gradients, which runs the plan that leads.

        So its code is compiled for one plan and not for each that is tried, and no plan's
        step is charged for it. Where a forward waits for its backward, layers stay what
        they are.

        Args:
            evaluates: the model is in eval mode; otherwise it is a part of the loop.
        """
        trial = self._trial
        if trial.passes.waiting:
            yield
            return
        self._activate(self._search.leader)
        self._compiled.begin_call()
        try:
            yield
        finally:
            self._compiled.end_call()
            if trial.current is not None:
                self._activate(trial.current)
            if evaluates:
                trial.disturbed()

    def follow(self, module: nn.Module) -> None:
        """Track the forward that is under way, whose backward must come first."""

        def ended(module: nn.Module, args: object, output: object) -> None:
            del module, args
            handle.remove()
            self.after(output)

        self._compiled.begin_call()
        handle = module.register_forward_hook(ended)

    def before(self, inputs: object = ()) -> bool:
        """Called before each forward of a training step.

        Args:
            inputs: what it is called with.

        Returns:
            Whether the trial is over.
        """
        self._trial.before(inputs)
        self._compiled.begin_call()
        if self._search.seen.compile_s and not self._said:
            self._said = True
            self._say(logging.INFO, compile_line(self._search.seen.compile_s))
        return self._trial.settled

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, as plain lists, numbers and strings."""
        return self._search.state_dict() | self._trial.state_dict()

    def load_state_dict(
        self, state: Mapping[str, Any], *, compiled: bool = True
    ) -> None:
        """Go on from there, before the first step; of other roles it is not used."""
        if self._search.load_state_dict(state, compiled=compiled):
            self._trial.load_state_dict(state)
        else:
            self._say(logging.WARNING, OTHER_TRIAL)

    def recompute(self, call: Callable[[], Any]) -> Any:
        """A forward that a backward repeats, of the plan that is active."""
        self._compiled.begin_call()
        try:
            output = call()
        finally:
            self._compiled.end_call()
        self._trial.recomputed(output)
        return output

    @property
    def recomputes_whole(self) -> bool:
        """Whether forwards of training run without gradients and are repeated."""
        return self._trial.whole

    def after(self, output: Any) -> None:
        """Called with what that forward returned."""
        self._compiled.end_call()
        self._trial.after(output)

    @property
    def waiting(self) -> int:
        """Forward passes that wait for their backward."""
        return self._trial.passes.waiting

    def status(self) -> str:
        """How far the trial has come."""
        steps, plans = self._search.steps, len(self._search.order())
        return f"trying {plans} plans, {steps} training steps so far\n{self.proposed}"

    def give_up(self) -> None:
        """End without a plan; lets go of what was compiled."""
        self._trial.close()
        self._compiled.close()

    def close(self) -> Plan:
        """End here, with the best plan so far; lets go of the others' compiled code."""
        best = self._search.best
        gave_up = self._why_given_up()
        if gave_up:
            best = start_of(self.proposed.decisions, self._roles)
            self._say(logging.WARNING, gave_up)
        if gave_up or not self._trial.finished:
            self._compiled.keep_only(best)
            self._stages.convert([fqn for role in best for fqn in role.fqns])
        self._compiled.close()
        self._trial.close()
        record = record_of(self._search, best, self._trial.peaks)
        plan = after_trial(self.proposed, record)
        if self._search.seen.bound_elsewhere:
            self._say(logging.WARNING, BOUND_ELSEWHERE)
        if self._trial.finished and not gave_up:
            self._stages.remember_trial(record)
        self._log(plan)
        return plan

    def _why_given_up(self) -> str | None:
        trial = self._trial
        if trial.unsized:
            return UNSIZED
        if trial.overlapping:
            return OVERLAPPING
        return endless_trial_line(self._search.steps) if trial.stuck else None

    def _log(self, plan: Plan) -> None:
        trial, search = self._trial, self._search
        self._say(logging.INFO, plan)
        line = trial_end_line(search.steps, trial.seconds, lost_ms(search))
        self._say(logging.INFO, line)
