"""Times on a CPU; ``fp8tune.timing.clock`` says what a clock is."""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from fp8tune.timing.warming import warm_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8tune.timing.clock import Work

__all__ = ["CpuClock"]


class CpuClock:
    """``time.perf_counter`` around the work, with caches flushed before.

    Attributes:
        shares: thread CPU time / wall time of each piece of work of the last call, at
            most 1: what is missing the thread waited, for a core or for a thread of its
            own that waited for one.
    """

    # Larger than the L2 caches of a few cores. L3 is left alone: it is shared with other
    # processes, and flushing some hundred MB would cost more than what is timed.
    _FLUSH_BYTES = 16 * 2**20

    def __init__(self) -> None:
        self.shares: list[float] = []

    @cached_property
    def _flush(self) -> torch.Tensor:
        return torch.empty(self._FLUSH_BYTES, dtype=torch.uint8)

    def warm_up(self, work: Sequence[Work]) -> None:
        """Run each until its time settles."""
        for item in work:
            warm_up(item)

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        """Run in this order; milliseconds of each."""
        self.shares = []
        return [self._time_one(item) for item in work]

    def _time_one(self, work: Work) -> float:
        self._flush.zero_()
        # The CPU's time outside, so that reading it is not timed.
        cpu_start = time.thread_time()
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        cpu_seconds = time.thread_time() - cpu_start
        self.shares.append(min(cpu_seconds / seconds, 1.0) if seconds else 1.0)
        return seconds * 1e3

    def now(self) -> float:
        """Seconds of ``time.perf_counter``."""
        return time.perf_counter()

    def mark(self) -> float:
        """Seconds now; work on a CPU is done when its call returns."""
        return time.perf_counter()

    def elapsed_ms(self, start: float, end: float, what: object) -> float:
        """Milliseconds from one mark to another."""
        del what
        return (end - start) * 1e3
