"""Tuning that goes on in another process, or begins anew in this one."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fp8tune.errors import PhaseError, PlanMismatchError
from fp8tune.plan.plan import Plan
from fp8tune.report import messages
from fp8tune.trial.roles import roles_of, sizes_vary
from fp8tune.tuner.checks import check_model, check_plan_recipe
from fp8tune.tuner.gathered import GatheringTuner
from fp8tune.tuner.moving import Moves, device_of
from fp8tune.tuner.phases import Phase
from fp8tune.tuner.state import MadeFrom, Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import nn

    from fp8tune.model.capture import Capture
    from fp8tune.recipes.registry import Recipes
    from fp8tune.tuner.options import Options

__all__ = ["ResumableTuner"]


class ResumableTuner(GatheringTuner):
    """A tuner whose state fits into a checkpoint, and that can begin anew."""

    # Training steps of the warmup that the trial's plan was made from.
    _warmed_up = 0

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        recipes: Recipes,
        options: Options,
    ) -> None:
        super().__init__(module, device, recipes, options)
        self._moves = Moves()
        self._moves.begin(self._pipeline)

    def _end_warmup(
        self, *, wait: bool, trial: bool = True, under_way: bool = True
    ) -> None:
        self._warmed_up = self._pace.steps
        super()._end_warmup(wait=wait, trial=trial, under_way=under_way)

    def state_dict(self) -> dict[str, Any]:
        """How far tuning has come; see AutoFloat8.tuning_state."""
        state: dict[str, Any] = {"phase": str(self.phase)}
        trial, run = self._trial.run, self._pipeline.run
        if self.plan is not None:
            state["plan"] = self.plan.to_dict()
        elif trial is not None and run is not None:
            state["plan"] = trial.proposed.to_dict()
            state["made_from"] = MadeFrom.of(run, self._warmed_up).dump()
            state["trial"] = trial.state_dict()
        elif self.phase is Phase.WARMUP:
            capture = self._pipeline.capture
            state["seen"] = Seen.of(capture, self._pace.over).dump()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; see AutoFloat8.load_tuning_state."""
        phase = Phase(state["phase"])
        plan = Plan.from_dict(state["plan"], "the state") if "plan" in state else None
        if self.phase is Phase.FROZEN and self.plan == plan:
            return
        self._refuse_if_begun()
        match phase:
            case Phase.ABANDONED:
                self.abandon()
            case Phase.WARMUP:
                self._resume_warmup(Seen.load(state["seen"]))
            case Phase.TRIAL:
                assert plan is not None
                self._take_plan(plan)
                self._resume_trial(plan, state)
            case Phase.FROZEN | Phase.REPLAYED:
                assert plan is not None
                self._take_plan(plan)
                self._finish(plan)

    def _refuse_if_begun(self) -> None:
        fresh = self.phase in (Phase.WARMUP, Phase.REPLAYED)
        if not fresh or self._pipeline.steps.begun:
            raise PhaseError(messages.LATE_STATE.format(phase=self.phase))

    def _take_plan(self, plan: Plan) -> None:
        """Make layers what the plan has for them when they are converted."""
        check_plan_recipe(plan, self._recipes)
        mine = {x.fqn for x in self._pipeline.candidates}
        lost = [x for x in plan.converted_fqns if x not in mine]
        if lost or {x.fqn for x in plan.decisions} != {
            x.fqn for x in self._pipeline.screened
        }:
            raise PlanMismatchError(messages.other_state_line(lost))
        self._pipeline.conversions.assign(plan)

    def _resume_warmup(self, seen: Seen) -> None:
        if self.phase is Phase.REPLAYED:  # the steps go on as they would have
            self._begin_warmup()
        calls, recomputed = seen.counters()
        pipeline = self._pipeline
        pipeline.capture.resume(calls, recomputed, pipeline.candidates, seen.coverage)
        self._pace.restart(seen.steps)

    def _resume_trial(self, plan: Plan, state: Mapping[str, Any]) -> None:
        if self.phase is Phase.REPLAYED:
            self._begin_warmup()
        before = MadeFrom.load(state["made_from"])
        self._pipeline.restore(before.layers, before.measurements)
        assert self._pipeline.run is not None
        self._pipeline.run = replace(self._pipeline.run, coverage=plan.coverage)
        self._warmed_up = before.steps
        self._stop_watching(plan.converted_fqns)
        steps = self._pipeline.trial_steps
        roles = roles_of(plan.decisions, before.steps)
        if not (steps and roles):  # as where compile= is not given any more
            self._finish(plan)
            return
        ragged = sizes_vary(before.layers, before.steps)
        self._trial.begin(plan, roles, steps, ragged=ragged, under_way=False)
        self._enter(Phase.TRIAL)
        assert self._trial.run is not None
        compiled = self._options.compile is not False
        self._trial.run.load_state_dict(state["trial"], compiled=compiled)

    def _on_pass(self) -> None:
        now = self._moves.now(self._pipeline)
        if now is None:
            super()._on_pass()
        elif self._pace.pass_begins(0):
            self._move(now)

    def _decide_at_once(self, dry: Capture | None) -> Callable[..., Any]:
        now = self._moves.now(self._pipeline)
        if now is None:
            return super()._decide_at_once(dry)
        self._move(now)
        return self._module

    def _move(self, now: torch.device) -> None:
        """Begin anew where the layers run by now, or give tuning up."""
        line, goes_on = self._moves.line(self._pipeline, now)
        lost = self._pace.over or self._moves.often or not goes_on
        self._say(logging.WARNING if lost else logging.INFO, line)
        self.abandon()
        if goes_on:
            self._begin_anew(now, self._recipes.on(now))

    def moved(self) -> None:
        """Called after ``.to()`` and the like of the wrapper.

        A plan that was given where float8 is emulated is not emulated where it need not.
        """
        now = device_of(self._module)
        if self.phase is Phase.FROZEN and self._recipes.emulated and now:
            here = self._recipes.on(now)
            if not here.emulated:
                self._recipes = here
                self._pipeline.conversions.change_recipes(here)

    def retune(self) -> None:
        """Begin a new warmup; see AutoFloat8.retune."""
        self._refuse_if_waiting()
        if self._options.compile is not False and self.phase in (
            Phase.TRIAL,
            Phase.FROZEN,
        ):
            raise PhaseError(messages.COMPILED_RETUNE)
        run = self._pipeline.run
        self.abandon()
        self._begin_anew(check_model(self._module), self._recipes)
        if run is not None:
            self._pipeline.know(run.measurements)
        if self.phase is Phase.REPLAYED:
            self._begin_warmup()

    def _begin_anew(self, device: torch.device, recipes: Recipes) -> None:
        """Make all anew but this object, which others hold."""
        options = replace(self._options, plan=None)
        GatheringTuner.__init__(self, self._module, device, recipes, options)
        self._moves.begin(self._pipeline)
