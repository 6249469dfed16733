"""Files that are written whole or not at all, and moved aside rather than lost."""

import itertools
import os
import shutil
import uuid
from pathlib import Path

__all__ = ["set_aside", "write_bytes"]


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


def set_aside(path: Path) -> Path:
    """Rename a file to a free name beside it, and return that name."""
    names = (f"{path.name}.unreadable-{number}" for number in itertools.count(1))
    target = next(
        path.with_name(name)
        for name in names
        if not os.path.lexists(path.with_name(name))
    )
    # Takes the name before anyone else can, since a rename overwrites what is there.
    target.touch(exist_ok=False)
    return path.replace(target)
