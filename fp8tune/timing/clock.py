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
* *No CUDA graphs,* even where the model will run under them; ``fp8tune.compiling.cuda_graphs``
  says why.

ROCm is the same: ``torch.cuda`` is its API too. Which piece of work comes when is not
the clock's business: ``fp8tune.timing.measure`` runs the variants forth and back.

On CPU work is synchronous, and a monotonic clock around it is enough. Nothing is
allocated before the first timing, since whoever times survives running out of memory.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from fp8tune.decision.records import Signature

__all__ = ["Clock", "Work"]


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
