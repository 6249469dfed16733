"""Timings of earlier runs, in one JSON file for many models, GPUs and recipes.

The file is described in docs/cache-format.md. Whatever is wrong with it, or with the
disk, costs a warning and some timing, never the training run.
"""

import itertools
import logging
import math
import os
import shutil
import uuid
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from fp8tune.codec import UNSEALED, encode, seal, unseal
from fp8tune.errors import CacheError
from fp8tune.records import Layer, Measurement, Signature

__all__ = ["FORMAT", "FORMAT_VERSION", "LOCK_TIMEOUT_S", "Cache", "Key"]

FORMAT = "fp8tune-cache"

# Raised when a reader of the old format would misread the new one, or the other way
# round. tests/data keeps a file of every version.
#   1: the first.
FORMAT_VERSION = 1

# Seconds to wait for another writer, who needs the lock for well under one.
LOCK_TIMEOUT_S = 30.0

_logger = logging.getLogger("fp8tune")

T = TypeVar("T", bound=Hashable)

_Calls = tuple[tuple[Signature, int], ...]


@dataclass(frozen=True)
class Key:
    """What a measurement is true of, besides its signature.

    Attributes:
        environment: (field, value) pairs such as ("torch", "2.13.0"); kept sorted.
        recipe: name of the recipe.
        settings: the recipe's configuration in words.
        timing: "compiled" or "eager".
    """

    environment: tuple[tuple[str, str], ...]
    recipe: str
    settings: str
    timing: str

    def __post_init__(self) -> None:
        # Plain strings: torch.__version__ is of a subclass that compares as a version.
        pairs = sorted((str(name), str(value)) for name, value in self.environment)
        object.__setattr__(self, "environment", tuple(pairs))


class Cache:
    """One cache file: read when this is made, merged with what is there when saved."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # The file itself rather than a link to it, which os.replace would overwrite;
        # absolute, since training may change the working directory before it saves.
        self.path = Path(os.path.realpath(path))
        self._why_empty = f"the cache {self.path} is empty"
        self._contents = self._load()

    def measurements(self, key: Key) -> dict[Signature, Measurement]:
        """What was measured under this key."""
        return dict(self._contents.measurements.get(key, {}))

    def layers(self, key: Key, layers: tuple[Layer, ...]) -> tuple[Layer, ...] | None:
        """The same model's layers with their calls, as its latest run recorded them.

        Args:
            key: what the run must have been made under.
            layers: the model; calls are not looked at.

        Returns:
            the layers, or None unless there is such a run and a measurement of every
            signature in its calls.
        """
        run = self._contents.runs.get((key, _without_calls(layers)))
        return None if run is None or self._unmeasured(key, run) else run

    def explain_miss(self, key: Key, layers: tuple[Layer, ...]) -> str:
        """One line that says how the nearest recorded run differs from this one.

        Args:
            key: what this run is made under.
            layers: the model; calls are not looked at.
        """
        if not self._contents.runs:
            return self._why_empty
        model = _without_calls(layers)
        # The latest first, so that it wins where two are equally near.
        differences = [
            (_key_differences(old_key, key), _layer_differences(old_model, model))
            for old_key, old_model in reversed(self._contents.runs)
        ]
        of_key, of_layers = min(differences, key=lambda pair: len(pair[0] + pair[1]))
        lines = of_key + of_layers[:1]
        if len(of_layers) > 1:
            lines.append(f"{len(of_layers) - 1} more differences in the layers")
        return "; ".join(lines) or self._explain_unmeasured(key, model)

    def save(
        self, key: Key, layers: tuple[Layer, ...], measurements: Iterable[Measurement]
    ) -> None:
        """Add a run to the file; what other processes wrote meanwhile is kept.

        Args:
            key: what the run was made under.
            layers: the model, with calls; replaces its earlier run under this key.
            measurements: replace earlier ones of the same key and signature. Failed
                ones are not saved, so that the next run tries again.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=LOCK_TIMEOUT_S):
                contents = self._read_or_set_aside()
                contents.add(key, layers, measurements)
                _write(self.path, seal(_pack(contents)))
        except (OSError, CacheError) as problem:  # a filelock.Timeout is an OSError
            _logger.warning(
                "the cache %s was not saved: %s; training goes on, and the next run "
                "times these layers again",
                self.path,
                problem,
            )
        else:
            self._contents = contents

    def _load(self) -> "_Contents":
        try:
            return _read(self.path)
        except FileNotFoundError:
            self._why_empty = f"there is no file {self.path} yet"
        except (OSError, CacheError) as problem:
            self._why_empty = f"the cache {self.path} could not be read"
            _logger.warning(
                "the cache %s could not be read: %s; it counts as empty, and the "
                "layers are timed again",
                self.path,
                problem,
            )
        return _Contents()

    def _read_or_set_aside(self) -> "_Contents":
        try:
            return _read(self.path)
        except FileNotFoundError:
            return _Contents()
        except CacheError as problem:
            _logger.warning(
                "the cache %s could not be read: %s; it was moved to %s, and a new "
                "file takes its place",
                self.path,
                problem,
                _set_aside(self.path),
            )
            return _Contents()

    def _unmeasured(self, key: Key, run: tuple[Layer, ...]) -> list[Signature]:
        measured = self._contents.measurements.get(key, {})
        called = {signature for layer in run for signature, _ in layer.calls}
        return [signature for signature in called if signature not in measured]

    def _explain_unmeasured(self, key: Key, model: tuple[Layer, ...]) -> str:
        missing = self._unmeasured(key, self._contents.runs[key, model])
        shapes = sorted(f"M={x.shape.m} K={x.shape.k} N={x.shape.n}" for x in missing)
        if not shapes:
            return "nothing differs"
        return f"{len(shapes)} signatures have no measurement, such as {shapes[0]}"


