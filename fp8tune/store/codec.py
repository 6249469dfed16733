"""Records to JSON and back, by their type hints; strict, so that damage is noticed.

::

    dataclass              <->  object with exactly the fields as keys
    tuple[X, ...]          <->  list of any length
    tuple[A, B]            <->  list of exactly two
    dict[str, X]           <->  object
    X | None               <->  X or null
    StrEnum                <->  its value
    int, float, bool, str  <->  themselves; neither NaN nor infinity

A type's hints are read once, into a function that decodes it: a cache of ten thousand runs
is a million values.
"""

from __future__ import annotations

import functools
import math
import reprlib
import types
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    NoReturn,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from fp8tune.errors import CacheError

if TYPE_CHECKING:
    from enum import StrEnum

__all__ = ["decode", "encode"]

T = TypeVar("T")

_Decoder = Callable[[Any], Any]

_EXPECTED: dict[type, str] = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
}

_AS_THEY_ARE = frozenset({int, str, bool, types.NoneType})


def encode(record: object) -> Any:
    """Turn a record into what ``json.dumps`` takes.

    Args:
        record: a dataclass, a tuple, a dict with strings as keys, a StrEnum, a finite
            number, a bool, a string or None, nested as deep as you like.

    Returns:
        dicts, lists, numbers, bools, strings and None.

    Raises:
        CacheError: something in the record is none of these.
    """
    kind = type(record)
    if kind in _AS_THEY_ARE or (kind is float and math.isfinite(cast("float", record))):
        return record
    if kind is tuple:
        items = cast("tuple[object, ...]", record)
        return list(items) if _are_floats(items) else [encode(x) for x in items]
    names = _names(kind)
    if names:
        return {name: encode(getattr(record, name)) for name in names}
    return _encode_other(record)


def _are_floats(values: Any) -> bool:
    """Whether all are finite floats, at once: most of a file is times.

    A sum that overflows says no to what may be finite; then each is looked at.
    """
    return set(map(type, values)) == {float} and math.isfinite(sum(values))


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(_hints(kind)) if is_dataclass(kind) else ()


def _encode_other(value: object) -> Any:
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str):  # a StrEnum, or a version that is a string
        return str(value)
    if isinstance(value, tuple):
        return [encode(item) for item in cast("tuple[object, ...]", value)]
    if isinstance(value, dict):
        items = cast("dict[str, object]", value).items()
        return {str(key): encode(item) for key, item in items}
    raise CacheError(
        f"found {reprlib.repr(value)} of type {type(value).__name__}, expected a "
        "record, a tuple, a finite number, a bool, a string or None to write to JSON"
    )


def decode(kind: type[T], value: object, where: str) -> T:
    """Turn what ``json.loads`` gave back into a record.

    Args:
        kind: the type to make, as it would stand in a type hint.
        value: what stands in the file.
        where: the place of the value in the file, such as "measurements[3]", for
            errors; "" is the whole file.

    Returns:
        the record. Fields that have defaults must be present all the same.

    Raises:
        CacheError: the value does not fit; the message names the place, what was found
            and what was expected.
    """
    try:
        return cast("T", _decoder(kind)(value))
    except _MisfitError as misfit:
        place = (where + misfit.place).lstrip(".") or "the top level"
        raise CacheError(
            f"{place}: found {misfit.found}, expected {misfit.expected}"
        ) from None


