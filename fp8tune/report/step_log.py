"""Training steps in TensorBoard: their time, and the share of converted layers.

Steps are those of the optimizer. They are seen by torch's hook for all optimizers, since
a hook on the model would change its compiled graph.
"""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp8tune.report.tensorboard import SHARE, write_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sized

    from torch import nn
    from torch.optim import Optimizer

    from fp8tune.decision.decisions import Decisions

__all__ = ["StepLog", "watch_steps"]


class Tuned(Protocol):
    """What is asked, step after step, of what tunes the model."""

    @property
    def plan(self) -> Decisions | None:
        """The decisions, or None while there are none."""
        ...

    @property
    def converted(self) -> Sized:
        """The Linears that are converted right now."""
        ...

    @property
    def linears(self) -> int:
        """How many Linears the model has."""
        ...


def watch_steps(owner: nn.Module, tuner: Tuned, writer: Any, *, close: bool) -> None:
    """Log the steps of a tuned model until the owner is gone.

    Args:
        owner: the model or its wrapper; lives as long as its steps are of interest.
        tuner: what is asked for the plan and the converted layers.
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
        close: close the writer in the end, since nobody else has it.
    """
    log = StepLog(owner, tuner, writer)
    # Also at the end of the process, where the writer would lose what it has not written.
    weakref.finalize(owner, log.close)
    if close:
        weakref.finalize(owner, writer.close)


class StepLog:
    """Step times and the share of converted layers, from the first step on.

    Args:
        owner: has the parameters by which the optimizer is known.
        tuner: tells the plan and the converted layers.
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
        now: seconds that only grow.
    """

    def __init__(
        self,
        owner: nn.Module,
        tuner: Tuned,
        writer: Any,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._owner = weakref.ref(owner)
        self._tuner = weakref.ref(tuner)
        self._writer = writer
        self._now = now
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._written: Decisions | None = None
        self._step = 0
        self._last: float | None = None
        # Where an optimizer is compiled, the hook runs outside of its graph.
        hook: Any = torch.compiler.disable(self._after_step)
        self._handle = register_optimizer_step_post_hook(hook)

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        del args, kwargs
        tuner = self._tuner()
        if tuner is None or not self._is_ours(optimizer):
            return
        now = self._now()
        self._step += 1
        if self._last is not None:
            step_ms = (now - self._last) * 1e3
            self._writer.add_scalar("fp8tune/step_ms", step_ms, self._step)
        if not self._write_new(tuner.plan):  # which holds the share too
            share = len(tuner.converted) / tuner.linears
            self._writer.add_scalar(SHARE, share, self._step)
        # Writing is no part of the next step's time.
        self._last = self._now()

    def _write_new(self, plan: Decisions | None) -> bool:
        if plan is None or plan is self._written:
            return False
        self._written = plan
        write_plan(plan, self._writer, self._step)
        return True

    def _is_ours(self, optimizer: Optimizer) -> bool:
        """Whether this is the first optimizer that steps the model's parameters."""
        known = self._optimizer and self._optimizer()
        if known is not None:
            return known is optimizer
        owner = self._owner()
        ours = {id(x) for x in owner.parameters()} if owner else set[int]()
        groups: list[dict[str, Any]] = optimizer.param_groups
        if not any(id(x) in ours for group in groups for x in group["params"]):
            return False
        self._optimizer = weakref.ref(optimizer)
        return True

    def close(self) -> None:
        """Stop watching; what is not on disk yet is written."""
        self._handle.remove()
        self._writer.flush()
