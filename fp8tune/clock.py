"""How long a piece of work takes on the device.

A ``Clock`` is an argument wherever something is timed. It gets work in the order in
which it is to run and returns one time for each.

On CUDA five things are needed for a time that means something:

* *Events.* The CPU only enqueues; the GPU's own timestamps before and after the work are
  what it took.
* *A blocking kernel first.* A small Linear runs faster than Python enqueues its kernels.
  Timed naively the GPU would wait for the CPU between kernels, and the variant with more
  kernels would be charged for Python. So the GPU is kept busy until all of the work is
  enqueued, and then runs it back to back, as it does in a training step whose queue is
  deep. If the blocker ended too early the times are thrown away and the work is queued
  again behind a longer one.
* *A flush between repetitions.* In training the weight was last touched a step ago and
  is in no cache. Zeroing a buffer larger than L2, outside the timed region, evicts what
  the last repetition left there (as in triton.testing.do_bench).
* *No synchronisation inside a repetition.* Reading the events waits for the GPU once,
  after everything was enqueued.
* *The current stream.* Work, events, blocker and flush all go to the stream that is
  current when the clock is called; no other stream, allocator setting or seed changes.

On CPU work is synchronous, and a monotonic clock around it is enough.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from fp8tune.records import Signature

__all__ = ["Clock", "CpuClock", "CudaClock", "Work", "clock_for"]

logger = logging.getLogger("fp8tune")


class Work(Protocol):
    """Something to time; says what it is, so that a scripted clock can answer for it.

    Attributes:
        signature: the signature that it runs.
        variant: "reference" or the name of a recipe.
    """

    signature: Signature
    variant: str

    def __call__(self) -> None:
        """Run once: forward + backward."""
        ...


class Clock(Protocol):
    """Times work on one device."""

    def warm_up(self, work: Sequence[Work]) -> None:
        """Run each until compiling, autotuning and allocating are over."""
        ...

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        """Run in this order; one time in milliseconds for each, caches cold."""
        ...

    def now(self) -> float:
        """Seconds on a clock that never goes back; budgets are kept by it."""
        ...

    def mark(self) -> Any:
        """A point in the device's work, to be passed to ``elapsed_ms``."""
        ...

    def elapsed_ms(self, start: Any, end: Any, what: object) -> float:
        """Milliseconds from one mark to another; waits for the device.

        Args:
            start: an earlier mark.
            end: a later mark.
            what: what ran in between, so that a scripted clock can answer for it.
        """
        ...


# Compiling and autotuning happen in the first call, allocator growth in the second.
_WARM_UP_CALLS = 3


class CpuClock:
    """``time.perf_counter`` around the work, with caches flushed before."""

    # Larger than the L2 caches of a few cores. L3 is left alone: it is shared with other
    # processes, and flushing some hundred MB would cost more than what is timed.
    _FLUSH_BYTES = 16 * 2**20

    def __init__(self) -> None:
        self._flush = torch.empty(self._FLUSH_BYTES, dtype=torch.uint8)

    def warm_up(self, work: Sequence[Work]) -> None:
        """Run each a few times."""
        for item in work:
            for _ in range(_WARM_UP_CALLS):
                item()

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        """Run in this order; milliseconds of each."""
        return [self._time_one(item) for item in work]

    def _time_one(self, work: Work) -> float:
        self._flush.zero_()
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3

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


class CudaClock:
    """CUDA events behind a blocking kernel; ROCm through the same API.

    Args:
        device: the GPU to time on.

    Attributes:
        discarded: batches thrown away because the GPU had to wait for the CPU.
    """

    # Twice the L2 of the largest GPU of today (B200: 126 MB) costs 0.1 ms to zero; small
    # GPUs get twice their own.
    _FLUSH_FACTOR = 2
    # The blocker outlasts the last enqueueing by half, so that jitter fits in.
    _MARGIN = 1.5
    _FIRST_BLOCK_MS = 2.0
    # A second of blocking means that the work itself waits for the GPU; more would not
    # help.
    _LONGEST_BLOCK_MS = 1000.0

    def __init__(self, device: torch.device) -> None:
        self.discarded = 0
        self._device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        size = self._FLUSH_FACTOR * l2_bytes
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)
        self._block_ms = self._FIRST_BLOCK_MS
        self._warned = False
        self._cycles_per_ms = self._calibrate()

    def warm_up(self, work: Sequence[Work]) -> None:
        """Run each a few times and wait for the GPU."""
        with torch.cuda.device(self._device):
            for item in work:
                for _ in range(_WARM_UP_CALLS):
                    item()
            torch.cuda.synchronize()

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        """Run in this order on the current stream; device milliseconds of each."""
        with torch.cuda.device(self._device):
            while True:
                longest = self._block_ms >= self._LONGEST_BLOCK_MS
                times, gapless = self._attempt(work)
                if gapless or longest:
                    self._warn_about_gaps(gapless)
                    return times
                self.discarded += 1

    def _attempt(self, work: Sequence[Work]) -> tuple[list[float], bool]:
        """Times, and whether the GPU was still blocked when all work was enqueued."""
        torch.cuda.synchronize()
        events = [(_timing_event(), _timing_event()) for _ in work]
        unblocked = torch.cuda.Event()
        enqueued_from = time.perf_counter()
        block_gpu(int(self._block_ms * self._cycles_per_ms))
        unblocked.record()
        for item, (start, end) in zip(work, events, strict=True):
            self._flush.zero_()
            start.record()
            item()
            end.record()
        gapless = not unblocked.query()
        enqueue_ms = (time.perf_counter() - enqueued_from) * 1e3
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
        """An event on the current stream."""
        event = _timing_event()
        event.record()
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


def block_gpu(cycles: int) -> None:
    """Keep the current stream busy for this many GPU cycles.

    torch offers a spinning kernel only as a private function, which its own tests use.
    Where it is missing nothing blocks, and the clock says that there were gaps.
    """
    sleep: Callable[[int], None] | None = getattr(torch.cuda, "_sleep", None)
    if sleep is not None:
        sleep(cycles)


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
        "fp8tune.clock.Clock"
    )
