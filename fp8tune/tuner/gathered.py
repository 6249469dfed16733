"""A tuner that has FSDP2 gather weights in float8 where that is asked for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fp8tune.report import gathering as messages
from fp8tune.tuner.phases import Phase
from fp8tune.tuner.tuner import Tuner

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["GatheringTuner"]


class GatheringTuner(Tuner):
    """Not while layers are watched, whose weights are taken as they were gathered."""

    @property
    def _gathers(self) -> bool | None:
        """What was asked for; None leaves it to the trial."""
        wanted = self._options.config.float8_all_gather
        if wanted == "auto":
            return True if self._asked else None
        return wanted

    @property
    def _asked(self) -> bool:
        """Whether a torchao config of the user's asks for it."""
        return any(getattr(x, "gathers", False) for x in self._recipes)

    def _warm_up(self, *, keep_tensors: bool) -> None:
        self._pipeline.conversions.gather_in_float8(False)
        super()._warm_up(keep_tensors=keep_tensors)

    def _stop_watching(self, converted: Collection[str]) -> None:
        self._pipeline.conversions.gather_in_float8(self._gathers)
        super()._stop_watching(converted)

    def _enter(self, phase: Phase) -> None:
        super()._enter(phase)
        if phase is Phase.FROZEN:
            self._say_gathered()

    def _say_gathered(self) -> None:
        gathering = self._pipeline.conversions.gathering
        if gathering.number:
            line = messages.gathered_line(gathering.number, gathering.masters)
            self._say(logging.INFO, line)
        chosen = self._gathers is None and self.plan is not None and self.plan.gathers
        if self._gathers or (chosen and not gathering.number):
            reasons = gathering.refusals(self.converted)
            if reasons or not self.converted:
                line = messages.not_gathered_line(reasons, len(self.converted))
                self._say(logging.WARNING, line)
        elif self._asked:
            self._say(logging.WARNING, messages.GATHER_REFUSED)
