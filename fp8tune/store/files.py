"""Files that are written whole or not at all, and moved aside rather than lost."""

import itertools
import os
import shutil
import uuid
from pathlib import Path

__all__ = ["read_bytes", "set_aside", "write_bytes"]


def read_bytes(path: Path) -> bytes:
    """What a file holds.

    Raises:
        OSError: it is no file, there is none, or it cannot be read.
    """
    # Reading a pipe would wait for ever, and moving a device aside would be worse.
    if path.exists() and not path.is_file():
        raise OSError("found a folder, a pipe or a device, expected a file")
    return path.read_bytes()


def write_bytes(path: Path, data: bytes) -> None:
    """Put a new file in the place of the old one, in one step."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def set_aside(path: Path, *, keep: bool = False) -> Path:
    """Rename a file, or copy it, to a free name beside it, and return that name."""
    names = (f"{path.name}.unreadable-{number}" for number in itertools.count(1))
    target = next(
        path.with_name(name)
        for name in names
        if not os.path.lexists(path.with_name(name))
    )
    # Takes the name before anyone else can, since a rename overwrites what is there.
    target.touch(exist_ok=False)
    return Path(shutil.copy(path, target)) if keep else path.replace(target)
