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

The phases are driven by one pre-hook on the model itself, so it does not matter whether
the wrapper or the model is called. A phase only changes between training steps, while no
backward pass is outstanding: activation checkpointing would otherwise recompute a layer
as something else than it was.
"""

import logging
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from fp8tune import report
from fp8tune.compiling import (
    apply_compile,
    gate_calls,
    refuse_compiling,
)
from fp8tune.config import OnShapeChange
from fp8tune.errors import PhaseError, PlanMismatchError
from fp8tune.options import Options
from fp8tune.passes import in_backward
from fp8tune.phases import NEXT_PHASES, Phase
from fp8tune.pipeline import Pipeline
from fp8tune.plan import Plan
from fp8tune.recipes import Recipe, Recipes
from fp8tune.roles import roles_of
from fp8tune.trial_run import TrialRun

__all__ = ["Phase", "Tuner"]

logger = logging.getLogger("fp8tune")

# So many forwards with gradients and no backward are no accident.
_FORWARDS_BEFORE_WARNING = 10

# Forwards that freeze, settle or only find out that a step is complete.
_STEPS_TO_SPARE = 10


class Tuner:
    """Everything that AutoFloat8 does besides looking like the model.

    Args:
        module: the model.
        device: where it is.
        recipes: what its Linears may be converted to.
        options: the rest.

    Attributes:
        phase: where the tuner is.
        plan: the decisions, or None while there are none.
        target: what to call for the model: itself, or what ``compile`` returned.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        recipes: Recipes,
        options: Options,
    ) -> None:
        self.phase: Phase | None = None
        self.plan: Plan | None = None
        self.target: Callable[..., Any] = module
        self._module = module
        self._recipes = recipes
        self._options = options
        self._forwards_without_step = 0
        self._pipeline = Pipeline(module, device, recipes, options)
        self._trial: TrialRun | None = None
        self._ungate: Callable[[], None] = _nothing
        self._driver = module.register_forward_pre_hook(self._on_forward)
        self._start()

    def _start(self) -> None:
        pipeline, given = self._pipeline, self._options.plan
        if given is not None:
            self._finish(given)
            return
        if not pipeline.candidates:
            self._say(logging.WARNING, report.no_candidates_line(pipeline.screened))
            self._finish(pipeline.decide())
            return
        self.plan = pipeline.cached_plan()
        if self.plan is None:
            self._begin_warmup()
            return
        pipeline.convert(self.plan.float8_fqns)
        pipeline.watch(keep_tensors=False)
        self._enter(Phase.REPLAYED)
        self._say(logging.INFO, f"plan from the cache, nothing is timed\n{self.plan}")

    def _begin_warmup(self) -> None:
        pipeline = self._pipeline
        self.plan = None
        pipeline.convert([x.fqn for x in pipeline.candidates])
        pipeline.watch(keep_tensors=True)
        self._enter(Phase.WARMUP)
        line = report.start_line(pipeline.screened, self._recipes.name)
        self._say(logging.INFO, line)

    def _end_warmup(self) -> None:
        plan = self._pipeline.decide()
        self._say(logging.INFO if plan.float8_fqns else logging.WARNING, plan)
        config = self._options.config
        steps = self._pipeline.trial_steps
        roles = roles_of(plan.decisions, config.min_speedup)
        if not steps or not roles:
            self._finish(plan)
            return
        self._stop_watching(plan)
        self._trial = TrialRun(
            plan,
            roles,
            self._pipeline,
            self._options,
            max_steps=steps,
            say=self._say,
        )
        self._enter(Phase.TRIAL)
        self._compile(self._pipeline.assigned)
        self.target, self._ungate = gate_calls(self._module, self.target, self._gate)
        self._trial.follow(self._module)

    def _end_trial(self) -> Plan:
        assert self._trial is not None
        self.plan = self._trial.close()
        self._trial = None
        self._ungate()
        self._enter(Phase.FROZEN)
        return self.plan

    def _gate(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call`` with the trial around it, while there is one."""

        def gate(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                refuse_compiling()
            training = self._module.training and torch.is_grad_enabled()
            if not training or in_backward():
                return call(*args, **kwargs)
            if self._trial and self._trial.before():
                self._end_trial()
            output = call(*args, **kwargs)
            if self._trial:
                self._trial.after(output)
            return output

        return gate

    def _stop_watching(self, plan: Plan) -> None:
        self._pipeline.convert(plan.float8_fqns)
        self._pipeline.capture.close()
        self._driver.remove()

    def _compile(self, recipes: Collection[Recipe]) -> None:
        compile = self._options.compile
        self.target = apply_compile(self._module, compile, recipes, self._say)

    def _finish(self, plan: Plan) -> None:
        self._stop_watching(plan)
        self.plan = plan
        self._enter(Phase.FROZEN)
        self._compile([recipe for _, recipe in self._pipeline.conversions()])

    def _say(self, level: int, what: object) -> None:
        """Log, on the first rank only."""
        if self._options.ranks.first:
            logger.log(level, "%s", what)

    def _enter(self, phase: Phase) -> None:
        if phase not in NEXT_PHASES[self.phase]:
            raise PhaseError(f"cannot go from {self.phase} to {phase}")
        self.phase = phase

    def _on_forward(self, module: nn.Module, args: object) -> None:
        del args
        if torch.compiler.is_compiling():
            refuse_compiling()
        if in_backward():  # the model itself is being recomputed
            return
        training = module.training and torch.is_grad_enabled()
        self._pipeline.capture.begin_forward(training=training)
        if training and self.phase is Phase.WARMUP:
            self._warmup_forward()
        elif training and self.phase is Phase.REPLAYED:
            self._replayed_forward()

    def _warmup_forward(self) -> None:
        capture, wanted = self._pipeline.capture, self._options.warmup_steps
        if capture.steps >= wanted and not capture.waiting:
            self._end_warmup()
            return
        self._forwards_without_step += 1
        expected = wanted + _FORWARDS_BEFORE_WARNING
        if self._forwards_without_step == expected:
            line = report.stuck_line(expected, capture.steps, capture.waiting)
            self._say(logging.WARNING, line)

    def _replayed_forward(self) -> None:
        capture = self._pipeline.capture
        if not capture.called or capture.waiting:
            return
        assert self.plan is not None
        change = report.shape_change(self._pipeline.layers(), self.plan)
        if change is None:
            self._finish(self.plan)
            return
        match self._options.config.on_shape_change:
            case OnShapeChange.RAISE:
                raise PlanMismatchError(
                    f"{change}; the cached plan was made for other shapes. Set "
                    "on_shape_change to 'retune' or 'warn', or use another cache file"
                )
            case OnShapeChange.WARN:
                self._say(logging.WARNING, f"{change}; the cached plan is kept")
                self._finish(self.plan)
            case OnShapeChange.RETUNE:
                self._say(logging.INFO, f"{change}; tuning again")
                self._begin_warmup()
                self._pipeline.capture.begin_forward(training=True)

    def freeze(self) -> Plan:
        """Time what was seen so far, decide, revert, compile; see AutoFloat8.freeze."""
        if self.phase is Phase.FROZEN and self.plan is not None:
            return self.plan
        trial = self._trial
        waiting = trial.waiting if trial else self._pipeline.capture.waiting
        if waiting:
            raise PhaseError(
                f"freeze() while {waiting} forward passes wait for their backward, which "
                "would recompute layers as something else than they were; call it after "
                "backward(), or delete outputs that need none"
            )
        if trial:
            return self._end_trial()
        plan = self.plan
        if plan is None:
            plan = self._pipeline.decide()
            self._say(logging.INFO if plan.float8_fqns else logging.WARNING, plan)
        self._finish(plan)
        return plan

    def run(self, training_step: Callable[[], object]) -> Plan:
        """Repeat a training step until the plan is frozen; see AutoFloat8.trial."""
        most = self._options.warmup_steps + self._pipeline.trial_steps
        for _ in range(most + _STEPS_TO_SPARE):
            if self.phase is Phase.FROZEN and self.plan is not None:
                return self.plan
            training_step()
        raise PhaseError(f"the plan is not frozen after all its steps: {self.status()}")

    @property
    def converted(self) -> list[nn.Linear]:
        """The Linears that are converted right now."""
        return list(self._pipeline.converted.values())

    @property
    def conversions(self) -> list[tuple[nn.Linear, Recipe]]:
        """The same, each with what it is converted to."""
        return self._pipeline.conversions()

    @property
    def linears(self) -> int:
        """How many Linears the model has."""
        return len(self._pipeline.screened)

    def status(self) -> str:
        """The table, or how far tuning has come."""
        if self.plan is not None:
            return str(self.plan)
        if self._trial is not None:
            return self._trial.status()
        steps, wanted = self._pipeline.capture.steps, self._options.warmup_steps
        return f"tuning: {steps} of {wanted} warmup steps seen\n" + report.start_line(
            self._pipeline.screened, self._recipes.name
        )


def _nothing() -> None:
    """There is no gate to remove."""
