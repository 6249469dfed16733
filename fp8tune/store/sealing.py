"""Files of JSON with a checksum, in ASCII, with one entry of each table a line."""

from __future__ import annotations

import hashlib
import json
import reprlib
from typing import TYPE_CHECKING, Any, cast

from fp8tune.errors import CacheError
from fp8tune.store.codec import decode, encode

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["UNSEALED", "seal", "unseal"]

# What stands for the checksum while it is computed. A checksum of the file's bytes, not
# of its values, catches every changed byte, be it only a space; since it stands in the
# file itself, its own 64 digits are taken as zeros.
UNSEALED = "0" * 64


def seal(record: object) -> bytes:
    """Write a whole file.

    Args:
        record: a dataclass whose first fields are ``format``, ``version`` and ``sha256``,
            which is ``UNSEALED``; no field before it may hold that string.

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


def unseal(data: bytes, format_name: str, versions: Collection[int]) -> dict[str, Any]:
    """The JSON object of a file that ``seal`` wrote.

    Args:
        data: the file.
        format_name: what its field ``format`` must be.
        versions: what its field ``version`` may be.

    Raises:
        CacheError: the file is damaged, or of another format or version.
    """
    try:
        document: Any = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise CacheError(f"found no JSON in UTF-8 ({problem})") from problem
    if type(document) is not dict:
        found = reprlib.repr(document)
        raise CacheError(f"the top level: found {found}, expected an object")
    # Before the checksum, which another version may compute in another way.
    _require(decode(str, document.get("format"), "format"), "format", [format_name])
    _require(decode(int, document.get("version"), "version"), "version", versions)
    digest = decode(str, document.get("sha256"), "sha256")
    unsealed = data.replace(digest.encode("utf-8", "replace"), UNSEALED.encode(), 1)
    if digest != hashlib.sha256(unsealed).hexdigest():
        raise CacheError("the checksum does not match: bytes of the file have changed")
    return document


def _require(found: object, name: str, expected: Collection[object]) -> None:
    if found not in expected:
        known = " or ".join(map(repr, expected))
        raise CacheError(f"{name}: found {found!r}, expected {known}")
