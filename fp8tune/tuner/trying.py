"""The trial around the calls of the model, while there is one."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fp8tune.model.graph_capture import GraphCapture
from fp8tune.model.passes import in_backward
from fp8tune.model.tracing import refuse_compiling
from fp8tune.trial.plans import gather_role
from fp8tune.trial.run import TrialRun

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from fp8tune.plan.plan import Plan
    from fp8tune.trial.search import Role
    from fp8tune.tuner.options import Options
    from fp8tune.tuner.pipeline import Pipeline
    from fp8tune.tuner.target import Target

__all__ = ["Trying"]


class Trying:
    """Compiles the model for a trial and stands around its calls until that is over.

    Args:
        module: the model.
        pipeline: converts candidates.
        options: the trial's bounds.
        target: what is called for the model.
        say: logs.
        settled: called before the first forward after the last step of the trial; ends it.
    """

    def __init__(
        self,
        module: nn.Module,
        pipeline: Pipeline,
        options: Options,
        target: Target,
        *,
        say: Callable[[int, object], None],
        settled: Callable[[], object],
    ) -> None:
        self._module = module
        self._pipeline = pipeline
        self._options = options
        self._target = target
        self._say = say
        self._settled = settled
        self._graph = GraphCapture()
        self.run: TrialRun | None = None

    def begin(
        self,
        plan: Plan,
        roles: Sequence[Role],
        max_steps: int,
        *,
        ragged: bool = False,
        under_way: bool = True,
    ) -> None:
        """Try plans from the next forward on.

        Args:
            plan: what was decided layer by layer.
            roles: what can be converted.
            max_steps: training steps that may be spent.
            ragged: steps differ in size.
            under_way: this is called inside of a forward, which is then tracked.
        """
        if self._pipeline.conversions.may_gather:
            roles = [*roles, gather_role(roles)]
        self._target.compile_for_trial(self._pipeline.conversions.assigned, self._gate)
        self.run = TrialRun(
            plan,
            roles,
            self._pipeline,
            self._options.config,
            self._options.ranks,
            max_steps=max_steps,
            say=self._say,
            ragged=ragged,
        )
        if under_way:
            self.run.follow(self._module)

    def end(self) -> Plan:
        """The best plan so far."""
        assert self.run is not None
        plan = self._pipeline.confirmed(self.run.close())
        self.run = None
        recipes = [recipe for _, recipe in self._pipeline.conversions.pairs()]
        self._target.end_trial(recipes)
        return plan

    def give_up(self) -> None:
        """End without a plan, if there is a trial."""
        if self.run is not None:
            self.run.give_up()
            self.run = None

    def _gate(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call`` with the trial around it, while there is one."""

        def gate(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                refuse_compiling()
            if self._graph.is_under_way():
                return call(*args, **kwargs)
            if in_backward():
                again = partial(call, *args, **kwargs)
                return self.run.recompute(again) if self.run else again()
            if not self._trains():
                with self._without_training():
                    return call(*args, **kwargs)
            if self.run and self.run.before((args, kwargs)):
                self._settled()
            output = call(*args, **kwargs)
            if self.run:
                self.run.after(output)
            return output

        return gate

    def _without_training(self) -> AbstractContextManager[None]:
        """Around a forward that is no part of training."""
        if self.run is None or torch.is_grad_enabled():
            return nullcontext()
        return self.run.without_gradients(evaluates=not self._module.training)

    def _trains(self) -> bool:
        """Whether a forward is one of training, as those of the warmup were."""
        mode = self._module.training or self._pipeline.capture.trained_in_eval
        whole = self.run is not None and self.run.recomputes_whole
        recomputed = whole and self._module.training
        return mode and (torch.is_grad_enabled() or recomputed)
