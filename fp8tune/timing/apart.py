"""A thread of its own for measuring, so that nothing around the user's forward is timed.

What surrounds a forward is kept by thread: hooks on saved tensors (activation offloading,
frames of non-reentrant checkpointing), dispatch and function modes, levels of torch.func,
inference mode, autocast. A fresh thread has none of it. Carried over are the device, its
stream and the number of threads; random state and default dtype belong to the process.
Anomaly mode does too, and is off meanwhile.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Generator, Sequence

    from fp8tune.timing.clock import Clock, Work

__all__ = ["StoppableClock", "apart"]


@contextmanager
def apart(stop: threading.Event) -> Generator[Callable[..., Any]]:
    """Run functions in a fresh thread, one after the other, while this one waits.

    Args:
        stop: set when the block is left, be it by Ctrl-C, which only this thread sees.

    Yields:
        call(function, *args, **kwargs), which returns or raises what the function does.
    """
    threads, place = torch.get_num_threads(), _place()

    def begin() -> None:
        # OpenMP keeps a number of its own for each thread.
        torch.set_num_threads(threads)
        _go_to(place)

    anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    with ThreadPoolExecutor(1, "fp8tune", begin) as worker:
        torch.autograd.set_detect_anomaly(False)
        try:
            yield lambda *args, **kwargs: worker.submit(*args, **kwargs).result()
        finally:
            stop.set()
            torch.autograd.set_detect_anomaly(*anomaly)


def _place() -> Any:
    if not torch.cuda.is_initialized():
        return None
    return torch.cuda.current_stream()


def _go_to(stream: Any) -> None:
    if stream is not None:
        torch.cuda.set_stream(stream)  # and to its device


class _StoppedError(BaseException):
    """Nobody waits for the times any more."""


class StoppableClock:
    """A clock that gives up where it is asked next, once ``stop`` is set."""

    def __init__(self, clock: Clock, stop: threading.Event) -> None:
        self._clock = clock
        self._stop = stop

    def warm_up(self, work: Sequence[Work]) -> None:
        """See Clock."""
        self._look()
        self._clock.warm_up(work)

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        """See Clock."""
        self._look()
        return self._clock.time_ms(work)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the clock can do."""
        return getattr(self._clock, name)

    def _look(self) -> None:
        if self._stop.is_set():
            raise _StoppedError
