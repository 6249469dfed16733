"""Values between ranks over a store, never over the user's process group.

A collective of the user's group inside a forward would have to be matched by every rank
at that moment, and hang where one never comes. In the store each rank leaves its value
and the first rank publishes all of them; whoever waits can say who is missing, and a
rank that fails tells the others at once.

Values are numbered. What is published under a number stays, so a rank that comes late
finds it.
"""

from __future__ import annotations

import pickle
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from fp8tune.errors import RankMismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

__all__ = ["Exchange"]

_SHORTEST_PAUSE_S = 0.0005
_LONGEST_PAUSE_S = 0.02

# How many exchanges each process group has had in this process: all of its ranks make
# them in the same order.
_made: Counter[str] = Counter()


def _store_of(group: Any) -> Any:
    """A store of the group's own, for this thread alone."""
    store = group.get_group_store()
    timeout: timedelta = store.timeout
    own = store.clone()
    own.set_timeout(timeout)
    return own


class Exchange:
    """Numbered exchanges of bytes between the ranks of a process group.

    Args:
        group: the process group.
        rank: this process in it.
        size: how many ranks it has.
    """

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self._rank = rank
        self._size = size
        self._store = _store_of(group)
        self._timeout_s: float = self._store.timeout.total_seconds()
        name = str(group.group_name)
        self._prefix = f"fp8tune/{_made[name]}"
        _made[name] += 1
        self._number = 0

    @property
    def published(self) -> bool:
        """Whether the values that come next are there already, or a rank failed."""
        return self._has(self._key("all"))

    def offer(self, value: bytes) -> None:
        """Leave this rank's value for the others."""
        self._store.set(self._key(self._rank), value)

    def publish(self, values: Sequence[bytes]) -> None:
        """Make these the values of this number, unless others are already."""
        self._store.compare_set(self._key("all"), "", pickle.dumps((None, values)))

    def fail(self, message: str) -> None:
        """Make every rank raise with this message that waits or comes."""
        self._store.compare_set(self._key("all"), "", pickle.dumps((message, ())))

    def offered(self) -> list[bytes]:
        """The values that are there by now, in rank order."""
        return [self._store.get(self._key(x)) for x in self._here()]

    def take(self) -> Sequence[bytes]:
        """The published values; the next number begins.

        Raises:
            RankMismatchError: a rank failed.
        """
        message, values = pickle.loads(self._store.get(self._key("all")))  # noqa: S301 - our own ranks' bytes
        if message is not None:
            raise RankMismatchError(message)
        self._number += 1
        return values

    def wait(self, what: str, *, for_all: bool) -> None:
        """Wait until the values are published, or every rank's is there.

        Args:
            what: what the ranks meet for, in words.
            for_all: be content with every rank's value.

        Raises:
            RankMismatchError: names the ranks that did not come within the timeout.
        """
        deadline = time.monotonic() + self._timeout_s
        pause = _SHORTEST_PAUSE_S
        while not (self.published or (for_all and len(self._here()) == self._size)):
            if time.monotonic() > deadline:
                self._say_who_is_missing(what)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def leave(self, name: str, value: bytes) -> None:
        """Leave a note for whoever comes to this number."""
        self._store.set(self._key(name), value)

    def note(self, name: str) -> bytes | None:
        """A note that a rank left, or None."""
        key = self._key(name)
        return self._store.get(key) if self._has(key) else None

    def _say_who_is_missing(self, what: str) -> None:
        here = self._here()
        missing = [x for x in range(self._size) if x not in here]
        named = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {missing}"
        message = (
            f"fp8tune waited {self._timeout_s:.0f} s at {what} for {named} of "
            f"{self._size}, which did not come. Did it fail, end, or take fewer "
            "training steps? Every rank must train and freeze alike"
        )
        self.fail(message)
        raise RankMismatchError(message)

    def _here(self) -> list[int]:
        return [x for x in range(self._size) if self._has(self._key(x))]

    def _key(self, name: object) -> str:
        return f"{self._prefix}/{self._number}/{name}"

    def _has(self, key: str) -> bool:
        try:
            return self._store.check([key])
        except dist.DistError as error:
            raise RankMismatchError(
                "fp8tune lost the store of the process group: the rank that holds it "
                f"has probably ended ({error})"
            ) from error
