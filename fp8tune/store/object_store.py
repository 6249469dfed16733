"""The cache in a store that a fleet shares: one object for each run and environment.

Every object is a whole cache file of one run, under a name that follows from what the run
is found by. So jobs that write at once write different objects, or the same run, and need
no lock; what a reader sees is all objects merged. ``file://`` is a folder.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec

from fp8tune.decision.kinds import kind_of
from fp8tune.decision.records import Layer, Measurement
from fp8tune.errors import CacheError
from fp8tune.store.cache_file import pack, unpack
from fp8tune.store.codec import encode
from fp8tune.store.contents import Contents, Key, Recorded
from fp8tune.store.files import write_bytes

__all__ = ["ObjectStore"]

_logger = logging.getLogger("fp8tune")


class ObjectStore:
    """A folder of a file system that fsspec knows.

    Args:
        url: the folder, as "s3://bucket/fp8tune"; it need not be there yet.

    Raises:
        ValueError, ImportError: fsspec knows no such file system, or lacks a package.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        found: tuple[Any, str] = fsspec.url_to_fs(url)
        self._files, self._folder = found

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, Any]:
        # Connections stay here; ranks that get a copy open their own.
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])

    def read(self) -> Contents:
        """All objects merged; one that cannot be read is named in ``problems``.

        Raises:
            FileNotFoundError: there is none.
            Exception: whatever the file system raises.
        """
        objects, problems = self._objects()
        if not objects and not problems:
            raise FileNotFoundError(2, "No such folder, or nothing in it", self.url)
        merged = _merged(objects)
        merged.problems += problems
        return merged

    def update(self, change: Callable[[Contents], Contents]) -> Contents:
        """Write the objects of the runs that ``change`` adds, delete those it drops.

        Raises:
            CacheError: ``change`` raised it.
            Exception: whatever the file system raises.
        """
        objects, _ = self._objects()
        contents = change(_merged(objects))
        wanted = _split(contents)
        for name, one in wanted.items():
            if name not in objects or objects[name] != one:
                self._write(name, pack(one))
        for name in objects.keys() - wanted.keys():
            self._delete(name)
        return contents

    def _objects(self) -> tuple[dict[str, Contents], list[str]]:
        """What every object holds, by its name, and what could not be read."""
        self._files.invalidate_cache()
        if not self._files.exists(self._folder):
            return {}, []
        paths = [x for x in self._files.find(self._folder) if x.endswith(".json")]
        found: Mapping[str, Any] = (
            self._files.cat(paths, on_error="return") if paths else {}
        )
        objects: dict[str, Contents] = {}
        problems: list[str] = []
        for path, data in found.items():
            name = str(path).rsplit("/", 1)[-1]
            if isinstance(data, FileNotFoundError):  # deleted meanwhile
                continue
            try:
                objects[name] = unpack(_bytes(data))
                problems += [f"{name}: {x}" for x in objects[name].problems]
            except (OSError, CacheError) as problem:
                problems.append(f"{name}: {problem}")
        return objects, problems

    def _write(self, name: str, data: bytes) -> None:
        path = f"{self._folder}/{name}"
        if "file" in _protocols(self._files):
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            write_bytes(Path(path), data)
        else:
            # Where an object is put at once; elsewhere the checksum tells of a half one.
            self._files.makedirs(self._folder, exist_ok=True)
            self._files.pipe_file(path, data)

    def _delete(self, name: str) -> None:
        try:
            self._files.rm_file(f"{self._folder}/{name}")
        except FileNotFoundError:  # somebody else was faster
            _logger.debug("%s was deleted meanwhile", name)


def _bytes(data: object) -> bytes:
    if isinstance(data, OSError):
        raise data
    if not isinstance(data, bytes):
        raise OSError(f"{type(data).__name__}: {data}")
    return data


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else files.protocol


def _merged(objects: Mapping[str, Contents]) -> Contents:
    """All runs, the latest last, and their measurements."""
    merged = Contents()
    runs = [
        (run.saved, name, key, run, one)
        for name, one in objects.items()
        for (key, _), run in one.runs.items()
    ]
    for _, _, key, run, one in sorted(runs, key=lambda x: x[:2]):
        merged.add(key, run)
        for each, known in one.measurements.items():
            merged.measurements.setdefault(each, {}).update(known)
    return merged


def _split(contents: Contents) -> dict[str, Contents]:
    """One object for each run, with the measurements of what it was called with."""
    objects: dict[str, Contents] = {}
    for (key, model), run in contents.runs.items():
        one = objects[_name(key, model)] = Contents()
        one.add_run(key, run)
        for each, measurements in _of_run(contents, key, run).items():
            one.measurements[each] = measurements
    return objects


def _of_run(
    contents: Contents, key: Key, run: Recorded
) -> dict[Key, dict[Any, Measurement]]:
    called = {signature for layer in run.layers for signature, _ in layer.calls}
    # Other M of these kinds too, since they may stand for those of the run.
    kinds = {kind_of(x) for x in called}
    recipes = key.each()
    return {
        each: {x: y for x, y in known.items() if x in called or kind_of(x) in kinds}
        for each, known in contents.measurements.items()
        if each in recipes or each.whole in recipes
    }


def _name(key: Key, model: tuple[Layer, ...]) -> str:
    text = json.dumps(encode((key, model)))
    return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
