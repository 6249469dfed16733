"""Which of the signatures that several ranks would time each of them does time.

Ranks that hold the same layers would time the same. So they say first what they would
time, and then each times a part: every signature is timed by two ranks at least, where
there are as many, so that a slow rank is noticed. Two ranks both time everything; but one
begins in the middle, so that what is compiled for one is in Inductor's cache by the time
the other comes to it.

What each of them calls clear without timing (``TuneConfig.trust_prior``) nobody times.

A kind is timed as a whole, since its M are judged together. Ranks that would time other M of
a kind each do so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from fp8tune.decision.kinds import Kind, kind_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8tune.decision.records import Signature
    from fp8tune.ranks.group import Ranks

__all__ = ["Shares", "Wish", "agreed_clear", "share_of"]

# Ranks that time a signature, at least.
_TIMED_BY = 2

Wanted = tuple[tuple["Signature", tuple[str, ...]], ...]


class _Named(Protocol):
    @property
    def name(self) -> str:
        """Of a recipe."""
        ...


_T = TypeVar("_T", bound=_Named)


@dataclass(frozen=True)
class Wish:
    """What a rank would time alone.

    Attributes:
        rank: who.
        splits: whether it may leave a part to others.
        wanted: signatures with the names of the recipes, in their order.
        unsure: the kinds of its calls that have to be timed; None for all of them.
    """

    rank: int
    splits: bool
    wanted: Wanted
    unsure: frozenset[Kind] | None = None


def agreed_clear(wishes: Sequence[Wish], size: int) -> frozenset[Kind]:
    """The kinds that nobody has to time: no rank is unsure of them, and all came.

    Args:
        wishes: those of the ranks that came.
        size: how many ranks there are.
    """
    unsure = [x.unsure for x in wishes if x.unsure is not None]
    if len(unsure) < size:
        return frozenset()
    wanted = frozenset(kind_of(x) for wish in wishes for x, _ in wish.wanted)
    return wanted.difference(*unsure)


def _without(wish: Wish, clear: frozenset[Kind]) -> Wish:
    if not clear:
        return wish
    wanted = tuple(x for x in wish.wanted if kind_of(x[0]) not in clear)
    return replace(wish, wanted=wanted)


def share_of(wishes: Sequence[Wish], rank: int, size: int) -> list[Signature] | None:
    """What a rank times; pure, and with equal wishes every rank knows every share.

    Args:
        wishes: those of the ranks that came.
        rank: whose share.
        size: how many ranks there are. Where some did not come, or will not split,
            nobody leaves anything to others.

    Returns:
        Signatures in the order in which to time them; None for all of its own.
    """
    if not _split(wishes, size):
        return None
    holders: dict[tuple[Kind, Wanted], list[int]] = {}
    for wish in wishes:
        for unit in _by_kind(wish.wanted).items():
            holders.setdefault(unit, []).append(wish.rank)
    together: dict[tuple[int, ...], list[Wanted]] = {}
    for (_, wanted), ranks in sorted(holders.items()):
        together.setdefault(tuple(ranks), []).append(wanted)
    return [
        signature
        for ranks, units in together.items()
        if rank in ranks
        for unit in _part(units, ranks.index(rank), len(ranks))
        for signature, _ in unit
    ]


def _split(wishes: Sequence[Wish], size: int) -> bool:
    return len(wishes) == size and all(x.splits for x in wishes)


def _by_kind(wanted: Wanted) -> dict[Kind, Wanted]:
    found: dict[Kind, Wanted] = {}
    for item in wanted:
        kind = kind_of(item[0])
        found[kind] = (*found.get(kind, ()), item)
    return found


def _part(units: Sequence[Wanted], place: int, ranks: int) -> list[Wanted]:
    """As many neighbours in a circle as it takes, begun at even distances."""
    number = len(units)
    many = min(number, -(-_TIMED_BY * number // ranks))
    start = place * number // ranks
    return [units[(start + i) % number] for i in range(many)]


class Shares:
    """How ranks come to their shares: one exchange before timing begins.

    Args:
        ranks: who time.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._wishes: list[Wish] | None = None

    def of(
        self,
        wanted: Mapping[Signature, Sequence[_T]],
        *,
        splits: bool,
        wait: bool,
        unsure: frozenset[Kind] | None = None,
    ) -> tuple[dict[Signature, Sequence[_T]], set[Signature]]:
        """This rank's share, of the wishes that were exchanged at the first call.

        Args:
            wanted: what it would time alone, and the recipes of each.
            splits: whether others may time a part of it.
            wait: for every rank; else nothing is left to others, who may not come.
            unsure: the kinds of its calls that have to be timed; None for all of them.

        Returns:
            (what this rank times, what nobody times since it is clear).
        """
        names = tuple((x, tuple(y.name for y in each)) for x, each in wanted.items())
        rank, size = self._ranks.rank, self._ranks.size
        mine = Wish(rank, splits and wait, names, unsure)
        if self._wishes is None:
            self._wishes = self._exchange(mine, wait=wait)
        wishes = self._wishes
        clear = agreed_clear(wishes, size)
        skipped = {x for x in wanted if kind_of(x) in clear}
        share = share_of([_without(x, clear) for x in wishes], rank, size)
        if share is None:
            share = [x for x in wanted if x not in skipped]
        return {x: wanted[x] for x in share}, skipped

    def _exchange(self, mine: Wish, *, wait: bool) -> list[Wish]:
        if wait:
            return self._ranks.gather(mine, "the end of warmup")
        return self._ranks.tell(mine)

    @property
    def shared(self) -> bool:
        """Whether several ranks time parts of the same now; the same on all of them."""
        wishes, size = self._wishes or (), self._ranks.size
        together = size > 1 and _split(wishes, size)
        return together and any(x.wanted for x in wishes)

    def over(self) -> None:
        """All is timed; the next call is about something else."""
        self._wishes = None
