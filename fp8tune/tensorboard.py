"""Plans and training steps in TensorBoard. Needs the extra "plot".

    Text      fp8tune/plan                the table
    Scalars   fp8tune_speedup/<layer>     one point per kind of layer
              fp8tune/step_ms             training steps, so that the freeze is seen
              fp8tune/converted_share     of all Linears, over the same steps
    Images    fp8tune/speedups, fp8tune/heat_map
    HParams   recipe, device, versions and the numbers of layers, in the same run

Steps are those of the optimizer. They are seen by torch's hook for all optimizers, since
a hook on the model would change its compiled graph.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp8tune import report
from fp8tune.errors import ConfigError, PhaseError
from fp8tune.folding import fold_names
from fp8tune.records import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.optim import Optimizer

    from fp8tune.plan import Plan
    from fp8tune.tuner import Tuner

__all__ = ["Report", "StepLog", "open_writer", "watch_steps", "write_plan"]

logger = logging.getLogger("fp8tune")

_SHARE = "fp8tune/converted_share"
_NEEDED = 'install what TensorBoard needs with pip install "fp8tune[plot]"'


class Report(str):
    """The text of ``AutoFloat8.report()``, which can also be sent to TensorBoard.

    Attributes:
        plan: the decisions, or None while tuning.
    """

    __slots__ = ("plan",)
    plan: Plan | None

    @classmethod
    def of(cls, text: str, plan: Plan | None) -> Report:
        """The text, and what it is about."""
        made = cls(text)
        made.plan = plan
        return made

    def to_tensorboard(self, writer: Any, step: int = 0) -> None:
        """Write the table, the speedups, the pictures and the hparams.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``.
            step: the training step that they are shown at.

        Raises:
            PhaseError: nothing is decided yet.
        """
        if self.plan is None:
            raise PhaseError(
                "there is no plan to write to TensorBoard yet; train until auto.frozen, "
                "or call auto.freeze()"
            )
        write_plan(self.plan, writer, step)


def open_writer(target: Any) -> Any:
    """A path -> a SummaryWriter for that folder; a writer, or None, stays what it is.

    Raises:
        ConfigError: neither, or TensorBoard is not installed.
    """
    if target is None:
        return None
    if hasattr(target, "add_scalar") and hasattr(target, "add_hparams"):
        return target
    if not isinstance(target, str | os.PathLike):
        raise ConfigError(
            f"tensorboard is {target!r}; it must be a folder or a "
            "torch.utils.tensorboard.SummaryWriter"
        )
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(f"{error}; {_NEEDED}") from None
    return SummaryWriter(os.fspath(target))


def write_plan(plan: Plan, writer: Any, step: int = 0) -> None:
    """Everything about a plan that does not change from step to step."""
    writer.add_text("fp8tune/plan", "\n".join(_markdown(plan)), step)
    for name, decision in report.fold(plan.decisions):
        if decision.speedup is not None:
            writer.add_scalar(f"fp8tune_speedup/{name}", decision.speedup, step)
    _write_pictures(plan, writer, step)
    writer.add_scalar(_SHARE, _share(plan), step)
    _add_hparams(writer, _hparams(plan), step)
    writer.flush()


def _write_pictures(plan: Plan, writer: Any, step: int) -> None:
    try:
        from fp8tune import plot  # noqa: PLC0415 - matplotlib is an extra
    except ImportError as error:
        logger.warning("no pictures in TensorBoard: %s; %s", error, _NEEDED)
        return
    title = plot.title_of(
        plan.environment, plan.recipe, plan.timing, emulated=plan.emulated
    )
    for name, draw in (("speedups", plot.speedups), ("heat_map", plot.heat_map)):
        figure = draw(plan.decisions, title)
        writer.add_figure(f"fp8tune/{name}", figure, step, close=False)


def _markdown(plan: Plan) -> list[str]:
    header = "layer", "M", "K", "N", "reference ms", "float8 ms", "speedup", "outcome"
    rows = [[name, *report.cells(x, plan.recipe)] for name, x in _folded(plan)]
    # Not indented, which would make it code, and with the pipes of names escaped.
    table = [header, ["---"] * len(header), *rows]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in table]
    return [
        plan.summary(),
        "",
        *(f"| {line} |" for line in lines),
        "",
        ", ".join(f"{name} {value}" for name, value in plan.environment),
    ]


def _folded(plan: Plan) -> list[tuple[str, Any]]:
    """Names as code, since braces and underscores mean something in markdown."""
    keys = [
        (x.k, x.n, x.verdict, x.reason, x.recipe, x.signatures) for x in plan.decisions
    ]
    return [
        (f"`{name}`" + (f" x{len(x)}" if len(x) > 1 else ""), plan.decisions[x[0]])
        for name, x in fold_names([x.fqn for x in plan.decisions], keys)
    ]


def _add_hparams(writer: Any, values: dict[str, Any], step: int) -> None:
    """Write hparams into the writer's own file.

    ``add_hparams`` writes a file of its own beside it, which TensorBoard may take for the
    continuation of a crashed run; it then drops later points, or reads no more of the
    first file. torch has no public way around, so it is what happens where this fails.
    """
    try:
        from torch.utils.tensorboard.summary import hparams  # noqa: PLC0415

        add_summary = writer.file_writer.add_summary
        summaries = hparams(values, {_SHARE: 0.0})
    except (ImportError, AttributeError, TypeError):
        # "." is the writer's own run; any other name would be one more in the list.
        writer.add_hparams(values, {}, run_name=".", global_step=step)
        return
    for summary in summaries:
        add_summary(summary, step)


def _hparams(plan: Plan) -> dict[str, Any]:
    return {
        "fp8tune/recipe": plan.recipe,
        "fp8tune/timing": plan.timing,
        "fp8tune/linears": len(plan.decisions),
        "fp8tune/converted": len(plan.float8_fqns),
        **{f"fp8tune/{name}": value for name, value in plan.environment},
    }


def _share(plan: Plan) -> float:
    converted = sum(x.verdict is Verdict.FLOAT8 for x in plan.decisions)
    return converted / max(len(plan.decisions), 1)


def watch_steps(owner: nn.Module, tuner: Tuner, writer: Any, *, close: bool) -> None:
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
        tuner: Tuner,
        writer: Any,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._owner = weakref.ref(owner)
        self._tuner = weakref.ref(tuner)
        self._writer = writer
        self._now = now
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._written: Plan | None = None
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
            self._writer.add_scalar(_SHARE, share, self._step)
        # Writing is no part of the next step's time.
        self._last = self._now()

    def _write_new(self, plan: Plan | None) -> bool:
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
