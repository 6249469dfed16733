"""Decisions -> the rows of a page's tables. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fp8tune.decision.folding import fold_names
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Verdict
from fp8tune.report.describe import describe_signature
from fp8tune.report.recipes import cost_cells, other_variants
from fp8tune.report.table import cells, experts_words, speedup_words, words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8tune.decision.records import Decision, Measurement, Signature
    from fp8tune.report.subject import Subject

__all__ = [
    "AccuracyRow",
    "LayerRow",
    "PageColumn",
    "accuracy_rows",
    "choices",
    "layer_columns",
    "layer_rows",
    "outcome_of",
]


class LayerRow(NamedTuple):
    """One row of the table of layers, whose names differ only in their numbers.

    Attributes:
        name: the layer, or a pattern such as ``layers.{0..31}.wq``.
        fqns: the layers.
        outcome: "converted", "unclear", "slower" or "other", for the row's colour.
        cells: what stands behind the name, one text per column.
        others: the recipes that were not taken, and why.
    """

    name: str
    fqns: Sequence[str]
    outcome: str
    cells: Sequence[str]
    others: Sequence[str]


class PageColumn(NamedTuple):
    """A column of a page's table.

    Attributes:
        heading: what stands above it.
        key: what the filters call it.
        place: where it is in ``LayerRow.cells``; -1 is the name.
        number: it is aligned to the right and sorted by value.
    """

    heading: str
    key: str
    place: int = -1
    number: bool = False


_HEADINGS = (
    PageColumn("layer", "name"),
    *(PageColumn(x, x, i, True) for i, x in enumerate("MKN")),
    PageColumn("E", "experts", 12, True),
    PageColumn("reference ms", "reference", 3, True),
    PageColumn("candidate ms", "candidate", 4, True),
    PageColumn("speedup", "speedup", 5, True),
    PageColumn("SQNR dB", "sqnr", 6, True),
    PageColumn("peak MiB", "peak", 7, True),
    PageColumn("verdict", "verdict", 8),
    PageColumn("recipe", "recipe", 9),
    PageColumn("reason", "reason", 10),
    PageColumn("notes", "notes", 11),
)
_MAY_BE_ABSENT = ("experts", "sqnr", "peak", "notes")


class AccuracyRow(NamedTuple):
    """What one recipe costs in accuracy on one signature, as texts."""

    signature: str
    recipe: str
    output_db: str
    grad_input_db: str
    grad_weight_db: str
    underflow: str
    saturation: str


@dataclass(frozen=True)
class _Notes:
    """Signatures whose times deserve a remark."""

    synthetic: frozenset[Signature]
    unsteady: frozenset[Signature]

    def of(self, decision: Decision) -> str:
        called = {signature for signature, _ in decision.signatures}
        said = {"synthetic": self.synthetic, "unsteady": self.unsteady}
        return ", ".join(x for x, signatures in said.items() if called & signatures)


def outcome_of(decision: Decision) -> str:
    """The class of a decision: converted, unclear, slower or other."""
    if decision.verdict is Verdict.CONVERTED:
        return "converted"
    known = {
        Reason.NO_CLEAR_DIFFERENCE: "unclear",
        Reason.UNCLEAR_IN_TRAINING: "unclear",
        Reason.SLOWER: "slower",
        Reason.EXPECTED_SLOWER: "slower",
        Reason.SLOWER_IN_TRAINING: "slower",
    }
    return known.get(decision.reason, "other")


def layer_rows(subject: Subject) -> list[LayerRow]:
    """The layers in model order, those that share everything but numbers as one row."""
    decisions = subject.plan.decisions
    notes = _notes_of(subject.measurements)
    fqns = [x.fqn or "(root)" for x in decisions]
    keys = [
        (x.k, x.n, x.experts, x.verdict, x.reason, x.recipe, x.signatures)
        for x in decisions
    ]
    return [
        _row(name, [fqns[i] for i in indexes], decisions[indexes[0]], subject, notes)
        for name, indexes in fold_names(fqns, keys)
    ]


def layer_columns(rows: Sequence[LayerRow]) -> list[PageColumn]:
    """The columns of those rows; accuracy, memory and notes only where there are any."""
    return [
        x
        for x in _HEADINGS
        if x.key not in _MAY_BE_ABSENT
        or any(row.cells[x.place] not in ("", "-") for row in rows)
    ]


def choices(
    rows: Sequence[LayerRow], columns: Sequence[PageColumn], keys: Sequence[str]
) -> dict[str, list[str]]:
    """What a reader can choose from in each of these columns."""
    return {
        x.key: sorted({row.cells[x.place] for row in rows} - {"", "-"})
        for x in columns
        if x.key in keys
    }


def _notes_of(measurements: Iterable[Measurement]) -> _Notes:
    known = list(measurements)
    return _Notes(
        frozenset(x.signature for x in known if x.synthetic),
        frozenset(x.signature for x in known if not x.steady),
    )


def _row(
    name: str, fqns: Sequence[str], decision: Decision, subject: Subject, notes: _Notes
) -> LayerRow:
    *numbers, _ = cells(decision, subject.plan.recipe)
    converted = decision.verdict is Verdict.CONVERTED
    verdict = (
        str(decision.verdict),
        (decision.recipe or subject.plan.recipe) if converted else "-",
        words(decision.reason),
    )
    others = [
        f"not {x.recipe}, {speedup_words(x)}: {words(x.reason)}"
        for x in other_variants(decision)
    ]
    own = (notes.of(decision), experts_words(decision))
    texts = [*numbers, *cost_cells(decision), *verdict, *own]
    return LayerRow(name, fqns, outcome_of(decision), texts, others)


def accuracy_rows(measurements: Iterable[Measurement]) -> list[AccuracyRow]:
    """One row for each signature and recipe whose accuracy is known, the worst first."""
    known = [(x, x.accuracy) for x in measurements if x.accuracy is not None]
    known.sort(key=lambda pair: pair[1].worst_db or 0.0)
    return [
        AccuracyRow(
            describe_signature(x.signature),
            x.recipe,
            *(_decibels(y) for y in (a.output_db, a.grad_input_db, a.grad_weight_db)),
            *(_percent(y) for y in (a.underflow, a.saturation)),
        )
        for x, a in known
    ]


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.3%}"
