"""Decisions -> tables of M x N, one for each K, as torchao publishes its speedups."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from fp8tune.report.page_rows import outcome_of
from fp8tune.report.table import speedup_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8tune.decision.records import Decision

__all__ = ["Cell", "Grid", "shape_map"]

# More cannot be looked at; what is left out is counted, and in the table of layers.
_MOST_GRIDS = 12
_MOST_LINES = 24

# A speedup of e, or of 1 / e, has the full colour.
_FULL_COLOUR = 1.0


class Cell(NamedTuple):
    """One shape.

    Attributes:
        text: its speedup.
        interval: the speedup with its interval.
        outcome: as in ``page_rows.outcome_of``.
        strength: percent of the full colour.
    """

    text: str
    interval: str
    outcome: str
    strength: int


class Grid(NamedTuple):
    """The shapes of one K; ``rows`` has (M, a cell or None for each of ``ns``)."""

    k: int
    ns: Sequence[int]
    rows: Sequence[tuple[int, Sequence[Cell | None]]]


_Known = dict[tuple[int, int], "Decision"]


def shape_map(decisions: Iterable[Decision]) -> tuple[list[Grid], int]:
    """The speedups by shape.

    Args:
        decisions: Linears that were called with one signature make a cell; of several
            with one shape the slowest counts.

    Returns:
        The grids in order of K, and how many shapes they do not show.
    """
    by_k: dict[int, _Known] = {}
    for x in decisions:
        if x.speedup is not None and len(x.signatures) == 1 and not x.experts:
            shape = x.signatures[0][0].shape
            known = by_k.setdefault(shape.k, {})
            before = known.setdefault((shape.m, shape.n), x)
            if x.speedup < (before.speedup or 0.0):
                known[shape.m, shape.n] = x
    grids = [_grid(k, by_k[k]) for k in sorted(by_k)[:_MOST_GRIDS]]
    shown = sum(cell is not None for x in grids for _, row in x.rows for cell in row)
    return grids, sum(map(len, by_k.values())) - shown


def _grid(k: int, known: _Known) -> Grid:
    ms = _most_used(m for m, _ in known)
    ns = _most_used(n for _, n in known)
    rows = [(m, [_cell(known.get((m, n))) for n in ns]) for m in ms]
    return Grid(k, ns, rows)


def _most_used(sizes: Iterable[int]) -> list[int]:
    return sorted(size for size, _ in Counter(sizes).most_common(_MOST_LINES))


def _cell(decision: Decision | None) -> Cell | None:
    if decision is None or decision.speedup is None:
        return None
    outcome = outcome_of(decision)
    marks = {"slower": " ↓", "unclear": " ~"}
    strength = min(1.0, abs(math.log(decision.speedup)) / _FULL_COLOUR)
    return Cell(
        f"{decision.speedup:.2f}{marks.get(outcome, '')}",
        speedup_words(decision),
        outcome,
        round(10 + 60 * strength),
    )
