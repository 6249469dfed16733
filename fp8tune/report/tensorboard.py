"""Plans and training steps in TensorBoard. Needs the extra "plot".

Text      fp8tune/plan                the table
Scalars   fp8tune_speedup/<layer>     one point per kind of layer
fp8tune/step_ms             training steps, so that the freeze is seen
fp8tune/converted_share     of all Linears, over the same steps
Images    fp8tune/speedups, fp8tune/heat_map; after a trial of whole plans also
fp8tune/trial_plans, fp8tune/trial_roles, fp8tune/trial_steps
HParams   recipe, device, versions and the numbers of layers, in the same run
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from fp8tune.decision.folding import fold_names
from fp8tune.errors import ConfigError
from fp8tune.report import table

if TYPE_CHECKING:
    from fp8tune.decision.decisions import Decisions

__all__ = ["SHARE", "open_writer", "write_plan"]

logger = logging.getLogger("fp8tune")

SHARE = "fp8tune/converted_share"
_NEEDED = 'install what TensorBoard needs with pip install "fp8tune[plot]"'


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


def write_plan(plan: Decisions, writer: Any, step: int = 0) -> None:
    """Everything about a plan that does not change from step to step."""
    writer.add_text("fp8tune/plan", "\n".join(_markdown(plan)), step)
    for name, decision in table.fold(plan.decisions):
        if decision.speedup is not None:
            writer.add_scalar(f"fp8tune_speedup/{name}", decision.speedup, step)
    _write_pictures(plan, writer, step)
    writer.add_scalar(
        SHARE, len(plan.converted_fqns) / max(len(plan.decisions), 1), step
    )
    _add_hparams(writer, table.hparams(plan), step)
    writer.flush()


def _write_pictures(plan: Decisions, writer: Any, step: int) -> None:
    try:
        # matplotlib is an extra
        from fp8tune.report import plot, trial_charts  # noqa: PLC0415
    except ImportError as error:
        logger.warning("no pictures in TensorBoard: %s; %s", error, _NEEDED)
        return
    title = plot.title_of(
        plan.environment, plan.recipe, plan.timing, emulated=plan.emulated
    )
    for name, draw in (("speedups", plot.speedups), ("heat_map", plot.heat_map)):
        figure = draw(plan.decisions, title)
        writer.add_figure(f"fp8tune/{name}", figure, step, close=False)
    for tried in trial_charts.trial_pictures(plan.trial):
        figure = plot.trial_figure(tried, title)
        writer.add_figure(f"fp8tune/trial_{tried.name}", figure, step, close=False)


def _markdown(plan: Decisions) -> list[str]:
    header = (
        "layer",
        "M",
        "K",
        "N",
        "reference ms",
        "candidate ms",
        "speedup",
        "outcome",
    )
    rows = [[name, *table.cells(x, plan.recipe)] for name, x in _folded(plan)]
    # Not indented, which would make it code, and with the pipes of names escaped.
    every = [header, ["---"] * len(header), *rows]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in every]
    return [
        table.summary(plan),
        "",
        *(f"| {line} |" for line in lines),
        "",
        ", ".join(f"{name} {value}" for name, value in plan.environment),
    ]


def _folded(plan: Decisions) -> list[tuple[str, Any]]:
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
        summaries = hparams(values, {SHARE: 0.0})
    except (ImportError, AttributeError, TypeError):
        # "." is the writer's own run; any other name would be one more in the list.
        writer.add_hparams(values, {}, run_name=".", global_step=step)
        return
    for summary in summaries:
        add_summary(summary, step)
