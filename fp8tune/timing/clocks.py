"""Which clock times the work of a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8tune.timing.cpu_clock import CpuClock
from fp8tune.timing.cuda_clock import CudaClock

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from fp8tune.timing.clock import Clock, Work

__all__ = ["clock_for", "clock_for_steps"]


def clock_for(device: torch.device) -> Clock:
    """The clock for a device.

    Raises:
        NotImplementedError: neither a CPU nor a CUDA or ROCm device.
    """
    if device.type == "cuda":
        return CudaClock(device)
    if device.type == "cpu":
        return CpuClock()
    raise NotImplementedError(
        f"no clock for device type {device.type!r}; pass clock= with the methods of "
        "fp8tune.timing.clock.Clock"
    )


def clock_for_steps(devices: Iterable[torch.device]) -> Clock:
    """The clock for training steps of a model that lies on these devices.

    Args:
        devices: of its layers; those of another type than the first are left out.

    Raises:
        NotImplementedError: see ``clock_for``.
    """
    first, *others = dict.fromkeys(devices)
    clocks = [clock_for(x) for x in [first, *others] if x.type == first.type]
    return clocks[0] if len(clocks) == 1 else _TogetherClock(clocks)


class _TogetherClock:
    """Marks on several devices: a step lasts as long as on the one that is last."""

    def __init__(self, clocks: Sequence[Clock]) -> None:
        self._clocks = clocks
        self._first = clocks[0]

    def warm_up(self, work: Sequence[Work]) -> None:
        """See Clock; of the first device."""
        self._first.warm_up(work)

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        """See Clock; of the first device."""
        return self._first.time_ms(work)

    def now(self) -> float:
        """See Clock."""
        return self._first.now()

    def mark(self) -> Any:
        """A mark on each."""
        return [x.mark() for x in self._clocks]

    def elapsed_ms(self, start: Any, end: Any, what: object) -> float:
        """From the earliest start that its device saw, to the latest end; see Clock."""
        marks = zip(self._clocks, start, end, strict=True)
        return max(clock.elapsed_ms(a, b, what) for clock, a, b in marks)
