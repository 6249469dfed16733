"""A run that ends before its tuning does says so, whoever ended it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import finalize

from fp8tune.report.stuck import TRIAL_ENDED_LINE, ended_line
from fp8tune.tuner.phases import Phase

if TYPE_CHECKING:
    from fp8tune.model.steps import Steps

__all__ = ["Progress", "say_at_end"]

logger = logging.getLogger("fp8tune")


@dataclass
class Progress:
    """How far tuning has come, in numbers that outlive tuner and model.

    Attributes:
        wanted: steps that the warmup takes.
        phase: where tuning is.
        seen: training steps of the warmup.
        passes: calls with gradients, since tuning began.
        without_gradient: the last of them, to which none came back.
        in_step: those of the step that is under way.
    """

    wanted: int
    phase: Phase | None = None
    seen: int = 0
    passes: int = 0
    without_gradient: int = 0
    in_step: int = 0

    def note(self, seen: int, steps: Steps) -> None:
        """Called at each pass."""
        self.seen = seen
        self.passes += 1
        self.without_gradient = steps.passes_without_gradient
        self.in_step = steps.passes_in_step

    def line(self) -> str | None:
        """What is to be said if the run ends here, or None."""
        if self.phase is Phase.TRIAL:
            return TRIAL_ENDED_LINE
        if self.phase is not Phase.WARMUP:
            return None
        return ended_line(
            self.seen,
            self.wanted,
            passes=self.passes,
            without_gradient=self.without_gradient,
            in_step=self.in_step,
        )


def say_at_end(tuner: object, progress: Progress) -> None:
    """Say it when the tuner is let go of, or the process ends; it is not kept alive."""
    finalize(tuner, _say, progress)


def _say(progress: Progress) -> None:
    line = progress.line()
    if line is not None:
        logger.warning("%s", line)
