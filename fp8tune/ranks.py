"""The ranks that must end with the same plan, and how they talk.

Three collectives are made in all, whatever was timed, cached or found: ``gather`` and
``broadcast`` when AutoFloat8 is constructed, ``gather`` at the freeze. Every rank of the
group makes each of them in this order; a rank that dies before one lets the others raise
when the process group notices or its timeout ends.
"""

import pickle
import zlib
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

        Raises:
            RankMismatchError: the process group came after AutoFloat8.
        """
        self._refuse_late_group()
        if self.size == 1:
            return [value]
        packed: list[Any] = [None] * self.size
        dist.all_gather_object(packed, pack(value), group=self._group)
        return [unpack(x) for x in packed]

    def broadcast(self, value: T) -> T:
        """The first rank's value, on every rank. One collective."""
        if self.size == 1:
            return value
        box: list[Any] = [pack(value) if self.first else None]
        dist.broadcast_object_list(box, group_src=0, group=self._group)
        return unpack(box[0])

    def _refuse_late_group(self) -> None:
        if not self._distributed and _is_distributed() and dist.get_world_size() > 1:
            raise RankMismatchError(
                "init_process_group was called after AutoFloat8, so the ranks cannot "
                "agree on a plan; call it first"
            )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def pack(value: object) -> bytes:
    """A value as few bytes; names of layers and equal records compress well."""
    return zlib.compress(pickle.dumps(value))


def unpack(data: bytes) -> Any:
    """What ``pack`` packed on another rank of this job."""
    return pickle.loads(zlib.decompress(data))  # noqa: S301 - our own ranks' bytes
