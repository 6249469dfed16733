"""The cache in one local file, which writers change under a lock."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from fp8tune.errors import CacheError
from fp8tune.store.cache_file import pack, unpack
from fp8tune.store.contents import Contents
from fp8tune.store.files import read_bytes, set_aside, write_bytes

__all__ = ["LOCK_TIMEOUT_S", "LocalFile"]

# Seconds to wait for another writer, who needs the lock for well under one.
LOCK_TIMEOUT_S = 10.0

_logger = logging.getLogger("fp8tune")


class LocalFile:
    """A file, of which readers need no lock.

    Args:
        path: the file; it need not be there yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # The file itself rather than a link to it, which os.replace would overwrite;
        # absolute, since training may change the working directory before it saves.
        self.path = Path(os.path.realpath(path))
        self._known: tuple[tuple[int, ...], Contents] | None = None

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> Contents:
        """What the file holds.

        Raises:
            FileNotFoundError: there is none.
            OSError, CacheError: it cannot be read.
        """
        stamp = self._stamp()
        contents = unpack(read_bytes(self.path))
        self._known = stamp, contents
        return contents

    def _stamp(self) -> tuple[int, ...]:
        """What changes with the file: every writer puts a new one in its place."""
        found = self.path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def update(self, change: Callable[[Contents], Contents]) -> Contents:
        """Put what ``change`` makes of the contents in their place.

        What cannot be read of the file is set aside under another name first.

        Raises:
            OSError: another writer holds the lock, or the file cannot be written.
            CacheError: ``change`` raised it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock():
            before, self._known = self._read_or_set_aside(), None
            contents = change(before)
            write_bytes(self.path, pack(contents))
            self._known = self._stamp(), contents
        return contents

    def _lock(self) -> FileLock:
        return FileLock(f"{self.path}.lock", timeout=LOCK_TIMEOUT_S)

    def _read_or_set_aside(self) -> Contents:
        try:
            known = self._known
            # A large file takes longer to read than anything else here.
            unchanged = known is not None and known[0] == self._stamp()
            contents = known[1] if known and unchanged else self.read()
        except FileNotFoundError:
            return Contents()
        except CacheError as problem:
            _logger.warning(
                "the cache %s could not be read: %s; it was moved to %s, and a new "
                "file takes its place",
                self.path,
                problem,
                set_aside(self.path),
            )
            return Contents()
        if contents.problems:
            _logger.warning(
                "the cache %s goes on without what could not be read of it; the file as "
                "it was is %s",
                self.path,
                set_aside(self.path, keep=True),
            )
            contents.problems.clear()
        return contents
