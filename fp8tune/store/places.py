"""Where a cache lies: a local file, or a store that fsspec knows by its URL."""

import os
import re
from collections.abc import Callable
from typing import Protocol

from fp8tune.errors import ConfigError
from fp8tune.store.contents import Contents
from fp8tune.store.local_file import LocalFile

__all__ = ["Place", "check_place", "place_of"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://|[A-Za-z][A-Za-z0-9+.\-]*::")

_EXPECTED = (
    "it must be the path of a JSON file, or a URL that fsspec knows, such as "
    "s3://bucket/folder or file:///folder"
)


class Place(Protocol):
    """Where a cache lies. Its text is what messages call it."""

    def read(self) -> Contents:
        """What is there.

        Raises:
            FileNotFoundError: nothing.
            Exception: it cannot be read.
        """
        ...

    def update(self, change: Callable[[Contents], Contents]) -> Contents:
        """Put what ``change`` makes of the contents in their place, and return it."""
        ...


def place_of(cache: str | os.PathLike[str]) -> Place:
    """The place that a user means.

    Args:
        cache: a path, in which ~ is the user's home, or a URL.

    Raises:
        ConfigError: it is neither, or a package for it is missing.
    """
    text = _text(cache)
    if not _URL.match(text):
        return LocalFile(os.path.expanduser(text))  # noqa: PTH111 - Path would tidy it
    # Imported where it is wanted: it takes a tenth of a second.
    from fp8tune.store.object_store import ObjectStore  # noqa: PLC0415

    try:
        return ObjectStore(text)
    except ImportError as problem:
        raise ConfigError(
            f"cache is {text!r}, for which a package is missing: {problem}"
        ) from problem
    except ValueError as problem:
        raise ConfigError(f"cache is {text!r} ({problem}); {_EXPECTED}") from problem


def check_place(cache: object) -> None:
    """Refuse what cannot be a place; looks at nothing.

    Raises:
        ConfigError: says what it is and what it must be.
    """
    if cache is not None:
        place_of(cache)  # pyright: ignore[reportArgumentType]


def _text(cache: str | os.PathLike[str]) -> str:
    text: object = cache
    if isinstance(cache, os.PathLike):
        text = os.fspath(cache)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"cache is {cache!r}; {_EXPECTED}")
    return text
