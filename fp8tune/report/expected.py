"""What a table lets expect of a model's layers, which nobody timed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fp8tune.config import TuneConfig
from fp8tune.decision.decide import decide
from fp8tune.decision.prior import is_whole, together
from fp8tune.decision.reasons import Reason
from fp8tune.report.columns import Column, column_lines, paragraph
from fp8tune.report.describe import rows_words
from fp8tune.report.table import fold, part_of, words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8tune.decision.prior import Expected, Table
    from fp8tune.decision.records import Decision, Layer

__all__ = ["Outlook", "expected_lines", "outlooks"]

_COLUMNS = (
    Column("layer"),
    *(Column(x, right=True) for x in ("M", "K", "N", "speedup")),
    Column("expected"),
)


class Outlook(NamedTuple):
    """What is expected of one layer.

    Attributes:
        decision: what is known without timings.
        speedup: None where the table is not about it.
        verdict: "faster", "slower", "unsure" or "unknown", or why it is left out.
    """

    decision: Decision
    speedup: Expected | None
    verdict: str


def outlooks(layers: Sequence[Layer], table: Table, threshold: float) -> list[Outlook]:
    """One for each layer.

    Args:
        layers: with the calls of a dry run.
        table: what is known of their recipe.
        threshold: a speedup below it is slower.
    """
    return [
        Outlook(x, _expected(x, table), _verdict(x, table, threshold))
        for x in decide(layers, [], [table.recipe], TuneConfig())
    ]


def expected_lines(found: Sequence[Outlook], table: Table, width: int) -> list[str]:
    """A row for each kind of layer, and what that rests on."""
    by_name = {x.decision.fqn: x for x in found}
    rows = [
        _cells(name, by_name[x.fqn]) for name, x in fold([x.decision for x in found])
    ]
    said = (
        f"expected, not timed: speedups of {table.recipe} on {table.device}, forward + "
        f"backward in bfloat16, from a table of {table.source}; another device, or layers "
        "that are compiled with others, may decide otherwise"
    )
    return [*column_lines(_COLUMNS, rows, width), *paragraph(said, width)]


def _cells(name: str, outlook: Outlook) -> list[str]:
    decision, found, verdict = outlook
    bounds = f"{found.middle:.2f} [{found.low:.2f}, {found.high:.2f}]" if found else "-"
    return [
        name or "(root)",
        rows_words(decision),
        part_of(decision.k, {x.shape.k for x, _ in decision.signatures}),
        part_of(decision.n, {x.shape.n for x, _ in decision.signatures}),
        bounds,
        verdict,
    ]


def _verdict(decision: Decision, table: Table, threshold: float) -> str:
    if decision.reason is not Reason.NOT_MEASURED:
        return f"left out: {words(decision.reason)}"
    found = _expected(decision, table)
    return found.verdict(threshold) if found else "unknown"


def _expected(decision: Decision, table: Table) -> Expected | None:
    """Of the layer's calls together; None for calls that the table is not about."""
    calls = [signature for signature, _ in decision.signatures]
    if decision.reason is not Reason.NOT_MEASURED or not all(map(is_whole, calls)):
        return None
    return together([table.expect(x.shape.m, x.shape.k, x.shape.n) for x in calls])