@dataclass
class _Contents:
    """What a file holds. A run is found by its key and its layers without calls."""

    measurements: dict[Key, dict[Signature, Measurement]] = field(default_factory=dict)
    runs: dict[tuple[Key, tuple[Layer, ...]], tuple[Layer, ...]] = field(
        default_factory=dict
    )

    def add(
        self, key: Key, layers: tuple[Layer, ...], measurements: Iterable[Measurement]
    ) -> None:
        for measurement in measurements:
            self.add_measurement(key, measurement)
        self.add_run(key, layers)

    def add_measurement(self, key: Key, measurement: Measurement) -> None:
        if measurement.failure is not None:
            return
        _check_times(measurement)
        self.measurements.setdefault(key, {})[measurement.signature] = measurement

    def add_run(self, key: Key, layers: tuple[Layer, ...]) -> None:
        model = _without_calls(layers)
        self.runs.pop((key, model), None)  # so that the latest run comes last
        self.runs[key, model] = layers


# The file, field by field. Indexes count from 0 in the table that is named; what many
# layers share is written once.


@dataclass(frozen=True)
class _Measured:
    key: int  # index in keys
    measurement: Measurement


@dataclass(frozen=True)
class _Run:
    key: int  # index in keys
    layers: tuple[tuple[int, int], ...]  # (index in layers, index in calls)


@dataclass(frozen=True)
class _File:
    format: str
    version: int
    sha256: str
    keys: tuple[Key, ...]
    signatures: tuple[Signature, ...]
    calls: tuple[tuple[tuple[int, int], ...], ...]  # (index in signatures, how often)
    layers: tuple[Layer, ...]  # without calls
    measurements: tuple[_Measured, ...]
    runs: tuple[_Run, ...]


def _pack(contents: _Contents) -> _File:
    keys: dict[Key, int] = {}
    signatures: dict[Signature, int] = {}
    calls: dict[_Calls, int] = {}
    layers: dict[Layer, int] = {}
    measurements = tuple(
        _Measured(_number(keys, key), measurement)
        for key, by_signature in contents.measurements.items()
        for measurement in by_signature.values()
    )
    runs = tuple(
        _Run(_number(keys, key), _pack_run(model, run, layers, calls))
        for (key, model), run in contents.runs.items()
    )
    numbered_calls = tuple(
        tuple((_number(signatures, signature), count) for signature, count in row)
        for row in calls
    )
    return _File(
        format=FORMAT,
        version=FORMAT_VERSION,
        sha256=UNSEALED,
        keys=tuple(keys),
        signatures=tuple(signatures),
        calls=numbered_calls,
        layers=tuple(layers),
        measurements=measurements,
        runs=runs,
    )


