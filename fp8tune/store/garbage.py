"""Python's garbage collector, held back while a large file is read or written."""

import contextlib
import gc
from collections.abc import Generator

__all__ = ["without_collecting"]


@contextlib.contextmanager
def without_collecting() -> Generator[None]:
    """Records refer to no circle, so looking for circles in a million of them finds none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
