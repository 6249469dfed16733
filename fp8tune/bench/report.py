"""Outcomes of the benchmark as lines of text and as data."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from fp8tune.bench.policies import FP8TUNE
from fp8tune.report.columns import Column, column_lines, paragraph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8tune.bench.policies import Outcome, Row, Setting
    from fp8tune.decision.intervals import Interval

__all__ = ["outcome_data", "outcome_lines", "summary_lines"]

_COLUMNS = (
    Column("policy"),
    Column("layers", right=True),
    Column("step ms", right=True),
    Column("speedup", right=True),
    Column("regret", right=True),
    Column("tuning s", right=True),
    Column("compiling s", right=True),
)


def outcome_lines(outcome: Outcome, setting: Setting, width: int) -> list[str]:
    """A heading, the table, and what is missing from it."""
    rows = [_cells(x, len(outcome.gemms)) for x in outcome.rows]
    table = column_lines(_COLUMNS, rows, width) if rows else []
    notes = [line for x in outcome.notes for line in paragraph(x, width)]
    return [*paragraph(_heading(outcome, setting), width), *table, *notes, ""]


def _heading(outcome: Outcome, setting: Setting) -> str:
    recipe = setting.recipe
    shapes: dict[tuple[int, int, int], list[str]] = {}
    for name, shape in outcome.gemms.items():
        shapes.setdefault(shape, []).append(name.rsplit(".", 1)[-1])
    listed = ", ".join(f"{'+'.join(x)} {_size(shape)}" for shape, x in shapes.items())
    small = " (scaled down)" if outcome.workload.small else ""
    how = "compiled" if setting.compiled else "eager"
    emulated = ", emulated: its times mean nothing" if recipe.emulated else ""
    return (
        f"{outcome.workload.label}{small}: {recipe.name} against {recipe.reference}, "
        f"{how}{emulated}; K x N: {listed}; {outcome.rounds} rounds, oracle of "
        f"{outcome.plans} plans"
    )


def _size(shape: tuple[int, int, int]) -> str:
    k, n, experts = shape
    return f"{k}x{n} for {experts} experts" if experts else f"{k}x{n}"


def _cells(row: Row, gemms: int) -> list[str]:
    return [
        row.policy,
        f"{len(row.converted)}/{gemms}",
        f"{row.step_ms:.2f}",
        f"{row.speedup.middle:.2f} [{row.speedup.low:.2f}, {row.speedup.high:.2f}]",
        "-" if row.regret is None else _percent(row.regret),
        *("-" if x is None else f"{x:.1f}" for x in (row.tuning_s, row.warm_up_s)),
    ]


def _percent(regret: Interval) -> str:
    low, middle, high = (100 * (x - 1) for x in regret)
    return f"{middle:.1f}% [{low:.1f}, {high:.1f}]"


def summary_lines(outcomes: Sequence[Outcome], width: int) -> list[str]:
    """How fp8tune did over all workloads."""
    rows = [
        (outcome.workload.label, row)
        for outcome in outcomes
        for row in outcome.rows
        if row.policy == FP8TUNE
    ]
    if not rows:
        return []
    slower = [label for label, row in rows if row.speedup.high < 1]
    count = f"in {len(slower)} of {len(rows)} workloads"
    listed = f": {', '.join(slower)}" if slower else ""
    lines = [f"{FP8TUNE} was clearly slower than all reference {count}{listed}"]
    regrets = [(x.regret, label) for label, x in rows if x.regret]
    if regrets:
        worst, label = max(regrets, key=lambda x: x[0].low)
        lines.append(f"its largest regret was {_percent(worst)} ({label})")
    return [line for x in lines for line in paragraph(x, width)]


def outcome_data(outcome: Outcome) -> dict[str, Any]:
    """The same for programs."""
    return {
        "workload": dataclasses.asdict(outcome.workload),
        "gemms": {name: list(shape) for name, shape in outcome.gemms.items()},
        "rounds": outcome.rounds,
        "plans": outcome.plans,
        "policies": [_row_data(x) for x in outcome.rows],
        "notes": outcome.notes,
    }


def _row_data(row: Row) -> dict[str, Any]:
    return {
        **vars(row),
        "converted": list(row.converted),
        "speedup": _interval_data(row.speedup),
        "regret": _interval_data(row.regret),
    }


def _interval_data(interval: Interval | None) -> dict[str, float | None] | None:
    """Low, middle and high; None for what too few rounds could not bound."""
    if interval is None:
        return None
    return {k: v if math.isfinite(v) else None for k, v in interval._asdict().items()}
