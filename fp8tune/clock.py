"""How long a piece of work takes on the device.

A ``Clock`` is an argument wherever something is timed. It gets work in the order in
which it is to run and returns one time for each.

On CUDA seven things are needed for a time that means something:

* *Events.* The CPU only enqueues; the GPU's own timestamps before and after the work are
  what it took.
* *A blocking kernel first.* A small Linear runs faster than Python enqueues its kernels.
  Timed naively the GPU would wait for the CPU between kernels, and the variant with more
  kernels would be charged for Python. So the GPU is kept busy until all of the work is
  enqueued, and then runs it back to back, as it does in a training step whose queue is
  deep. If the blocker ended too early the times are thrown away, counted, and the work
  is queued again behind a longer one. The driver's queue is finite, and once it is full
  the CPU waits for the blocker however long that lasts; then each piece of work gets a
  blocker of its own.
* *A flush between repetitions.* In training the weight was last touched a step ago and
  is in no cache. Zeroing a buffer larger than L2, outside the timed region, evicts what
  the last repetition left there (as in triton.testing.do_bench).
* *No synchronisation inside a repetition.* Reading the events waits for the GPU once,
  after everything was enqueued.
* *The current stream.* Work, events, blocker and flush all go to the stream that is
  current when the clock is called; no other stream, allocator setting or seed changes.
* *Warm-up until it is over.* Compiling, autotuning and the allocator's growth take an
  unknown number of calls, so they are made until their times settle, each waited for.
* *No CUDA graphs,* even where the model will run under them; ``fp8tune.cuda_graphs``
  says why.

ROCm is the same: ``torch.cuda`` is its API too. Which piece of work comes when is not
the clock's business: ``fp8tune.measure`` runs the variants forth and back.

On CPU work is synchronous, and a monotonic clock around it is enough. Nothing is
allocated before the first timing, since whoever times survives running out of memory.
"""

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch

from fp8tune.cuda_clock import CudaClock
from fp8tune.records import Signature
from fp8tune.warming import warm_up

__all__ = ["Clock", "CpuClock", "CudaClock", "Work", "clock_for"]


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


class CpuClock:
    """``time.perf_counter`` around the work, with caches flushed before."""

    # Larger than the L2 caches of a few cores. L3 is left alone: it is shared with other
    # processes, and flushing some hundred MB would cost more than what is timed.
    _FLUSH_BYTES = 16 * 2**20

    @cached_property
    def _flush(self) -> torch.Tensor:
        return torch.empty(self._FLUSH_BYTES, dtype=torch.uint8)

    def warm_up(self, work: Sequence[Work]) -> None:
        """Run each until its time settles."""
        for item in work:
            warm_up(item)

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
