"""M x N with the speedup in each cell, one panel for each K; part of the pictures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fp8tune.decision.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

    from fp8tune.decision.records import Decision

__all__ = ["draw_heat_map", "heat_map_inches", "tables_of"]

# Behind a number of the heat map.
_MARKS = {Reason.SLOWER: " ↓", Reason.NO_CLEAR_DIFFERENCE: " ~"}
_MOST_PANELS = 12
_PANELS_PER_ROW = 3

_Table = dict[tuple[int, int], "Decision"]


def tables_of(decisions: Sequence[Decision]) -> dict[int, _Table]:
    """K -> (M, N) -> speedup; of signatures that share a shape the slowest counts."""
    tables: dict[int, _Table] = {}
    for decision in decisions:
        if decision.speedup is None or len(decision.signatures) != 1:
            continue
        if decision.experts:  # whose time is not that of a Linear of these sizes
            continue
        shape = decision.signatures[0][0].shape
        table = tables.setdefault(shape.k, {})
        known = table.setdefault((shape.m, shape.n), decision)
        if decision.speedup < (known.speedup or 0.0):
            table[shape.m, shape.n] = decision
    return dict(sorted(tables.items())[:_MOST_PANELS])


def _grid(tables: dict[int, _Table]) -> tuple[int, int]:
    columns = min(len(tables), _PANELS_PER_ROW) or 1
    return math.ceil(len(tables) / columns) or 1, columns


def heat_map_inches(tables: dict[int, _Table]) -> float:
    """Height of the panels."""
    most_rows = max((len({m for m, _ in x}) for x in tables.values()), default=1)
    return 0.3 + _grid(tables)[0] * (1.4 + 0.3 * most_rows)


def draw_heat_map(figure: FigureBase, tables: dict[int, _Table]) -> None:
    """One panel for each K."""
    rows, columns = _grid(tables)
    legend = "speedup by M, K, N (↓ slower, ~ no clear difference)"
    figure.supxlabel(legend, fontsize=9)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    values = [x.speedup or 0.0 for table in tables.values() for x in table.values()]
    low, high = min([1.0, *values]), max([1.0, *values])
    for panel, (k, table) in zip(panels, tables.items(), strict=False):
        panel.set_title(f"K = {k}", fontsize=9)
        _draw_table(panel, table, low, high)
    for panel in list(panels)[len(tables) :]:
        panel.set_axis_off()


def _draw_table(axes: Axes, table: _Table, low: float, high: float) -> None:
    ms, ns = sorted({m for m, _ in table}), sorted({n for _, n in table})
    values = {place: decision.speedup or 0.0 for place, decision in table.items()}
    grid = [[values.get((m, n), math.nan) for n in ns] for m in ms]
    # Lightness grows with the speedup, so that a copy in grey says the same.
    image: Any = axes.imshow(
        grid, cmap="cividis", vmin=low, vmax=max(high, low + 1e-9), aspect="auto"
    )
    axes.set_xticks(range(len(ns)), [str(n) for n in ns], fontsize=8)
    axes.set_yticks(range(len(ms)), [str(m) for m in ms], fontsize=8)
    axes.set_xlabel("N", fontsize=8)
    axes.set_ylabel("M", fontsize=8)
    for (m, n), value in values.items():
        axes.text(
            ns.index(n),
            ms.index(m),
            f"{value:.2f}{_MARKS.get(table[m, n].reason, '')}",
            ha="center",
            va="center",
            fontsize=8,
            color="black" if image.norm(value) > 0.5 else "white",
        )
