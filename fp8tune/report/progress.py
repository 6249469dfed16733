"""How far timing has come: a line in the log per signature, a bar on a terminal.

Both belong to the logger's INFO level, so a logger at WARNING is silent.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from rich.progress import Progress as Bar
    from rich.progress import TaskID

__all__ = ["Progress", "log_level", "time_left"]

logger = logging.getLogger("fp8tune")


class Progress:
    """Use it around the timing, as ``with Progress(len(signatures)) as progress``.

    Args:
        total: signatures to time.
        shown: False on ranks that say nothing.
        stream: where a bar goes if it is a terminal; by default stderr.
        now: seconds that only grow.
    """

    def __init__(
        self,
        total: int,
        *,
        shown: bool = True,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._shown = shown and logger.isEnabledFor(logging.INFO)
        self._now = now
        self._started = now()
        self._done = 0
        target: TextIO = stream or sys.stderr
        self._bar = _bar(target) if self._shown and target.isatty() else None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        """Show the bar, where there is one."""
        if self._bar:
            self._task = self._bar.add_task("timing", total=self._total, left="")
            self._bar.start()
            self._bar.refresh()
        return self

    def __exit__(self, *args: object) -> None:
        """Take the bar away; the lines stay."""
        if self._bar:
            self._bar.stop()

    def begin(self, what: str) -> None:
        """The next signature is being timed."""
        if self._bar and self._task is not None:
            elapsed = self._now() - self._started
            left = time_left(elapsed, self._done, self._total)
            self._bar.update(
                self._task, description=what, completed=self._done, left=left
            )
            self._bar.refresh()

    def end(self, line: str) -> None:
        """The signature is timed; log the line."""
        self._done += 1
        if not self._shown:
            return
        # A handler may write to the same terminal, which must not end inside the bar.
        if self._bar:
            self._bar.stop()
        logger.info("[%d/%d] %s", self._done, self._total, line)
        if self._bar:
            self._bar.start()


@contextmanager
def log_level(level: int) -> Generator[None]:
    """For commands: fp8tune's logger at a level, unless the user chose one."""
    before = logger.level
    if before == logging.NOTSET:
        logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def _bar(stream: TextIO) -> Bar:
    # Imported only where it is shown.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.description}", markup=False),
    )
    # No thread that redraws: it would take time from what is being timed.
    return Bar(
        *columns,
        console=Console(file=stream),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def time_left(elapsed: float, done: int, total: int) -> str:
    """Such as "about 90 s left", if the rest takes as long as what is done; "" at first."""
    if not done:
        return ""
    seconds = elapsed / done * (total - done)
    if seconds < 120:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left"
