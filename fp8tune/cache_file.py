"""The cache file itself: its fields, and reading, writing and setting it aside.

Described in docs/cache-format.md. Raises OSError and CacheError; what to do about them is
the business of ``fp8tune.cache``.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from fp8tune.cache_checks import check_date, check_times
from fp8tune.codec import UNSEALED, seal, unseal
from fp8tune.errors import CacheError
from fp8tune.files import write_bytes
from fp8tune.records import Layer, Measurement, Signature
from fp8tune.trial_records import TrialRecord

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "Contents",
    "Key",
    "read_file",
    "without_calls",
    "write_file",
]

FORMAT = "fp8tune-cache"

# Raised when a reader of the old format would misread the new one, or the other way
# round. tests/data keeps a file of every version.
#   1: the first.
FORMAT_VERSION = 1

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
        also: (name, settings) of the further recipes that a run chose among; of a
            measurement it is empty.
    """

    environment: tuple[tuple[str, str], ...]
    recipe: str
    settings: str
    timing: str
    also: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        # Plain strings: torch.__version__ is of a subclass that compares as a version.
        pairs = sorted((str(name), str(value)) for name, value in self.environment)
        object.__setattr__(self, "environment", tuple(pairs))

    def each(self) -> tuple["Key", ...]:
        """The key of each recipe alone, under which its measurements are."""
        alone = replace(self, also=())
        others = [replace(alone, recipe=x, settings=y) for x, y in self.also]
        return (alone, *others)

    def of(self, measurement: Measurement) -> "Key":
        """The key that a measurement of this run belongs to."""
        each = self.each()
        return next((x for x in each if x.recipe == measurement.recipe), each[0])

    @property
    def label(self) -> str:
        """The names of all recipes."""
        return ", ".join([self.recipe, *(name for name, _ in self.also)])

    @property
    def all_settings(self) -> str:
        """The configurations of all recipes."""
        return "; ".join([self.settings, *(settings for _, settings in self.also)])


@dataclass
class Contents:
    """What a file holds. A run is found by its key and its layers without calls."""

    measurements: dict[Key, dict[Signature, Measurement]] = field(default_factory=dict)
    runs: dict[tuple[Key, tuple[Layer, ...]], tuple[Layer, ...]] = field(
        default_factory=dict
    )

    trials: dict[tuple[Key, tuple[Layer, ...]], TrialRecord] = field(
        default_factory=dict
    )

    def add(
        self,
        key: Key,
        layers: tuple[Layer, ...],
        measurements: Iterable[Measurement],
        trial: TrialRecord | None = None,
    ) -> None:
        """Add a run and what it measured."""
        for measurement in measurements:
            self.add_measurement(key.of(measurement), measurement)
        self.add_run(key, layers, trial)

    def of_run(self, key: Key) -> tuple[Measurement, ...]:
        """What is known of each recipe of a run."""
        found = (self.measurements.get(each, {}) for each in key.each())
        return tuple(x for by_signature in found for x in by_signature.values())

    def unmeasured(
        self, key: Key, run: tuple[Layer, ...]
    ) -> set[tuple[Signature, Key]]:
        """What a run was called with that is not known of one of its recipes."""
        missing: set[tuple[Signature, Key]] = set()
        # Many layers share few kinds of calls.
        kinds = {(layer.calls, layer.excluded) for layer in run}
        for each in key.each():
            known = self.measurements.get(each, {})
            for calls, excluded in kinds:
                if each.recipe not in dict(excluded):
                    missing |= {(x, each) for x, _ in calls if x not in known}
        return missing

    def add_measurement(self, key: Key, measurement: Measurement) -> None:
        """Add or replace one measurement; failed ones are not kept."""
        if measurement.failure is not None:
            return
        check_times(measurement)
        check_date(measurement.recorded)
        self.measurements.setdefault(key, {})[measurement.signature] = measurement

    def add_run(
        self, key: Key, layers: tuple[Layer, ...], trial: TrialRecord | None = None
    ) -> None:
        """Add a run, which replaces the earlier one of the same model and key."""
        model = without_calls(layers)
        self.runs.pop((key, model), None)  # so that the latest run comes last
        self.runs[key, model] = layers
        self.trials.pop((key, model), None)
        if trial is not None:
            self.trials[key, model] = trial


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


def _pack(contents: Contents) -> _File:
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
        _Run(
            _number(keys, key),
            _pack_run(model, run, layers, calls),
            contents.trials.get((key, model)),
        )
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


def _unpack(file: _File) -> Contents:
    contents = Contents()
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
        key = _pick(file.keys, row.key, f"runs[{i}].key")
        contents.add_run(key, run, row.trial)
    return contents


def _pick(table: Sequence[T], index: int, where: str) -> T:
    if not 0 <= index < len(table):
        raise CacheError(f"{where}: found {index}, expected 0 to {len(table) - 1}")
    return table[index]


def without_calls(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The model alone, which is what a run is found by."""
    return tuple([replace(layer, calls=()) for layer in layers])


def read_file(path: Path) -> Contents:
    """What a file holds.

    Raises:
        CacheError: the file is damaged or of another version.
        OSError: there is no file, or it cannot be read.
    """
    # Reading a pipe would wait for ever, and moving a device aside would be worse.
    if path.exists() and not path.is_file():
        raise OSError("found a folder or a device, expected a file")
    return _unpack(unseal(_File, path.read_bytes(), FORMAT, FORMAT_VERSION))


def write_file(path: Path, contents: Contents) -> None:
    """Put a new file in the place of the old one, in one step."""
    write_bytes(path, seal(_pack(contents)))
