"""A tuner that goes on to watch the accuracy once its plan is frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8tune.tuner.phases import Phase
from fp8tune.tuner.resuming import ResumableTuner
from fp8tune.tuner.subject import write_page
from fp8tune.tuner.watching import Watch

if TYPE_CHECKING:
    from fp8tune.plan.plan import Plan

__all__ = ["WatchedTuner"]


class WatchedTuner(ResumableTuner):
    """What AutoFloat8 has; without ``watch_every`` it adds nothing."""

    _watch: Watch | None = None

    def _enter(self, phase: Phase) -> None:
        super()._enter(phase)
        if phase is Phase.FROZEN and self._options.config.watch_every:
            assert self.plan is not None
            self._watch = Watch(
                self._module,
                self._pipeline,
                self._options,
                self._target,
                self.plan,
                say=self._say,
                changed=self._revised,
            )
        elif phase is Phase.ABANDONED and self._watch:
            self._watch.close()
            self._watch = None

    def _revised(self, plan: Plan) -> None:
        """A check of the accuracy changed the plan."""
        self.plan = plan
        write_page(self._options.html, self.subject)
