"""The bytes of a cache file: its fields, and packing and unpacking them.

Described in docs/cache-format.md. An entry that cannot be true costs that entry and what
refers to it; the rest of the file holds.
"""

import reprlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from fp8tune.decision.coverage import Coverage
from fp8tune.decision.records import Layer, Measurement, Signature
from fp8tune.decision.trials import TrialRecord
from fp8tune.decision.watched import Fallen
from fp8tune.errors import CacheError
from fp8tune.store.bounds import check_environment
from fp8tune.store.codec import decode
from fp8tune.store.contents import Contents, Key, Recorded
from fp8tune.store.garbage import without_collecting
from fp8tune.store.sealing import UNSEALED, seal, unseal

__all__ = ["FORMAT", "FORMAT_VERSION", "pack", "unpack"]

FORMAT = "fp8tune-cache"

# Raised when a reader of the old format would misread the new one, or the other way
# round. tests/data keeps a file of every version.
#   1: the first.
#   2: runs say when they were saved, measurements how busy the machine was.
#   3: runs say what candidates are of the step's matrix products, and trials what roles
#      saved and their steps.
#   4: runs say which layers lost their accuracy while they trained.
#   5: layers and shapes say how many experts they have, and shapes how these lie in memory.
FORMAT_VERSION = 5

# (version, table, way to a record in its rows, field, what stands for it in files before).
_ADDED: tuple[tuple[int, str, str | None, str, Any], ...] = (
    (2, "runs", None, "saved", ""),
    (2, "measurements", "measurement", "load", None),
    (3, "runs", None, "coverage", None),
    (3, "runs", "trial", "roles", []),
    (3, "runs", "trial", "steps", {"first": 0, "plans": [], "ms": []}),
    (4, "runs", None, "fallen", []),
    (5, "layers", None, "experts", 0),
    (5, "signatures", "shape", "experts", 0),
    (5, "signatures", "shape", "transposed", False),
    (5, "measurements", "measurement.signature.shape", "experts", 0),
    (5, "measurements", "measurement.signature.shape", "transposed", False),
)

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)

_Calls = tuple[tuple[Signature, int], ...]

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
    trial: TrialRecord | None
    saved: str
    coverage: Coverage | None
    fallen: tuple[Fallen, ...]


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


@without_collecting()
def pack(contents: Contents) -> bytes:
    """The bytes of a file.

    Raises:
        CacheError: something cannot be written.
    """
    keys: dict[Key, int] = {}
    signatures: dict[Signature, int] = {}
    calls: dict[_Calls, int] = {}
    layers: dict[Layer, int] = {}
    measurements = tuple(
        _Measured(number, measurement)
        for key, by_signature in contents.measurements.items()
        for number in [_number(keys, key)]
        for measurement in by_signature.values()
    )
    runs = tuple(
        _Run(
            _number(keys, key),
            tuple(
                (_number(layers, bare), _number(calls, layer.calls))
                for bare, layer in zip(model, run.layers, strict=True)
            ),
            run.trial,
            run.saved,
            run.coverage,
            run.fallen,
        )
        for (key, model), run in contents.runs.items()
    )
    numbered_calls = tuple(
        tuple((_number(signatures, signature), count) for signature, count in row)
        for row in calls
    )
    return seal(
        _File(
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
    )


def _key(row: Any, at: str) -> Key:
    key = decode(Key, row, at)
    check_environment(key.environment)
    return key


def _number(table: dict[H, int], entry: H) -> int:
    """The entry's index in the table, at whose end it is put if it is new."""
    return table.setdefault(entry, len(table))


@without_collecting()
def unpack(data: bytes) -> Contents:
    """What a file holds, without the entries that cannot be true.

    Raises:
        CacheError: the file is damaged, or of a version that this one does not know.
    """
    document = unseal(data, FORMAT, range(1, FORMAT_VERSION + 1))
    return _Unpacking(_upgraded(document)).contents


def _upgraded(document: dict[str, Any]) -> dict[str, Any]:
    """A file of an earlier version with the fields of this one."""
    version = document["version"]
    for since, table, inner, name, value in _ADDED:
        for row in _rows(document, table) if version < since else ():
            fields = _inner(row, inner.split(".") if inner else ())
            if isinstance(fields, dict):
                fields[name] = value
    return document


def _inner(row: Any, names: Sequence[str]) -> Any:
    for name in names:
        row = cast("dict[str, Any]", row).get(name) if isinstance(row, dict) else None
    return row


def _rows(document: dict[str, Any], table: str) -> list[Any]:
    rows = document.get(table)
    return cast("list[Any]", rows) if isinstance(rows, list) else []


class _Unpacking:
    """One file while it is read, table by table; what is wrong is noted."""

    def __init__(self, document: dict[str, Any]) -> None:
        names = set(_File.__dataclass_fields__)
        if document.keys() != names:
            decode(_File, document, "")  # raises, and says what is missing
        self.contents = Contents()
        self._document = document
        self._keys = self._table("keys", _key)
        self._signatures = self._table("signatures", _signature)
        self._calls = self._table("calls", self._call)
        self._layers = self._table("layers", lambda x, at: decode(Layer, x, at))
        self._with_calls: dict[tuple[int, int], Layer] = {}
        self._table("measurements", self._measurement)
        self._table("runs", self._run)

    def _table(self, name: str, read: Callable[[Any, str], T]) -> list[T | None]:
        """Every row, or None in the place of one that cannot be true."""
        rows = self._document[name]
        if type(rows) is not list:
            raise CacheError(f"{name}: found {reprlib.repr(rows)}, expected a list")
        read_rows: list[T | None] = []
        for i, row in enumerate(cast("list[Any]", rows)):
            at = f"{name}[{i}]"
            try:
                read_rows.append(read(row, at))
            except CacheError as problem:
                said = str(problem)
                said = said if said.startswith(at) else f"{at}: {said}"
                self.contents.problems.append(said)
                read_rows.append(None)
        return read_rows

    def _call(self, row: Any, at: str) -> _Calls:
        numbers = decode(tuple[tuple[int, int], ...], row, at)
        return tuple((_pick(self._signatures, i, at), count) for i, count in numbers)

    def _measurement(self, row: Any, at: str) -> None:
        found = decode(_Measured, row, at)
        key = _pick(self._keys, found.key, f"{at}.key")
        self.contents.add_measurement(key, found.measurement)

    def _run(self, row: Any, at: str) -> None:
        found = decode(_Run, row, at)
        key = _pick(self._keys, found.key, f"{at}.key")
        layers = tuple([self._layer(x, f"{at}.layers") for x in found.layers])
        run = Recorded(layers, found.trial, found.saved, found.coverage, found.fallen)
        self.contents.add_run(key, run)

    def _layer(self, indexes: tuple[int, int], at: str) -> Layer:
        if indexes not in self._with_calls:
            bare = _pick(self._layers, indexes[0], at)
            calls = _pick(self._calls, indexes[1], at)
            self._with_calls[indexes] = replace(bare, calls=calls)
        return self._with_calls[indexes]


def _signature(row: Any, at: str) -> Signature:
    return decode(Signature, row, at)


def _pick(table: Sequence[T | None], index: int, where: str) -> T:
    if not 0 <= index < len(table):
        raise CacheError(f"{where}: found {index}, expected 0 to {len(table) - 1}")
    entry = table[index]
    if entry is None:
        raise CacheError(f"{where}: found {index}, which could not be read")
    return entry
