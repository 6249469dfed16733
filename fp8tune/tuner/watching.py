"""The accuracy of converted layers, measured again while training goes on.

Before the first pass of every ``watch_every``-th step the model runs once more on that
pass's batch: eagerly, without gradients, and without a trace. Hooks on the converted
layers, which are there only meanwhile, measure each of them at once, so nothing is kept.
Training is what it would be without the watch, bit by bit, until a layer is reverted.

Every rank checks in the same step, and what fell on one of them fell on all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from fp8tune.compiling.dynamo import allow_compilations
from fp8tune.config import OnQuality
from fp8tune.decision.watched import Fallen, decisions_after_checks, lowest
from fp8tune.model.copies import guard_copies
from fp8tune.model.graph_capture import GraphCapture
from fp8tune.model.no_trace import without_trace
from fp8tune.model.passes import Passes, in_backward
from fp8tune.model.steps import Steps
from fp8tune.ranks.joining import joining
from fp8tune.report import watch as messages
from fp8tune.timing.check import Checked, check_accuracy
from fp8tune.timing.memory import default_capture_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fp8tune.plan.plan import Plan
    from fp8tune.tuner.options import Options
    from fp8tune.tuner.pipeline import Pipeline
    from fp8tune.tuner.target import Target

__all__ = ["Watch"]

# Two optimizers of one model may step in each step.
_UNSEEN_STEPS = 2
_FEWEST_UNSEEN = 10

# Dynamo compiles what holds a layer once more, and once more for the block whose input
# takes no gradient.
_COMPILATIONS = 2


@dataclass(frozen=True)
class _Check:
    """What one rank found."""

    fallen: tuple[Fallen, ...]
    problem: str | None


class Watch:
    """Stands around the calls of a model whose plan is frozen.

    Args:
        module: the model.
        pipeline: converts candidates.
        options: how often to look, and what to do.
        target: what is called for the model.
        plan: the plan.
        say: logs on the first rank.
        changed: called with the plan after a check that found something.
    """

    def __init__(
        self,
        module: nn.Module,
        pipeline: Pipeline,
        options: Options,
        target: Target,
        plan: Plan,
        *,
        say: Callable[[int, object], None],
        changed: Callable[[Plan], object],
    ) -> None:
        self._module = module
        self._pipeline = pipeline
        self._options = options
        self._ranks = options.ranks
        self._plan = plan
        self._say = say
        self._changed = changed
        self._graph = GraphCapture()
        self._every = options.config.watch_every
        self._next = self._every
        self._steps = Steps(module, self._optimizer_stepped)
        self._passes = Passes(self._steps.saw_gradient)
        self._over = self._unseen = False
        self._found: dict[str, float] = {}
        target.gate(self._gate)
        self._unguard = guard_copies([module])

    def close(self) -> None:
        """Watch no more; calls go through."""
        self._over = True
        self._steps.close()
        self._unguard()

    def _gate(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def gate(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or self._over or not self._trains():
                return call(*args, **kwargs)
            if self._steps.begin():
                self._new_step(call, args, kwargs)
            this_pass = self._passes.open()
            output = call(*args, **kwargs)
            self._passes.ended(output, this_pass)
            return output

        return gate

    def _trains(self) -> bool:
        if not torch.is_grad_enabled() or in_backward():
            return False
        mode = self._module.training or self._pipeline.capture.trained_in_eval
        return mode and not self._graph.is_under_way()

    def _new_step(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Check what is due; no graph of an earlier step is of use after its step."""
        step = self._steps.completed
        if step < self._next:
            return
        wait = self._ranks.size == 1 or not joining()
        met = self._ranks.meet(
            lambda: self._check(step, partial(call, *args, **kwargs), (args, kwargs)),
            "a check of the accuracy",
            wait=wait,
        )
        if met is not None:
            self._next = step + self._every
            self._judge(step, met)

    def _check(self, step: int, run: Callable[[], object], inputs: Any) -> _Check:
        if any(isinstance(x, Iterator) for x in tree_leaves(inputs)):
            return _Check((), messages.ITERATOR)
        try:
            self._found = self._measure(run)
        except Exception as error:  # noqa: BLE001 - watching must not end training
            return _Check((), messages.failed(error))
        least, reverts = self._least_db, self._reverts
        fallen = [
            Fallen(fqn, db, least, step, reverts)
            for fqn, db in self._found.items()
            if db < least
        ]
        return _Check(lowest(fallen), None)

    def _measure(self, run: Callable[[], object]) -> dict[str, float]:
        budget = self._options.config.capture_bytes
        if budget is None:
            budget = default_capture_bytes(self._pipeline.device)
        compiled = self._options.compile is not False
        eagerly = (
            torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        )
        plainly = self._pipeline.conversions.gathered_plainly()
        with without_trace(self._module), plainly, eagerly:
            return check_accuracy(self._layers(), run, budget)

    def _layers(self) -> list[Checked]:
        return [
            Checked(fqn, linear, recipe, self._differentiates_input(fqn))
            for fqn, linear, recipe in self._pipeline.conversions.named()
        ]

    def _differentiates_input(self, fqn: str) -> bool:
        decision = self._plan.get(fqn)
        called = decision.signatures if decision else ()
        return not called or any(x.grad_input for x, _ in called)

    @property
    def _least_db(self) -> float:
        least = self._options.config.min_sqnr_db
        assert least is not None
        return least

    @property
    def _reverts(self) -> bool:
        return self._options.config.on_quality is OnQuality.REVERT

    def _judge(self, step: int, checks: list[_Check]) -> None:
        problem = next((x.problem for x in checks if x.problem), None)
        if problem:
            self._say(logging.WARNING, messages.stopped_line(step, problem))
            self.close()
            return
        fallen = lowest(x for check in checks for x in check.fallen)
        if fallen:
            self._act(step, fallen)
        else:
            self._say(logging.INFO, messages.checked_line(step, self._found))

    def _act(self, step: int, fallen: tuple[Fallen, ...]) -> None:
        reverts = self._reverts
        compiled = self._options.compile is not False
        ending = messages.STAYS
        if reverts:
            ending = messages.RECOMPILES if compiled else messages.REVERTED
        found = {x.fqn: x.sqnr_db for x in fallen}
        line = messages.fallen_line(step, found, self._least_db, ending)
        self._say(logging.WARNING, line)
        decisions = decisions_after_checks(self._plan.decisions, fallen)
        self._plan = replace(self._plan, decisions=decisions)
        if reverts:
            if compiled:
                allow_compilations(_COMPILATIONS * len(fallen))
            self._pipeline.convert(self._plan.switched_on)
        self._pipeline.remember_fallen(fallen)
        self._changed(self._plan)

    def _optimizer_stepped(self, since_pass: int) -> None:
        unseen = max(_UNSEEN_STEPS * self._every, _FEWEST_UNSEEN)
        if since_pass > unseen and not (self._unseen or self._over):
            self._unseen = True
            self._say(logging.WARNING, messages.unseen_line(since_pass))