def _pack_run(
    model: tuple[Layer, ...],
    run: tuple[Layer, ...],
    layers: dict[Layer, int],
    calls: dict[_Calls, int],
) -> tuple[tuple[int, int], ...]:
    return tuple(
        (_number(layers, bare), _number(calls, layer.calls))
        for bare, layer in zip(model, run, strict=True)
    )


def _number(table: dict[T, int], entry: T) -> int:
    """The entry's index in the table, at whose end it is put if it is new."""
    return table.setdefault(entry, len(table))


def _unpack(file: _File) -> _Contents:
    contents = _Contents()
    for i, row in enumerate(file.measurements):
        key = _pick(file.keys, row.key, f"measurements[{i}].key")
        contents.add_measurement(key, row.measurement)
    calls = [
        tuple(
            (_pick(file.signatures, index, f"calls[{i}]"), count)
            for index, count in row
        )
        for i, row in enumerate(file.calls)
    ]
    for i, row in enumerate(file.runs):
        where = f"runs[{i}].layers"
        run = tuple(
            replace(_pick(file.layers, layer, where), calls=_pick(calls, called, where))
            for layer, called in row.layers
        )
        contents.add_run(_pick(file.keys, row.key, f"runs[{i}].key"), run)
    return contents


def _pick(table: Sequence[T], index: int, where: str) -> T:
    if not 0 <= index < len(table):
        raise CacheError(f"{where}: found {index}, expected 0 to {len(table) - 1}")
    return table[index]


def _check_times(measurement: Measurement) -> None:
    """Times that a speedup can be computed from, so that no reader has to check."""
    times = measurement.reference_ms + measurement.candidate_ms
    paired = len(measurement.reference_ms) == len(measurement.candidate_ms)
    if not (paired and all(0 < time < math.inf for time in times)):
        raise CacheError(
            f"the times of {measurement.signature} are {measurement.reference_ms} and "
            f"{measurement.candidate_ms}, expected pairs of finite ones above 0 ms"
        )


def _without_calls(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return tuple([replace(layer, calls=()) for layer in layers])


def _key_differences(old: Key, new: Key) -> list[str]:
    environment = _differences(
        "environment.", dict(old.environment), dict(new.environment)
    )
    rest = [{**encode(key), "environment": None} for key in (old, new)]
    return environment + _differences("", *rest)


def _layer_differences(old: tuple[Layer, ...], new: tuple[Layer, ...]) -> list[str]:
    if old == new:
        return []
    recorded = {layer.fqn: layer for layer in old}
    present = {layer.fqn: layer for layer in new}
    lines: list[str] = []
    for fqn in recorded | present:
        if fqn not in recorded:
            lines.append(f"{fqn} is new")
        elif fqn not in present:
            lines.append(f"{fqn} is gone")
        elif recorded[fqn] != present[fqn]:
            pair = encode(recorded[fqn]), encode(present[fqn])
            lines += _differences(f"{fqn}.", *pair)
    return lines or ["the layers come in another order"]


def _differences(
    prefix: str, old: Mapping[str, object], new: Mapping[str, object]
) -> list[str]:
    return [
        f"{prefix}{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def _read(path: Path) -> _Contents:
    # Reading a pipe would wait for ever, and moving a device aside would be worse.
    if path.exists() and not path.is_file():
        raise OSError("found a folder or a device, expected a file")
    return _unpack(unseal(_File, path.read_bytes(), FORMAT, FORMAT_VERSION))


def _write(path: Path, data: bytes) -> None:
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


def _set_aside(path: Path) -> Path:
    names = (f"{path.name}.unreadable-{number}" for number in itertools.count(1))
    target = next(
        path.with_name(name)
        for name in names
        if not os.path.lexists(path.with_name(name))
    )
    # Takes the name before anyone else can, since a rename overwrites what is there.
    target.touch(exist_ok=False)
    return path.replace(target)
