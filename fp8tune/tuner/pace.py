"""When a phase may end: between two steps, with nothing that waits for its backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8tune.tuner.ending import Progress
from fp8tune.tuner.stuck import Stuck

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8tune.tuner.options import Options
    from fp8tune.tuner.pipeline import Pipeline

__all__ = ["Pace"]


class Pace:
    """Counts the training steps of a phase, as passes and gradients come.

    Args:
        pipeline: holds the model's steps and what is captured of them.
        options: the ranks, of which none may go ahead alone.
        say: logs.

    Attributes:
        progress: how far the warmup has come, for when the run ends.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        options: Options,
        say: Callable[[int, object], None],
    ) -> None:
        self._pipeline = pipeline
        self._ranks = options.ranks
        self._stuck = Stuck(say)
        self._steps_before = 0
        self.progress = Progress(options.watched_steps)

    def restart(self, seen: int = 0) -> None:
        """Count from here, or as if so many steps had been seen."""
        self._steps_before = self._pipeline.steps.completed - seen

    @property
    def over(self) -> int:
        """Training steps since then, one that is over before the next began included."""
        return self._pipeline.steps.over - self._steps_before

    @property
    def steps(self) -> int:
        """Training steps since then."""
        return self._pipeline.steps.completed - self._steps_before

    def pass_begins(self, wanted: int) -> bool:
        """Called before each pass of training.

        Args:
            wanted: steps that the phase takes.

        Returns:
            Whether it may end here.
        """
        steps, ranks = self._pipeline.steps, self._ranks
        capture = self._pipeline.capture
        steps.begin()
        self.progress.note(self.steps, steps)
        if steps.fresh:
            ranks.refuse_lone_freeze(steps.begun)
        due = self.steps >= wanted or ranks.went_ahead
        waiting, retained = capture.waiting, capture.retained
        if capture.all_transformed:  # nothing is left to wait for
            return True
        if due and steps.fresh and not (waiting or retained):
            return True
        if due and steps.fresh and (not waiting or steps.passes_in_step == 1):
            recomputes = capture.recomputes
            return self._stuck.goes_on(waiting, retained, recomputes=recomputes)
        self._stuck.look(steps, self.steps, waiting)
        return False

    def gradient_came(self) -> None:
        """Called when a gradient reaches the model."""
        steps = self._pipeline.steps
        if steps.fresh:  # before reductions that a rank which left would not match
            self._ranks.refuse_lone_freeze(steps.begun)
        steps.saw_gradient()
        self.progress.without_gradient = 0
