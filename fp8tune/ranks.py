"""The ranks that must end with the same plan, and how they talk.

Three collectives are made in all, whatever was timed, cached or found: ``gather`` and
``broadcast`` when AutoFloat8 is constructed, ``gather`` when the layers are timed. Where
training steps try whole plans, each round of them ends with one more ``gather``. Every
rank of the group makes each of them in this order; a rank that dies before one lets the
others raise when the process group notices or its timeout ends.
"""

import gc
import pickle
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from fp8tune.errors import RankMismatchError

__all__ = ["Ranks", "pack", "unpack"]

T = TypeVar("T")


class Ranks:
    """A process group, or this process alone where nothing is distributed.

    Args:
        group: the ranks that hold the same layers; None is all of them.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self._group = group
        self._distributed = _is_distributed()
        self.size = dist.get_world_size(group) if self._distributed else 1
        self.rank = dist.get_rank(group) if self._distributed else 0

    @property
    def first(self) -> bool:
        """Whether this rank reads and writes files and logs."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. One collective.

        What several ranks sent alike is one object here.

        Raises:
            RankMismatchError: the process group came after AutoFloat8.
        """
        self._refuse_late_group()
        if self.size == 1:
            return [value]
        packed: list[Any] = [None] * self.size
        dist.all_gather_object(packed, pack(value), group=self._group)
        return unpack(packed)

    def broadcast(self, value: T) -> T:
        """The first rank's value, on every rank. One collective."""
        if self.size == 1:
            return value
        box: list[Any] = [pack(value) if self.first else None]
        dist.broadcast_object_list(box, group_src=0, group=self._group)
        return unpack(box)[0]

    def _refuse_late_group(self) -> None:
        if not self._distributed and _is_distributed() and dist.get_world_size() > 1:
            raise RankMismatchError(
                "init_process_group was called after AutoFloat8, so the ranks cannot "
                "agree on a plan; call it first"
            )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def pack(value: object) -> bytes:
    """A value as few bytes; names of layers and equal records compress well.

    The items of a tuple and the fields of a record are packed apart, so that whoever
    unpacks can see which of them are alike.
    """
    if isinstance(value, tuple):
        return pickle.dumps((tuple, [_compress(x) for x in value]))
    if is_dataclass(value) and not isinstance(value, type):
        parts = [_compress(getattr(value, x.name)) for x in fields(value)]
        return pickle.dumps((type(value), parts))
    return pickle.dumps((None, [_compress(value)]))


def unpack(packed: Sequence[bytes]) -> list[Any]:
    """What was packed on the ranks of this job; equal parts are unpacked once.

    Hundreds of ranks hold the same layers, whose records take most of the time.
    """
    seen: dict[bytes, Any] = {}
    with _no_garbage_collection():
        return [_unpack(x, seen) for x in packed]


@contextmanager
def _no_garbage_collection() -> Generator[None]:
    # Each of many new objects would make Python search all of them for garbage again.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _unpack(data: bytes, seen: dict[bytes, Any]) -> Any:
    kind, parts = _load(data)
    for part in parts:
        if part not in seen:
            seen[part] = _load(zlib.decompress(part))
    values = [seen[part] for part in parts]
    if kind is None:
        return values[0]
    return tuple(values) if kind is tuple else kind(*values)


def _compress(value: object) -> bytes:
    return zlib.compress(pickle.dumps(value))


def _load(data: bytes) -> Any:
    return pickle.loads(data)  # noqa: S301 - our own ranks' bytes
