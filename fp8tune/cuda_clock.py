"""Times on a GPU; ``fp8tune.clock`` says why each thing here is done."""

from __future__ import annotations

import logging
import time
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch

from fp8tune.warming import warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8tune.clock import Work

__all__ = ["CudaClock", "block_gpu"]

logger = logging.getLogger("fp8tune")


class CudaClock:
    """CUDA events behind a blocking kernel; ROCm through the same API.

    Args:
        device: the GPU to time on.

    Attributes:
        discarded: batches thrown away because the GPU had to wait for the CPU; each is
            logged at DEBUG.
    """

    # Times the GPU's own L2.
    _FLUSH_FACTOR = 2
    # Twice the 256 MB of Infinity Cache that AMD names for an MI300X: it lies behind L2,
    # and torch says nothing of it.
    _ROCM_FLUSH_BYTES = 512 * 2**20
    # The blocker outlasts the last enqueueing by half, so that jitter fits in.
    _MARGIN = 1.5
    _FIRST_BLOCK_MS = 2.0
    # Enqueueing takes far less, so more would not help: the queue is full, or the work
    # itself waits for the GPU.
    _LONGEST_BLOCK_MS = 200.0

    def __init__(self, device: torch.device) -> None:
        self.discarded = 0
        self._device = device
        self._block_ms = self._FIRST_BLOCK_MS
        self._one_by_one = False
        self._warned = False
        self._cycles_per_ms = self._calibrate()

    @cached_property
    def _flush(self) -> torch.Tensor:
        l2_bytes = torch.cuda.get_device_properties(self._device).L2_cache_size
        size = self._FLUSH_FACTOR * l2_bytes
        if torch.version.hip:
            size = max(size, self._ROCM_FLUSH_BYTES)
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def warm_up(self, work: Sequence[Work]) -> None:
        """Run each until its time, the GPU's included, settles."""
        with torch.cuda.device(self._device):
            # What is captured may come from another stream.
            torch.cuda.synchronize()
            for item in work:
                warm_up(partial(_run_and_wait, item))

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        """Run in this order on the current stream; device milliseconds of each."""
        with torch.cuda.device(self._device):
            if not self._one_by_one:
                times, gapless = self._queue(work)
                if gapless:
                    return times
                self._discard()
                self._one_by_one, self._block_ms = True, self._FIRST_BLOCK_MS
            alone = [self._queue([item]) for item in work]
            self._warn_about_gaps(all(gapless for _, gapless in alone))
            return [time for (time,), _ in alone]

    def _queue(self, work: Sequence[Work]) -> tuple[list[float], bool]:
        """Times, and False if there were gaps even behind the longest block."""
        while True:
            longest = self._block_ms >= self._LONGEST_BLOCK_MS
            times, gapless = self._attempt(work)
            if gapless or longest:
                return times, gapless
            self._discard()

    def _discard(self) -> None:
        self.discarded += 1
        logger.debug("launch gaps: batch %d is timed again", self.discarded)

    def _attempt(self, work: Sequence[Work]) -> tuple[list[float], bool]:
        """Times, and whether the GPU was still blocked when all work was enqueued."""
        flush = self._flush  # allocated before the GPU is blocked
        events = [(_timing_event(), _timing_event()) for _ in work]
        unblocked = torch.cuda.Event()
        torch.cuda.synchronize()
        enqueued_from = time.perf_counter()
        try:
            block_gpu(int(self._block_ms * self._cycles_per_ms))
            unblocked.record()
            for item, (start, end) in zip(work, events, strict=True):
                flush.zero_()
                start.record()
                item()
                end.record()
            gapless = not unblocked.query()
            enqueue_ms = (time.perf_counter() - enqueued_from) * 1e3
        finally:
            # Also after an error, so that nothing runs on in memory that is let go of.
            torch.cuda.synchronize()
        if not gapless:
            # Never shortened again: the GPU's clock may not be what it was when the
            # kernel was calibrated, and every batch would be thrown away once.
            longer = max(2 * self._block_ms, self._MARGIN * enqueue_ms)
            self._block_ms = min(longer, self._LONGEST_BLOCK_MS)
        return [start.elapsed_time(end) for start, end in events], gapless

    def _warn_about_gaps(self, gapless: bool) -> None:
        if gapless or self._warned:
            return
        self._warned = True
        logger.warning(
            "the GPU waited for the CPU even behind %d ms of queued work, so timings "
            "include launch gaps; does the model synchronise in forward?",
            self._LONGEST_BLOCK_MS,
        )

    def _calibrate(self) -> float:
        """Cycles of the blocking kernel per millisecond."""
        cycles = 1_000_000
        with torch.cuda.device(self._device):
            block_gpu(cycles)
            start, end = _timing_event(), _timing_event()
            start.record()
            block_gpu(cycles)
            end.record()
            torch.cuda.synchronize()
        return cycles / max(start.elapsed_time(end), 1e-3)

    def now(self) -> float:
        """Seconds of ``time.perf_counter``."""
        return time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        """An event on the current stream of the clock's device."""
        event = _timing_event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def elapsed_ms(
        self, start: torch.cuda.Event, end: torch.cuda.Event, what: object
    ) -> float:
        """Milliseconds between two events, once the later one is reached."""
        del what
        end.synchronize()
        return start.elapsed_time(end)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _run_and_wait(work: Work) -> None:
    work()
    torch.cuda.synchronize()


def block_gpu(cycles: int) -> None:
    """Keep the current stream busy for this many GPU cycles.

    torch offers a spinning kernel only as a private function, which its own tests use.
    Where it is missing nothing blocks, and the clock says that there were gaps.
    """
    sleep: Callable[[int], None] | None = getattr(torch.cuda, "_sleep", None)
    if sleep is not None:
        sleep(cycles)
