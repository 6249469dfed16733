"""When the stages run: the phases of tuning inside a training run.

::

    start --every signature in the cache--> REPLAYED --shapes as planned--> FROZEN
      |                                        |
      |                                        +-------other shapes---> WARMUP
      +--candidates--> WARMUP --warmup_steps steps, or freeze()-------> FROZEN
      +--no candidate, or a plan was given----------------------------> FROZEN

In WARMUP every candidate runs converted and is watched; at the freeze each signature is
timed, and layers that are not clearly faster are reverted. In REPLAYED the layers are
those of a cached plan, and the first training step shows whether its shapes still hold.

The phases are driven by calls of the model and of its candidates, so it does not matter
whether the wrapper, the model or another of its methods is called. A phase only changes
between training steps, while no backward pass is outstanding: activation checkpointing
would otherwise recompute a layer as something else than it was.
"""

import logging
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from fp8tune.errors import PhaseError
from fp8tune.model.capture import Capture
from fp8tune.plan.plan import Plan
from fp8tune.ranks.joining import joining
from fp8tune.recipes.registry import Recipes
from fp8tune.report import messages
from fp8tune.report.stuck import OPAQUE_LINE
from fp8tune.trial.roles import roles_of, sizes_vary
from fp8tune.tuner.answers import Answers
from fp8tune.tuner.ending import say_at_end
from fp8tune.tuner.first_forward import FirstForward
from fp8tune.tuner.options import Options
from fp8tune.tuner.pace import Pace
from fp8tune.tuner.phases import NEXT_PHASES, Phase
from fp8tune.tuner.pipeline import Pipeline
from fp8tune.tuner.replay import Replay, replay
from fp8tune.tuner.subject import write_page
from fp8tune.tuner.target import Target
from fp8tune.tuner.trying import Trying
from fp8tune.tuner.warmup import WarmUp

__all__ = ["Phase", "Tuner"]

logger = logging.getLogger("fp8tune")

# Forwards that freeze, settle or only find out that a step is complete.
_STEPS_TO_SPARE = 10


