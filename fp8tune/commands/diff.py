"""``fp8tune diff``: what two runs, of two machines or versions, decided differently."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from fp8tune.commands.answer import (
    Answer,
    Screen,
    layer_data,
    name_of,
    newest_run,
    require_runs,
    run_data,
    write_page,
)
from fp8tune.decision.folding import fold_names
from fp8tune.report.columns import Column, column_lines, paragraph
from fp8tune.report.page_rows import LayerRow, PageColumn
from fp8tune.report.table import speedup_words

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from fp8tune.decision.records import Decision
    from fp8tune.store.runs import Run

__all__ = ["answer"]


class _Change(StrEnum):
    VERDICT = "another verdict"
    FASTER = "faster in B"
    SLOWER = "slower in B"
    SAME = "no clear change"
    ONLY_A = "only in A"
    ONLY_B = "only in B"


class _Pair(NamedTuple):
    """One layer in both runs."""

    fqn: str
    a: Decision | None
    b: Decision | None

    @property
    def change(self) -> _Change:
        """How B differs from A."""
        if self.a is None:
            return _Change.ONLY_B
        if self.b is None:
            return _Change.ONLY_A
        if (self.a.verdict, self.a.recipe) != (self.b.verdict, self.b.recipe):
            return _Change.VERDICT
        return _speed_change(self.a, self.b)


def _speed_change(a: Decision, b: Decision) -> _Change:
    """Intervals that do not overlap differ clearly."""
    if a.speedup_low is None or b.speedup_low is None:
        return _Change.SAME
    if a.speedup_high is not None and b.speedup_low > a.speedup_high:
        return _Change.FASTER
    if b.speedup_high is not None and b.speedup_high < a.speedup_low:
        return _Change.SLOWER
    return _Change.SAME


_COLUMNS = (
    Column("layer"),
    Column("K", right=True),
    Column("N", right=True),
    Column("speedup in A", right=True),
    Column("speedup in B", right=True),
    Column("A"),
    Column("B"),
    Column("change"),
)

_PAGE_COLUMNS = (
    PageColumn("layer", "name"),
    PageColumn("M", "M", 0, True),
    PageColumn("K", "K", 1, True),
    PageColumn("N", "N", 2, True),
    PageColumn("speedup in A", "speedup_a", 3, True),
    PageColumn("speedup in B", "speedup_b", 4, True),
    PageColumn("A", "A", 5),
    PageColumn("B", "B", 6),
    PageColumn("change", "change", 7),
)
_OUTCOMES = {
    _Change.VERDICT: "slower",
    _Change.FASTER: "converted",
    _Change.SLOWER: "slower",
    _Change.SAME: "other",
    _Change.ONLY_A: "unclear",
    _Change.ONLY_B: "unclear",
}


def answer(arguments: argparse.Namespace, screen: Screen) -> Answer:
    """The layers in which the runs differ, or all of them.

    Raises:
        NoEntryError: a file has no run, or not the one that is asked for.
    """
    a = _pick(arguments.a, arguments.run_a, arguments.min_speedup)
    b = _pick(arguments.b, arguments.run_b, arguments.min_speedup)
    pairs = _pairs(a, b)
    shown = [x for x in pairs if arguments.all or x.change is not _Change.SAME]
    data = {
        "a": {"cache": arguments.a} | run_data(a),
        "b": {"cache": arguments.b} | run_data(b),
        "counts": dict(Counter(x.change.value for x in pairs)),
        "layers": [_pair_data(x) for x in shown],
    }
    if arguments.html and not arguments.json:
        return Answer(_write_page(a, b, pairs, arguments), data)
    heading = [
        f"A: {arguments.a}, run {a.number}",
        f"B: {arguments.b}, run {b.number}",
        *_key_lines(a, b),
    ]
    lines = [line for text in heading for line in paragraph(text, screen.width)]
    return Answer([*lines, "", *_table(shown, pairs, screen)], data)


def _write_page(
    a: Run, b: Run, pairs: Sequence[_Pair], arguments: argparse.Namespace
) -> list[str]:
    from fp8tune.report.html import diff_page  # noqa: PLC0415 - jinja2 takes a while
    from fp8tune.tuner.subject import subject_of_run  # noqa: PLC0415

    in_a = subject_of_run(a, f"run {a.number} of {arguments.a}")
    in_b = subject_of_run(b, f"run {b.number} of {arguments.b}")
    page = diff_page(in_a, in_b, _page_rows(pairs), _PAGE_COLUMNS, _total(pairs))
    return write_page(arguments.html, page)


def _pick(path: str, number: int | None, min_speedup: float) -> Run:
    return newest_run(require_runs(path, min_speedup), number, path)


def _key_lines(a: Run, b: Run) -> list[str]:
    """What differs between the two in what their timings are true of."""
    fields = [
        {
            **dict(x.key.environment),
            "recipe": x.key.label,
            "settings": x.key.settings,
            "timing": x.key.timing,
        }
        for x in (a, b)
    ]
    names = dict.fromkeys([*fields[0], *fields[1]])
    return [
        f"{name}: {fields[0].get(name, 'nothing')} in A, {fields[1].get(name, 'nothing')} "
        "in B"
        for name in names
        if fields[0].get(name) != fields[1].get(name)
    ] or ["the same environment, recipe and timing"]


def _pairs(a: Run, b: Run) -> list[_Pair]:
    in_a = {name_of(x.fqn): x for x in a.decisions}
    in_b = {name_of(x.fqn): x for x in b.decisions}
    return [_Pair(x, in_a.get(x), in_b.get(x)) for x in {**in_a, **in_b}]


def _total(pairs: Sequence[_Pair]) -> str:
    counts = Counter(pair.change for pair in pairs)
    summary = ", ".join(f"{counts[x]} {x}" for x in _Change if counts[x])
    return f"{len(pairs)} Linears: {summary}"


def _table(shown: Sequence[_Pair], pairs: Sequence[_Pair], screen: Screen) -> list[str]:
    total = paragraph(_total(pairs), screen.width)
    if not shown:
        return total
    rows = [_cells(pair) for pair in shown]
    folded = fold_names([x.fqn for x in shown], [tuple(row) for row in rows])
    body = [
        [f"{name} x{len(x)}" if len(x) > 1 else name, *rows[x[0]]] for name, x in folded
    ]
    return [*column_lines(_COLUMNS, body, screen.width), *total]


def _page_rows(pairs: Sequence[_Pair]) -> list[LayerRow]:
    """All layers, those that differ in nothing but numbers as one row."""
    rows = [(_rows_of(pair), *_cells(pair)) for pair in pairs]
    fqns = [pair.fqn for pair in pairs]
    return [
        LayerRow(
            name, [fqns[i] for i in x], _OUTCOMES[pairs[x[0]].change], rows[x[0]], ()
        )
        for name, x in fold_names(fqns, rows)
    ]


def _rows_of(pair: _Pair) -> str:
    """The M of both, or "2048 and 8192" where they differ."""
    known = [x for x in (pair.a, pair.b) if x is not None]
    sizes = [",".join(map(str, layer_data(x)["m"])) or "-" for x in known]
    return " and ".join(dict.fromkeys(sizes))


def _cells(pair: _Pair) -> list[str]:
    sizes = pair.a or pair.b
    assert sizes is not None
    return [
        str(sizes.k),
        str(sizes.n),
        speedup_words(pair.a) if pair.a else "-",
        speedup_words(pair.b) if pair.b else "-",
        _verdict(pair.a),
        _verdict(pair.b),
        str(pair.change),
    ]


def _verdict(decision: Decision | None) -> str:
    return "-" if decision is None else decision.recipe or str(decision.verdict)


def _pair_data(pair: _Pair) -> dict[str, Any]:
    return {
        "layer": pair.fqn,
        "change": pair.change.value,
        "a": layer_data(pair.a) if pair.a else None,
        "b": layer_data(pair.b) if pair.b else None,
    }
