"""Whether a plan from the cache holds: on every rank, or on none."""

from __future__ import annotations

import logging
from enum import Enum
from typing import TYPE_CHECKING

from fp8tune.config import OnShapeChange
from fp8tune.errors import PlanMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8tune.ranks.group import Ranks

__all__ = ["Replay", "replay"]


class Replay(Enum):
    """What becomes of a plan from the cache."""

    UNKNOWN = "not every rank has come"
    HOLDS = "it is frozen"
    RETUNE = "it is dropped"


def replay(
    ranks: Ranks,
    change: Callable[[], str | None],
    otherwise: OnShapeChange,
    say: Callable[[int, object], None],
    *,
    wait: bool,
    keep: bool,
) -> Replay:
    """Compare a plan with what was called, on all ranks at once.

    Args:
        ranks: who must do the same.
        change: what differs from the plan on this rank, in words, or None.
        otherwise: what to do where something differs.
        say: logs.
        wait: for every rank; see ``Ranks.meet``.
        keep: the plan holds whatever was called, as freeze() wants.

    Raises:
        PlanMismatchError: other shapes, and the user wants that.
    """
    met = ranks.meet(lambda: (keep, change()), "the replay of a cached plan", wait=wait)
    if met is None:
        return Replay.UNKNOWN
    changes = [(rank, x) for rank, (_, x) in enumerate(met) if x]
    if any(kept for kept, _ in met) or not changes:
        return Replay.HOLDS
    rank, first = changes[0]
    return _changed(
        f"{first} on rank {rank}" if len(met) > 1 else first, otherwise, say
    )


def _changed(
    change: str, otherwise: OnShapeChange, say: Callable[[int, object], None]
) -> Replay:
    match otherwise:
        case OnShapeChange.RAISE:
            raise PlanMismatchError(
                f"{change}; the cached plan was made for other shapes. Set "
                "on_shape_change to 'retune' or 'warn', or use another cache file"
            )
        case OnShapeChange.WARN:
            say(logging.WARNING, f"{change}; the cached plan is kept")
            return Replay.HOLDS
        case OnShapeChange.RETUNE:
            say(logging.INFO, f"{change}; tuning again")
            return Replay.RETUNE