class Tuner(Answers):
    """Everything that AutoFloat8 does besides looking like the model.

    Args:
        module: the model.
        device: where it is.
        recipes: what its Linears may be converted to.
        options: the rest.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        recipes: Recipes,
        options: Options,
    ) -> None:
        self.phase = None
        self.plan = None
        self._module = module
        self._recipes = recipes
        self._options = options
        self._target = Target(module, options.compile, self._say)
        self._decided: Plan | None = None  # and not yet compiled
        self._pipeline = Pipeline(module, device, recipes, options)
        self._pace = Pace(self._pipeline, options, self._say)
        self._trial = Trying(
            module,
            self._pipeline,
            options,
            self._target,
            say=self._say,
            settled=self._end_trial,
        )
        self._warmup: WarmUp | None = None
        if options.ranks.first:
            say_at_end(self, self._pace.progress)
        self._first = FirstForward(module, self._pipeline, options.ranks, self._say)
        self._start()

    def _start(self) -> None:
        pipeline, given = self._pipeline, self._options.plan
        if given is not None:
            self._finish(given)
            return
        if not pipeline.candidates:
            self._say(logging.WARNING, messages.no_candidates_line(pipeline.screened))
            plan = pipeline.decide()
            assert plan is not None
            self._finish(plan)
            return
        self.plan = pipeline.cached_plan()
        if self.plan is None:
            self._begin_warmup()
            return
        pipeline.convert(self.plan.converted_fqns)
        pipeline.watch(self._on_pass, self._pace.gradient_came, keep_tensors=False)
        self._enter(Phase.REPLAYED)
        self._say(logging.INFO, f"plan from the cache, nothing is timed\n{self.plan}")

    def _begin_warmup(self) -> None:
        self.plan = self._decided = None
        if self._options.warmup_steps or not self._first.may_come():
            self._warm_up(keep_tensors=True)
        else:
            came = self._pace.gradient_came
            self._pipeline.watch(self._on_pass, came, keep_tensors=True)
            self._first.wait(self._decide_at_once)
        self._pace.restart()
        self._enter(Phase.WARMUP)
        self._say(logging.INFO, self._start_line)

    def _decide_at_once(self, dry: Capture | None) -> Callable[..., Any]:
        """Before the first forward, or as ever where it could not be run dry."""
        if dry is None:
            self._warm_up(keep_tensors=True)
        else:
            pipeline = self._pipeline
            pipeline.capture.resume(*dry.counts(), pipeline.candidates)
            self._pace.restart(1)
            self._end_warmup(wait=True, under_way=False)
        return self._target.call

    def _end_warmup(
        self, *, wait: bool, trial: bool = True, under_way: bool = True
    ) -> None:
        """Decide, compile, and freeze or try plans; None of it if compiling raises."""
        plan = self._decided or self._pipeline.decide(wait=wait)
        if plan is None:  # not every rank has come
            return
        if self._decided is None:
            self._say(logging.INFO if plan.converted_fqns else logging.WARNING, plan)
        self._decided = plan
        capture = self._pipeline.capture
        elsewhere = capture.elsewhere
        if elsewhere:
            self._target.say_bypassed()
        elif capture.opaque and self._pipeline.trial_steps:
            self._say(logging.WARNING, OPAQUE_LINE)
        self._stop_watching(plan.converted_fqns)
        # Ranks that are out of data cannot take part in a trial, and without the model's
        # forward there is no place from which steps could be timed.
        tried = trial and wait and not (elsewhere or capture.opaque)
        steps = self._pipeline.trial_steps if tried else 0
        roles = roles_of(plan.decisions, self._pace.steps)
        run = self._pipeline.run
        ragged = sizes_vary(run.layers if run else (), self._pace.steps)
        try:
            if steps and roles:
                self._trial.begin(
                    plan, roles, steps, ragged=ragged, under_way=under_way
                )
                self._enter(Phase.TRIAL)
            else:
                self._finish(plan)
        except BaseException:
            self._warm_up(keep_tensors=False)  # the next forward tries again
            raise

    def _warm_up(self, *, keep_tensors: bool) -> None:
        pipeline = self._pipeline
        self._warmup = WarmUp(self._module, pipeline, self._options, self._say)
        began, came = self._on_pass, self._pace.gradient_came
        pipeline.watch(began, came, keep_tensors=keep_tensors)

    def _end_trial(self) -> Plan:
        self.plan = self._trial.end()
        self._pipeline.steps.close()
        self._enter(Phase.FROZEN)
        return self.plan

    def _stop_watching(self, converted: Collection[str]) -> None:
        self._first.close()
        if self._warmup:
            self._warmup.close()
        self._pipeline.convert(converted)
        self._pipeline.capture.close()

    def _finish(self, plan: Plan) -> None:
        plan = self._pipeline.confirmed(plan)
        self._stop_watching(plan.switched_on)
        self._target.compile(self._pipeline.conversions.chosen())
        self._pipeline.steps.close()
        self.plan = plan
        self._enter(Phase.FROZEN)

    def _say(self, level: int, what: object) -> None:
        """Log, on the first rank only."""
        if self._options.ranks.first:
            logger.log(level, "%s", what)

    def _enter(self, phase: Phase) -> None:
        if phase not in NEXT_PHASES[self.phase]:
            raise PhaseError(f"cannot go from {self.phase} to {phase}")
        self.phase = self._pace.progress.phase = phase
        settled = phase in (Phase.FROZEN, Phase.ABANDONED)
        self._pipeline.conversions.keep_copies_plain(not settled)
        write_page(self._options.html, self.subject)

    def _on_pass(self) -> None:
        """Called before each pass of training, in warmup and while a plan is replayed."""
        self._first.missed()
        warming_up = self.phase is Phase.WARMUP
        wanted = self._options.watched_steps if warming_up else 1
        if not self._pace.pass_begins(wanted):
            return
        wait = self._options.ranks.size == 1 or not joining()
        if warming_up:
            self._end_warmup(wait=wait)
        else:
            self._end_replay(wait=wait)

    def _end_replay(self, *, wait: bool, keep: bool = False) -> None:
        plan = self.plan
        assert plan is not None
        verdict = replay(
            self._options.ranks,
            lambda: messages.shape_change(self._pipeline.layers(), plan),
            self._options.config.on_shape_change,
            self._say,
            wait=wait,
            keep=keep,
        )
        if verdict is Replay.HOLDS:
            self._finish(plan)
        elif verdict is Replay.RETUNE:
            self._begin_warmup()

    def freeze(self) -> Plan:
        """Time what was seen so far, decide, revert, compile; see AutoFloat8.freeze."""
        if self.phase is Phase.FROZEN and self.plan is not None:
            return self.plan
        if self.phase is Phase.ABANDONED:
            raise PhaseError("tuning was abandoned; wrap the model anew to tune it")
        trial = self._trial.run
        self._refuse_if_waiting()
        if trial:
            return self._end_trial()
        self._options.ranks.call(self._pipeline.steps.begun)
        if self.phase is Phase.REPLAYED:
            self._end_replay(wait=True, keep=True)
        else:
            self._end_warmup(wait=True, trial=False)
        assert self.plan is not None
        return self.plan

    def end_of_run(self) -> None:
        """Training is over: say so where tuning is not, and end it.

        What was never measured is reverted, and a trial ends with the best plan so far.
        Collective in a trial; nothing may be differentiated afterwards.
        """
        progress = self._pace.progress
        if self.phase is Phase.WARMUP:
            progress.seen = self._pace.over
        line = progress.line()
        if line is not None:
            self._say(logging.WARNING, line)
        if self.phase is Phase.WARMUP:
            self.abandon()
        elif self.phase is Phase.TRIAL:
            self._end_trial()

    def abandon(self) -> None:
        """Give the model back in high precision; see AutoFloat8.abandon."""
        if self.phase is Phase.ABANDONED:
            return
        self._trial.give_up()
        self._stop_watching(())
        self._pipeline.steps.close()
        self._target.abandon()
        self.plan = self._decided = None
        self._enter(Phase.ABANDONED)

    def run(self, training_step: Callable[[], object]) -> Plan:
        """Repeat a training step until the plan is frozen; see AutoFloat8.trial."""
        most = self._options.warmup_steps + self._pipeline.trial_steps
        for _ in range(most + _STEPS_TO_SPARE):
            if self.phase is Phase.FROZEN and self.plan is not None:
                return self.plan
            training_step()
        raise PhaseError(f"the plan is not frozen after all its steps: {self.status()}")
