"""What was tuned -> what pages and trackers are told. Imports no torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fp8tune.report.subject import Subject

if TYPE_CHECKING:
    import os

    from fp8tune.decision.decisions import Decisions
    from fp8tune.store.runs import Run

__all__ = ["subject_of_plan", "subject_of_run", "write_page"]

logger = logging.getLogger("fp8tune")


def subject_of_run(run: Run, title: str) -> Subject:
    """A run of a cache as it ended: with the verdicts of its trial, if it had one."""
    return subject_of_plan(run.plan, run, title)


def subject_of_plan(
    plan: Decisions, run: Run | None, title: str = "Tuned model"
) -> Subject:
    """A plan, with the measurements of the run that it was made from, if there was one."""
    if run is None:
        return Subject(title, plan, plan.decisions)
    return Subject(
        title=title,
        plan=plan,
        by_signature=run.by_signature,
        measurements=run.measured_here,
        recorded=run.recorded,
        min_speedup=run.config.min_speedup,
    )


def write_page(path: str | os.PathLike[str] | None, subject: Subject | None) -> None:
    """The page of a plan, if there is one; training goes on where that fails.

    Args:
        path: the file, or None where nobody wants a page.
        subject: the plan, or None while there is none.
    """
    if path is None or subject is None:
        return
    from fp8tune.report.html import run_page  # noqa: PLC0415 - jinja2 takes a while

    try:
        Path(path).write_text(run_page(subject), encoding="utf-8")
    except OSError as error:
        logger.warning("the page %s was not written: %s", path, error)
    else:
        logger.info("wrote the page %s", path)
