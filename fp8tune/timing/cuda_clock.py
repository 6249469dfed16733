"""Times on a GPU; ``fp8tune.timing.clock`` says why each thing here is done."""

from __future__ import annotations

import logging
import os
import time
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from fp8tune.garbage import no_collection
from fp8tune.timing.warming import warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8tune.decision.records import Signature
    from fp8tune.timing.clock import Work

__all__ = ["CudaClock", "block_gpu"]

logger = logging.getLogger("fp8tune")


class _Attempt(NamedTuple):
    """One batch: device milliseconds, CPU milliseconds of enqueueing, no launch gaps."""

    times: list[float]
    enqueue_ms: list[float]
    gapless: bool


class CudaClock:
    """CUDA events behind a blocking kernel; ROCm through the same API.

    Args:
        device: the GPU to time on.

    Attributes:
        device: the same, with its number.
        discarded: batches thrown away because the GPU had to wait for the CPU; each is
            logged at DEBUG.
        with_gaps: batches whose times include launch gaps, since no block was long enough.
    """

    # Times the GPU's own L2.
    _FLUSH_FACTOR = 2
    # Twice the 256 MB of Infinity Cache that AMD names for an MI300X: it lies behind L2,
    # and torch says nothing of it.
    _ROCM_FLUSH_BYTES = 512 * 2**20
    # The blocker outlasts the enqueueing by half, so that jitter fits in.
    _MARGIN = 1.5
    # What work is taken to need that was never enqueued before.
    _UNKNOWN_MS = 0.5
    _SHORTEST_BLOCK_MS = 0.5
    # Work that takes longer to enqueue is timed one by one.
    _LONGEST_BLOCK_MS = 100.0
    # Each behind twice the block of the one before. Whoever still has gaps waits for
    # the GPU itself, and no block is long enough.
    _ATTEMPTS = 4
    # The estimate of what enqueueing takes follows what it took: at once upwards, to
    # the double at most, and slowly downwards. So a pause is forgotten, jitter is not.
    _SHRINKING = 0.9

    def __init__(self, device: torch.device) -> None:
        self.discarded = self.with_gaps = 0
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device(device.type, index)
        self._warned = False
        self._signature: Signature | None = None
        self._enqueue_ms: dict[str, float] = {}
        self._patience = self._ATTEMPTS
        self._cycles_per_ms = self._calibrate()

    @cached_property
    def _flush(self) -> torch.Tensor:
        l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        size = self._FLUSH_FACTOR * l2_bytes
        if torch.version.hip:
            size = max(size, self._ROCM_FLUSH_BYTES)
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def warm_up(self, work: Sequence[Work]) -> None:
        """Run each until its time, the GPU's included, settles.

        Raises:
            ValueError: it runs on another device.
        """
        with torch.cuda.device(self.device):
            # What is captured may come from another stream.
            torch.cuda.synchronize(self.device)
            for item in work:
                self._begin(item)
                self._warm_up(item)

    def _warm_up(self, work: Work) -> None:
        enqueue_ms: list[float] = []

        def run_and_wait() -> None:
            enqueue_ms.append(_milliseconds(work))
            torch.cuda.synchronize(self.device)

        warm_up(run_and_wait)
        self._enqueue_ms[work.variant] = min(enqueue_ms)

    def _begin(self, work: Work) -> None:
        """What was learnt of another signature says nothing about this one.

        Raises:
            ValueError: the work runs on another device, where this clock sees nothing.
        """
        device = getattr(work, "device", None)
        if device is not None and device != self.device:
            raise ValueError(
                f"work on {device} cannot be timed by the clock of {self.device}; use "
                f"clock_for(torch.device({str(device)!r}))"
            )
        if work.signature != self._signature:
            self._signature = work.signature
            self._enqueue_ms.clear()
            self._patience = self._ATTEMPTS

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        """Run in this order on the current stream; device milliseconds of each.

        Raises:
            ValueError: it runs on another device.
        """
        for item in work:
            self._begin(item)
        together = self._block_ms(work) <= self._LONGEST_BLOCK_MS
        batches = [work] if together else [[item] for item in work]
        with torch.cuda.device(self.device), no_collection():
            return [x for batch in batches for x in self._time_batch(batch)]

    def _block_ms(self, work: Sequence[Work]) -> float:
        """How long the GPU is kept busy, so that all of the work is enqueued by then."""
        known = self._enqueue_ms
        expected = sum(known.get(x.variant, self._UNKNOWN_MS) for x in work)
        return max(self._SHORTEST_BLOCK_MS, self._MARGIN * expected)

    def _time_batch(self, work: Sequence[Work]) -> list[float]:
        block_ms = min(self._block_ms(work), self._LONGEST_BLOCK_MS)
        for number in range(self._patience):
            if number:
                self._discard()
                block_ms = min(2 * block_ms, self._LONGEST_BLOCK_MS)
            attempt = self._attempt(work, block_ms)
            if attempt.gapless:
                self._patience = self._ATTEMPTS
                self._learn(work, attempt.enqueue_ms)
                return attempt.times
        # Trying again would only cost more; one batch without gaps ends this.
        self._patience = 1
        self.with_gaps += 1
        self._warn_about_gaps(block_ms)
        return attempt.times  # pyright: ignore[reportPossiblyUnboundVariable]

    def _discard(self) -> None:
        self.discarded += 1
        logger.debug("launch gaps: batch %d is timed again", self.discarded)

    def _learn(self, work: Sequence[Work], enqueue_ms: Sequence[float]) -> None:
        # The least of each, since the CPU may have waited for a full queue.
        least: dict[str, float] = {}
        for item, took in zip(work, enqueue_ms, strict=True):
            least[item.variant] = min(took, least.get(item.variant, took))
        for variant, took in least.items():
            before = self._enqueue_ms.get(variant, took)
            followed = max(self._SHRINKING * before, min(took, 2 * before))
            self._enqueue_ms[variant] = followed

    def _attempt(self, work: Sequence[Work], block_ms: float) -> _Attempt:
        """Queue the work behind a block, then wait for all of it.

        There were no gaps if no work had begun when the last of its kernels was
        enqueued. Whether the block is over by then does not matter: what was enqueued
        before keeps the GPU busy too.
        """
        flush = self._flush  # allocated before the GPU is blocked
        stream = torch.cuda.current_stream(self.device)
        events = [(_timing_event(), _timing_event()) for _ in work]
        blocked, unblocked = _timing_event(), _timing_event()
        cycles = int(block_ms * self._cycles_per_ms)
        enqueue_ms: list[float] = []
        gapless = True
        torch.cuda.synchronize(self.device)
        try:
            blocked.record(stream)
            block_gpu(cycles)
            unblocked.record(stream)
            for item, (start, end) in zip(work, events, strict=True):
                flush.zero_()
                start.record(stream)
                enqueue_ms.append(_milliseconds(item))
                end.record(stream)
                gapless = gapless and not start.query()
        finally:
            # Also after an error, so that nothing runs on in memory that is let go of.
            torch.cuda.synchronize(self.device)
        # The GPU's frequency may not be what it was when the blocker was calibrated.
        self._cycles_per_ms = cycles / max(blocked.elapsed_time(unblocked), 1e-3)
        times = [start.elapsed_time(end) for start, end in events]
        return _Attempt(times, enqueue_ms, gapless)

    def _warn_about_gaps(self, block_ms: float) -> None:
        if self._warned:
            return
        self._warned = True
        logger.warning(
            "the GPU waited for the CPU even behind %.0f ms of queued work, so timings "
            "include launch gaps; %s",
            block_ms,
            _why_gaps(),
        )

    def _calibrate(self) -> float:
        """Cycles of the blocking kernel per millisecond."""
        cycles = 1_000_000
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            block_gpu(cycles)
            start, end = _timing_event(), _timing_event()
            start.record(stream)
            block_gpu(cycles)
            end.record(stream)
            torch.cuda.synchronize(self.device)
        return cycles / max(start.elapsed_time(end), 1e-3)

    def block(self, milliseconds: float) -> None:
        """Keep the current stream of the current device busy for about so long."""
        block_gpu(int(milliseconds * self._cycles_per_ms))

    def now(self) -> float:
        """Seconds of ``time.perf_counter``."""
        return time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        """An event on the current stream of the clock's device."""
        event = _timing_event()
        event.record(torch.cuda.current_stream(self.device))
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


def _milliseconds(call: Callable[[], object]) -> float:
    """What a call takes the CPU."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _why_gaps() -> str:
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        return "CUDA_LAUNCH_BLOCKING is set: tune without it"
    if not hasattr(torch.cuda, "_sleep"):
        return "this torch has no torch.cuda._sleep, behind which work is queued"
    return "does the model synchronise in forward?"


def block_gpu(cycles: int) -> None:
    """Keep the current stream busy for this many GPU cycles.

    torch offers a spinning kernel only as a private function, which its own tests use.
    Where it is missing nothing blocks, and the clock says that there were gaps.
    """
    sleep: Callable[[int], None] | None = getattr(torch.cuda, "_sleep", None)
    if sleep is not None:
        sleep(cycles)
