"""Tuning that does not get on says so, once, with the likely cause."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fp8tune.report import stuck as messages

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8tune.model.steps import Steps

__all__ = ["Stuck"]

# So many passes with gradients and no backward are no accident.
_PASSES_WITHOUT_GRADIENT = 10

# Nor is a step of so many micro-batches.
_PASSES_OF_ONE_STEP = 256

# A loop variable holds the last loss into the next forward; so often it is no accident.
_PASSES_BESIDE_GRAPHS = 10


class Stuck:
    """Warns of steps that never end.

    Args:
        say: logs.
    """

    def __init__(self, say: Callable[[int, object], None]) -> None:
        self._say = say
        self._warned = False
        self._beside_graphs = 0

    def look(self, steps: Steps, seen: int, waiting: int) -> None:
        """Called at each pass that changes nothing.

        Args:
            steps: the model's training steps.
            seen: how many of them tuning has seen.
            waiting: passes that wait for their backward.
        """
        self._warn(_cause(steps, seen, waiting))

    def _warn(self, line: str | None) -> None:
        if line is not None and not self._warned:
            self._warned = True
            self._say(logging.WARNING, line)

    def goes_on(self, waiting: int, retained: int, *, recomputes: bool) -> bool:
        """Called before each step at which the phase could end but for graphs.

        Args:
            waiting: passes of earlier steps that may be differentiated yet.
            retained: passes whose graph is alive after a backward.
            recomputes: whether another backward would call layers again.

        Returns:
            Whether it may end all the same: these graphs are a habit of the training
            loop, and nothing in them depends on what a layer is.
        """
        self._beside_graphs += 1
        if self._beside_graphs < _PASSES_BESIDE_GRAPHS:
            return False
        if recomputes:
            line = messages.beside_results_line if waiting else messages.retained_line
            self._warn(line(waiting or retained))
            return False
        results, graphs = (
            messages.DECIDED_BESIDE_RESULTS,
            messages.DECIDED_BESIDE_GRAPHS,
        )
        self._say(logging.INFO, results if waiting else graphs)
        return True


def _cause(steps: Steps, seen: int, waiting: int) -> str | None:
    if steps.passes_without_gradient == _PASSES_WITHOUT_GRADIENT:
        return messages.stuck_line(steps.passes_without_gradient, seen, waiting)
    if steps.passes_in_step == _PASSES_OF_ONE_STEP:
        return messages.endless_step_line(steps.passes_in_step)
    return None