class _MisfitError(Exception):
    """A value that does not fit; its place grows while the error travels outwards."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(found, expected)
        self.found = found
        self.expected = expected
        self.place = ""


def _wrong(value: object, expected: str) -> NoReturn:
    # reprlib shortens: a damaged file may hold a value of any size and depth here.
    raise _MisfitError(reprlib.repr(value), expected)


@functools.cache
def _decoder(kind: Any) -> _Decoder:
    """What turns a value into this type, or raises _MisfitError."""
    if kind is float:
        return _decode_float
    if kind in _EXPECTED:
        return functools.partial(_decode_scalar, kind)
    origin = get_origin(kind)
    if origin is not None:
        return _DECODERS[origin](get_args(kind))
    return _record_decoder(kind) if is_dataclass(kind) else _enum_decoder(kind)


def _decode_scalar(kind: type, value: Any) -> Any:
    # Not isinstance: a bool is an int to Python, but not to the file.
    return value if type(value) is kind else _wrong(value, _EXPECTED[kind])


def _decode_float(value: Any) -> float:
    if type(value) is float and -math.inf < value < math.inf:
        return value
    try:
        number = float(value) if type(value) is int else math.nan
    except OverflowError:
        number = math.inf
    return number if math.isfinite(number) else _wrong(value, _EXPECTED[float])


def _tuple_decoder(kinds: tuple[Any, ...]) -> _Decoder:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        decode_each = _list_decoder(_decoder(kinds[0]))
        return _floats_decoder(decode_each) if kinds[0] is float else decode_each
    decoders = [_decoder(kind) for kind in kinds]

    def decode_tuple(value: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            _wrong(value, "a list")
        if len(value) != len(decoders):
            _wrong(value, f"a list of {len(decoders)}")
        return tuple(_each(zip(_indexes(), decoders, value, strict=False)))

    return decode_tuple


def _floats_decoder(decode_each: _Decoder) -> _Decoder:
    def decode_floats(value: Any) -> tuple[float, ...]:
        plain = type(value) is list and _are_floats(value)
        return tuple(value) if plain else decode_each(value)

    return decode_floats


def _list_decoder(decoder: _Decoder) -> _Decoder:
    def decode_list(value: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            _wrong(value, "a list")
        try:
            return tuple([decoder(item) for item in value])
        except _MisfitError:  # once more, to say which
            return tuple(_each((f"[{i}]", decoder, x) for i, x in enumerate(value)))

    return decode_list


def _indexes() -> Iterable[str]:
    return (f"[{i}]" for i in range(2**31))


def _each(parts: Iterable[tuple[str, _Decoder, Any]]) -> list[Any]:
    """Decode each part; an error gets the place of its part."""
    done: list[Any] = []
    for place, decoder, value in parts:
        try:
            done.append(decoder(value))
        except _MisfitError as misfit:
            misfit.place = place + misfit.place
            raise
    return done


def _dict_decoder(kinds: tuple[Any, ...]) -> _Decoder:
    decoder = _decoder(kinds[1])

    def decode_dict(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            _wrong(value, "an object")
        items = cast("dict[str, Any]", value)
        done = _each((f".{name}", decoder, item) for name, item in items.items())
        return dict(zip(items, done, strict=True))

    return decode_dict


def _optional_decoder(kinds: tuple[Any, ...]) -> _Decoder:
    (kind,) = [kind for kind in kinds if kind is not types.NoneType]
    decoder = _decoder(kind)
    return lambda value: None if value is None else decoder(value)


_DECODERS: dict[Any, Callable[[tuple[Any, ...]], _Decoder]] = {
    tuple: _tuple_decoder,
    dict: _dict_decoder,
    Union: _optional_decoder,
    types.UnionType: _optional_decoder,
}


def _record_decoder(kind: Any) -> _Decoder:
    hints = _hints(kind)
    names = hints.keys()
    decoders = [(name, _decoder(hint)) for name, hint in hints.items()]

    def decode_record(value: Any) -> Any:
        if type(value) is not dict:
            _wrong(value, f"an object with the keys {', '.join(hints)}")
        if value.keys() != names:
            _wrong_keys(cast("dict[str, Any]", value), hints)
        try:
            return kind(*[of(value[name]) for name, of in decoders])
        except _MisfitError:  # once more, to say which
            return _each((f".{name}", of, value[name]) for name, of in decoders)

    return decode_record


def _enum_decoder(kind: type[StrEnum]) -> _Decoder:
    known = {member.value: member for member in kind}

    def decode_enum(value: Any) -> StrEnum:
        if type(value) is not str or value not in known:
            _wrong(value, f"one of {', '.join(map(repr, known))}")
        return known[value]

    return decode_enum


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _wrong_keys(value: dict[str, Any], hints: dict[str, Any]) -> NoReturn:
    unknown = [repr(name) for name in value if name not in hints]
    missing = [repr(name) for name in hints if name not in value]
    found = f"unknown keys {', '.join(unknown)}" if unknown else "an object"
    lacking = f" without {', '.join(missing)}" if missing else ""
    raise _MisfitError(found + lacking, f"exactly the keys {', '.join(hints)}")
