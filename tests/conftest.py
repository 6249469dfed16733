"""What several test files share: a clock whose times come from a script."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8tune.clock import Work
    from fp8tune.records import Signature

    Script = Callable[[Signature, str], float]


class ScriptedClock:
    """Answers with the script's milliseconds and never runs the work.

    Attributes:
        timed: how often each (signature, variant) was timed.
        warmed: how often each was warmed up.
    """

    def __init__(self, script: Script) -> None:
        self._script = script
        self._seconds = 0.0
        self.timed: Counter[tuple[Signature, str]] = Counter()
        self.warmed: Counter[tuple[Signature, str]] = Counter()

    def warm_up(self, work: Sequence[Work]) -> None:
        self.warmed.update((item.signature, item.variant) for item in work)

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        self.timed.update((item.signature, item.variant) for item in work)
        times = [self._script(item.signature, item.variant) for item in work]
        self._seconds += sum(times) / 1e3
        return times

    def now(self) -> float:
        return self._seconds


@pytest.fixture
def scripted_clock() -> type[ScriptedClock]:
    return ScriptedClock


def _refuse(signature: Signature, variant: str) -> float:
    raise AssertionError(f"{variant} of {signature} was timed")


@pytest.fixture
def silent_clock() -> ScriptedClock:
    """A clock that must not be asked."""
    return ScriptedClock(_refuse)
