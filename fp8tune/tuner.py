"""When the stages run: the phases of tuning inside a training run.

::

    start --every signature in the cache--> REPLAYED --shapes as planned--> FROZEN
      |                                        |
      |                                        +-------other shapes---> WARMUP
      +--candidates--> WARMUP --warmup_steps steps, or freeze()-------> FROZEN
      +--no candidate-------------------------------------------------> FROZEN

In WARMUP every candidate runs converted and is watched; at the freeze each signature is
timed, and layers that are not clearly faster are reverted. In REPLAYED the layers are
those of a cached plan, and the first training step shows whether its shapes still hold.

The phases are driven by one pre-hook on the model itself, so it does not matter whether
the wrapper or the model is called. A phase only changes between training steps, while no
backward pass is outstanding: activation checkpointing would otherwise recompute a layer
as something else than it was.
"""

import logging
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from fp8tune import report
from fp8tune.capture import in_backward
from fp8tune.compiling import apply_compile, refuse_compiling
from fp8tune.config import OnShapeChange
from fp8tune.errors import PhaseError, PlanMismatchError
from fp8tune.pipeline import Options, Pipeline
from fp8tune.plan import Plan
from fp8tune.recipes import Recipe
from fp8tune.records import Layer

__all__ = ["Phase", "Tuner"]

logger = logging.getLogger("fp8tune")

# So many forwards with gradients and no backward are no accident.
_FORWARDS_BEFORE_WARNING = 10


class Phase(StrEnum):
    """Where the tuner is; see the picture above."""

    WARMUP = "warmup"
    REPLAYED = "replayed"
    FROZEN = "frozen"


_NEXT: dict[Phase | None, frozenset[Phase]] = {
    None: frozenset(Phase),
    Phase.WARMUP: frozenset({Phase.FROZEN}),
    Phase.REPLAYED: frozenset({Phase.WARMUP, Phase.FROZEN}),
    Phase.FROZEN: frozenset(),
}


class Tuner:
    """Everything that AutoFloat8 does besides looking like the model.

    Args:
        module: the model.
        device: where it is.
        recipe: what its Linears may be converted to.
        options: the rest.

    Attributes:
        phase: where the tuner is.
        plan: the decisions, or None while there are none.
        target: what to call for the model: itself, or what ``compile`` returned.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, recipe: Recipe, options: Options
    ) -> None:
        self.phase: Phase | None = None
        self.plan: Plan | None = None
        self.target: Callable[..., Any] = module
        self._module = module
        self._recipe = recipe
        self._options = options
        self._forwards_without_step = 0
        self._pipeline = Pipeline(module, device, recipe, options)
        self._driver = module.register_forward_pre_hook(self._on_forward)
        self._start()

    def _start(self) -> None:
        pipeline = self._pipeline
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
        line = report.start_line(pipeline.screened, self._recipe.name)
        self._say(logging.INFO, line)

    def _finish(self, plan: Plan) -> None:
        self._pipeline.convert(plan.float8_fqns)
        self._pipeline.capture.close()
        self._driver.remove()
        self.plan = plan
        self._enter(Phase.FROZEN)
        self.target = apply_compile(self._module, self._options.compile)

    def _say(self, level: int, what: object) -> None:
        """Log, on the first rank only."""
        if self._options.ranks.first:
            logger.log(level, "%s", what)

    def _enter(self, phase: Phase) -> None:
        if phase not in _NEXT[self.phase]:
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
            self.freeze()
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
        change = _shape_change(self._pipeline.layers(), self.plan)
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
        waiting = self._pipeline.capture.waiting
        if waiting:
            raise PhaseError(
                f"freeze() while {waiting} forward passes wait for their backward, which "
                "would recompute layers as something else than they were; call it after "
                "backward(), or delete outputs that need none"
            )
        plan = self.plan
        if plan is None:
            plan = self._pipeline.decide()
            self._say(logging.INFO if plan.float8_fqns else logging.WARNING, plan)
        self._finish(plan)
        return plan

    @property
    def converted(self) -> list[nn.Linear]:
        """The Linears that are converted right now."""
        return list(self._pipeline.converted.values())

    def status(self) -> str:
        """The table, or how far tuning has come."""
        if self.plan is not None:
            return str(self.plan)
        steps, wanted = self._pipeline.capture.steps, self._options.warmup_steps
        return f"tuning: {steps} of {wanted} warmup steps seen\n" + report.start_line(
            self._pipeline.screened, self._recipe.name
        )


def _shape_change(layers: Sequence[Layer], plan: Plan) -> str | None:
    """What the first call that the plan does not know was called with, or None."""
    for layer in layers:
        planned = [signature.shape for signature, _ in plan[layer.fqn].signatures]
        for signature, _ in layer.calls:
            if signature.shape not in planned:
                return report.shape_change_line(layer.fqn, planned, signature.shape)
    return None
