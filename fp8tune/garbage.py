"""Python's garbage collection, paused where it costs more than it frees."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["no_collection"]


@contextmanager
def no_collection() -> Generator[None]:
    """Pause the collection of reference cycles; where the user disabled it, it stays so.

    A full collection looks at all objects of the process, some tenths of a second with
    torch imported. Many new objects make Python look for garbage among them again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
