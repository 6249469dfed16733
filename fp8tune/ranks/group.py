"""The ranks that must end with the same plan, and how they talk.

They meet once when AutoFloat8 is constructed, when the layers are timed, when a plan from
the cache was seen to hold or not, and after each round of a trial. Every rank of the
group comes to each of these in this order. A rank that does not come lets the others
raise within the group's timeout, with its number.
"""

import pickle
import zlib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from fp8tune.errors import ConfigError, RankMismatchError
from fp8tune.garbage import no_collection
from fp8tune.ranks.exchange import Exchange

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
        if self.rank < 0:
            raise ConfigError(
                f"process_group= is a group without this rank ({dist.get_rank()}); give "
                "each rank the group of the ranks that hold the same layers as it does"
            )
        self._talk: Exchange | None = None
        self._offered = False

    @property
    def _exchange(self) -> Exchange:
        # Not before it is needed, since ranks count how many there were.
        if self._talk is None:
            group = self._group or dist.group.WORLD
            self._talk = Exchange(group, self.rank, self.size)
        return self._talk

    @property
    def first(self) -> bool:
        """Whether this rank reads and writes files and logs."""
        return self.rank == 0

    def gather(self, value: T, what: str = "an exchange") -> list[T]:
        """Every rank's value, in rank order, on every rank.

        What several ranks sent alike is one object here.

        Args:
            value: can be pickled.
            what: what the ranks meet for, in words.

        Raises:
            RankMismatchError: a rank failed or did not come within the group's timeout,
                or the process group came after AutoFloat8.
        """
        found = self.meet(lambda: value, what)
        assert found is not None
        return found

    def meet(
        self, make: Callable[[], T], what: str, *, wait: bool = True
    ) -> list[T] | None:
        """Every rank's value, or those of the ranks that still train.

        Args:
            make: this rank's value; not called where the others went ahead.
            what: what the ranks meet for, in words.
            wait: for every rank. Where some may be out of data, the value is only left
                for the others at first; at the next call, a training step later, whoever
                trains has left one.

        Returns:
            The values, or None: to be called again in the next step.
        """
        self._refuse_late_group()
        if self.size == 1:
            return [make()]
        talk = self._exchange
        if not talk.published and not self._offered:
            talk.offer(pack(self._or_fail(make, what)))
            self._offered = True
            if not wait:
                return None
        if wait:
            talk.wait(what, for_all=self.first)
        if not talk.published:
            talk.publish(talk.offered())
        return self._take()

    def tell(self, value: T) -> list[T]:
        """What ranks told so far, this one included if it is not too late; no waiting."""
        self._refuse_late_group()
        if self.size == 1:
            return [value]
        talk = self._exchange
        if not talk.published:
            talk.offer(pack(value))
            talk.publish(talk.offered())
        return self._take()

    def _take(self) -> list[Any]:
        self._offered = False
        return unpack(self._exchange.take())

    def _or_fail(self, make: Callable[[], T], what: str) -> T:
        """What is made, or else every other rank raises too."""
        try:
            return make()
        except BaseException as error:
            self.fail(f"rank {self.rank} failed at {what}: {error!r}")
            raise

    def broadcast(self, value: T, what: str = "an exchange") -> T:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        if self.first:
            self._exchange.publish([pack(value)])
        else:
            self._exchange.wait(what, for_all=False)
        return self._take()[0]

    def fail(self, message: str) -> None:
        """Make the others raise with this message, which wait or come."""
        if self.size > 1:
            self._exchange.fail(message)

    @property
    def went_ahead(self) -> bool:
        """Whether the other ranks have met without this one, or one of them failed."""
        return self.size > 1 and self._exchange.published

    def call(self, step: int) -> None:
        """Tell the others that this rank decides now, in this training step."""
        if self.size > 1:
            self._exchange.leave("freeze", pickle.dumps((self.rank, step)))

    def refuse_lone_freeze(self, step: int) -> None:
        """Refuse to train on where another rank decides now.

        Args:
            step: the training step of this rank that is about to go on.

        Raises:
            RankMismatchError: on every rank.
        """
        called = self._exchange.note("freeze") if self.size > 1 else None
        if called is None:
            return
        rank, there = pickle.loads(called)  # noqa: S301 - our own ranks' bytes
        if rank == self.rank or step <= there:
            return
        message = (
            f"rank {rank} called freeze() in its training step {there}, while rank "
            f"{self.rank} went on to step {step}; call freeze() on every rank, in the "
            "same step"
        )
        self.fail(message)
        raise RankMismatchError(message)

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
    with no_collection():
        return [_unpack(x, seen) for x in packed]


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
