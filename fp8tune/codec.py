"""Records to JSON and back, by their type hints; strict, so that damage is noticed.

::

    dataclass              <->  object with exactly the fields as keys
    tuple[X, ...]          <->  list of any length
    tuple[A, B]            <->  list of exactly two
    dict[str, X]           <->  object
    X | None               <->  X or null
    StrEnum                <->  its value
    int, float, bool, str  <->  themselves; neither NaN nor infinity

``seal`` and ``unseal`` are for whole files, whose record starts with the fields
``format``, ``version`` and ``sha256``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import reprlib
import types
from dataclasses import fields, is_dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Never,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from fp8tune.errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Callable
    from enum import StrEnum

__all__ = ["UNSEALED", "decode", "encode", "seal", "unseal"]

T = TypeVar("T")

# What stands for the checksum while it is computed. A checksum of the file's bytes, not
# of its values, catches every changed byte, be it only a space; since it stands in the
# file itself, its own 64 digits are taken as zeros.
UNSEALED = "0" * 64

_EXPECTED: dict[type, str] = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
}


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
    if record is None or type(record) in (int, str, bool):
        return record
    if isinstance(record, tuple):
        return [encode(item) for item in cast("tuple[object, ...]", record)]
    if is_dataclass(record):
        return {name: encode(getattr(record, name)) for name in _hints(type(record))}
    if isinstance(record, dict):
        items = cast("dict[str, object]", record).items()
        return {str(key): encode(item) for key, item in items}
    return _encode_scalar(record)


def _encode_scalar(value: object) -> Any:
    if isinstance(value, str):  # a StrEnum, or a version that is a string
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return value
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
    return cast("T", _decode(kind, value, where))


def seal(record: object) -> bytes:
    """Write a whole file, in ASCII, with one entry of each list a line.

    Args:
        record: a dataclass whose field ``sha256`` is ``UNSEALED``; no field before it
            may hold that string.

    Raises:
        CacheError: something in the record cannot be written.
    """
    members = [f'"{name}": {_lines(value)}' for name, value in encode(record).items()]
    data = ("{\n" + ",\n".join(members) + "\n}\n").encode("ascii")
    digest = hashlib.sha256(data).hexdigest()
    return data.replace(UNSEALED.encode(), digest.encode(), 1)


def _lines(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(map(json.dumps, cast("list[Any]", value))) + "\n]"


def unseal(kind: type[T], data: bytes, format_name: str, version: int) -> T:
    """Read a whole file that ``seal`` wrote.

    Args:
        kind: the dataclass that was written.
        data: the file.
        format_name: what its field ``format`` must be.
        version: what its field ``version`` must be.

    Raises:
        CacheError: the file is damaged, or of another format or version.
    """
    try:
        document: Any = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise CacheError(f"found no JSON in UTF-8 ({problem})") from problem
    if type(document) is not dict:
        _wrong(document, "an object", "")
    # Before the checksum, which another version may compute in another way.
    _require(document, "format", format_name)
    _require(document, "version", version)
    digest = decode(str, document.get("sha256"), "sha256")
    unsealed = data.replace(digest.encode("utf-8", "replace"), UNSEALED.encode(), 1)
    if digest != hashlib.sha256(unsealed).hexdigest():
        raise CacheError("the checksum does not match: bytes of the file have changed")
    return decode(kind, document, "")


def _require(document: dict[str, Any], name: str, expected: object) -> None:
    found = decode(type(expected), document.get(name), name)
    if found != expected:
        _wrong(found, repr(expected), name)


def _decode(kind: Any, value: Any, where: str) -> Any:
    if kind is float:
        return _decode_float(value, where)
    if kind in _EXPECTED:
        # Not isinstance: a bool is an int to Python, but not to the file.
        return value if type(value) is kind else _wrong(value, _EXPECTED[kind], where)
    origin = get_origin(kind)
    if origin is not None:
        return _DECODERS[origin](get_args(kind), value, where)
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    return _decode_enum(kind, value, where)


def _decode_float(value: Any, where: str) -> float:
    if type(value) not in (int, float):
        _wrong(value, _EXPECTED[float], where)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    return number if math.isfinite(number) else _wrong(value, _EXPECTED[float], where)


def _decode_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if type(value) is not list:
        _wrong(value, "a list", where)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        _wrong(value, f"a list of {len(kinds)}", where)
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple([_decode(kind, item, f"{where}[{i}]") for i, (kind, item) in pairs])


def _decode_dict(kinds: tuple[Any, ...], value: Any, where: str) -> dict[str, Any]:
    if type(value) is not dict:
        _wrong(value, "an object", where)
    return {
        name: _decode(kinds[1], item, f"{where}.{name}") for name, item in value.items()
    }


def _decode_optional(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None:
        return None
    (kind,) = [kind for kind in kinds if kind is not types.NoneType]
    return _decode(kind, value, where)


_DECODERS: dict[Any, Callable[[tuple[Any, ...], Any, str], Any]] = {
    tuple: _decode_tuple,
    dict: _decode_dict,
    Union: _decode_optional,
    types.UnionType: _decode_optional,
}


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = _hints(kind)
    if type(value) is not dict:
        _wrong(value, f"an object with the keys {', '.join(hints)}", where)
    if value.keys() != hints.keys():
        _wrong_keys(value, hints, where)
    prefix = f"{where}." if where else ""
    return kind(
        **{name: _decode(hints[name], value[name], prefix + name) for name in hints}
    )


def _decode_enum(kind: type[StrEnum], value: Any, where: str) -> StrEnum:
    known = [member.value for member in kind]
    if value not in known:
        _wrong(value, f"one of {', '.join(map(repr, known))}", where)
    return kind(value)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _wrong_keys(value: dict[str, Any], hints: dict[str, Any], where: str) -> Never:
    unknown = [repr(name) for name in value if name not in hints]
    missing = [repr(name) for name in hints if name not in value]
    found = f"unknown keys {', '.join(unknown)}" if unknown else "an object"
    lacking = f" without {', '.join(missing)}" if missing else ""
    expected = f"exactly the keys {', '.join(hints)}"
    _fail(found + lacking, expected, where)


def _wrong(value: object, expected: str, where: str) -> Never:
    # reprlib shortens: a damaged file may hold a value of any size and depth here.
    _fail(reprlib.repr(value), expected, where)


def _fail(found: str, expected: str, where: str) -> Never:
    place = where or "the top level"
    raise CacheError(f"{place}: found {found}, expected {expected}")
