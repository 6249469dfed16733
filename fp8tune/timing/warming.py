"""Running work until its compilation, autotuning and allocator growth are over."""

import time
from collections.abc import Callable

__all__ = ["warm_up"]

_FEWEST_CALLS = 3
# Work that never settles, as on a busy machine, is warm all the same after these.
_MOST_CALLS = 10
_SETTLED = 2.0


def warm_up(call: Callable[[], object]) -> int:
    """Call until two times in a row are at most twice the fastest so far.

    One would not do: the first call after compiling is always the fastest so far.

    Args:
        call: runs the work once, and returns when the device is done with it.

    Returns:
        The number of calls, 3 to 10.
    """
    seconds: list[float] = []
    while len(seconds) < _MOST_CALLS:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
        settled = max(seconds[-2:]) <= _SETTLED * min(seconds)
        if settled and len(seconds) >= _FEWEST_CALLS:
            break
    return len(seconds)
