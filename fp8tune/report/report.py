"""What ``AutoFloat8.report()`` returns: text that can also be sent elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fp8tune.errors import PhaseError

if TYPE_CHECKING:
    import os

    from fp8tune.report.subject import Subject

__all__ = ["Report"]


class _Saved(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


class Report(str):
    """The text of ``AutoFloat8.report()``, which also goes to a page or a tracker.

    Attributes:
        subject: what was decided and measured, or None while tuning.
        plan: the plan, or None while tuning.
    """

    __slots__ = ("plan", "subject")
    subject: Subject | None
    plan: _Saved | None

    @classmethod
    def of(cls, text: str, subject: Subject | None, plan: _Saved | None) -> Report:
        """The text, and what it is about."""
        made = cls(text)
        made.subject = subject
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
        from fp8tune.report.tensorboard import write_plan  # noqa: PLC0415 - imports torch

        write_plan(self._decided("write to TensorBoard").plan, writer, step)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page of one file that needs no network; its pictures need matplotlib.

        Args:
            path: the file, which is replaced.

        Raises:
            PhaseError: nothing is decided yet.
            OSError: the file cannot be written.
        """
        from fp8tune.report.html import run_page  # noqa: PLC0415 - jinja2 takes a while

        subject = self._decided("show in a page")
        Path(path).write_text(run_page(subject), encoding="utf-8")

    def log_to(self, run: Any, step: int | None = None) -> None:
        """Write the table, the speedups, the plan and the page to an experiment tracker.

        Args:
            run: a run of Weights & Biases (``wandb.init()``), or of MLflow
                (``mlflow.start_run()``), whose tracking URI is the current one.
            step: the training step that they are shown at; the run's own by default.

        Raises:
            PhaseError: nothing is decided yet.
            ConfigError: the run is of neither.
        """
        from fp8tune.report.trackers import tracker_of  # noqa: PLC0415 - imports the page

        log = tracker_of(run)
        subject = self._decided("write to a tracker")
        assert self.plan is not None
        log(run, subject, self.plan.to_dict(), step)

    def _decided(self, what: str) -> Subject:
        if self.subject is None:
            raise PhaseError(
                f"there is no plan to {what} yet; train until auto.frozen, or call "
                "auto.freeze()"
            )
        return self.subject
