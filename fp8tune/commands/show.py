"""``fp8tune show``: the table of decisions of each run in a cache file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8tune.commands.answer import (
    Answer,
    Screen,
    heading_lines,
    layer_data,
    name_of,
    newest_run,
    require_runs,
    run_data,
    write_page,
)
from fp8tune.decision.folding import fold_names
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Verdict
from fp8tune.report.columns import Column, column_lines, paragraph
from fp8tune.report.describe import rows_words
from fp8tune.report.table import (
    milliseconds,
    part_of,
    range_lines,
    speedup_words,
    summary_line,
    words,
)
from fp8tune.report.trials import trial_lines
from fp8tune.report.watch import watch_lines
from fp8tune.store.codec import encode

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from fp8tune.decision.records import Decision
    from fp8tune.store.runs import Run

__all__ = ["answer"]

_COLUMNS = (
    Column("layer"),
    *(Column(x, right=True) for x in ("M", "K", "N", "ref ms", "candidate ms")),
    Column("speedup", right=True),
    Column("verdict"),
    Column("reason"),
)
_GREEN, _RED, _YELLOW, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[33m", ""
_COLOURS = {
    Reason.SLOWER: _RED,
    Reason.NO_CLEAR_DIFFERENCE: _YELLOW,
}


def answer(arguments: argparse.Namespace, screen: Screen) -> Answer:
    """The runs of ``arguments.cache``, the newest last."""
    every = require_runs(arguments.cache, arguments.min_speedup)
    one = arguments.run is not None
    runs = [newest_run(every, arguments.run, arguments.cache)] if one else every
    tables = [(run, _rows(run, unfold=arguments.all)) for run in runs]
    wrote = _write_page(runs[-1], arguments) if arguments.html else []
    if arguments.json:
        data = [
            run_data(run)
            | {
                "layers": [_row_data(x) for x in rows],
                "trial": [encode(x) for x in run.plan.trials],
                "fallen": [encode(x) for x in run.fallen],
            }
            for run, rows in tables
        ]
        return Answer([], {"cache": arguments.cache, "runs": data})
    if wrote:
        return Answer(wrote, {})
    lines: list[str] = []
    for run, rows in tables:
        lines += [""] if lines else []
        lines += _run_lines(run, rows, len(every), screen)
    return Answer(lines, {})


def _write_page(run: Run, arguments: argparse.Namespace) -> list[str]:
    from fp8tune.report.html import run_page  # noqa: PLC0415 - jinja2 takes a while
    from fp8tune.tuner.subject import subject_of_run  # noqa: PLC0415

    title = f"Run {run.number} of {Path(arguments.cache).name}"
    return write_page(arguments.html, run_page(subject_of_run(run, title)))


_Row = tuple[str, "Sequence[str]", "Decision"]


def _rows(run: Run, *, unfold: bool) -> list[_Row]:
    """(pattern, the names that it stands for, the decision that they share)."""
    decisions = run.decisions
    fqns = [name_of(decision.fqn) for decision in decisions]
    if unfold:
        return [(fqn, [fqn], x) for fqn, x in zip(fqns, decisions, strict=True)]
    keys = [(x.k, x.n, x.verdict, x.reason, x.recipe, x.signatures) for x in decisions]
    return [
        (pattern, [fqns[i] for i in indexes], decisions[indexes[0]])
        for pattern, indexes in fold_names(fqns, keys)
    ]


def _run_lines(
    run: Run, rows: Sequence[_Row], number_of_runs: int, screen: Screen
) -> list[str]:
    heading = heading_lines(run, number_of_runs)
    summary = summary_line(run.decisions, run.key.label)
    ranges = range_lines((pattern, decision) for pattern, _, decision in rows)
    watched = watch_lines(run.fallen)
    colours = [_colour(x) for *_, x in rows]
    table = column_lines(
        _COLUMNS,
        [_cells(*row) for row in rows],
        screen.width,
        colours if screen.colour else (),
    )
    return [
        *(line for text in heading for line in paragraph(text, screen.width)),
        "",
        *table,
        *paragraph(summary, screen.width),
        *(line for text in ranges + watched for line in paragraph(text, screen.width)),
        *trial_lines(run.plan, screen.width),
    ]


def _colour(decision: Decision) -> str:
    converted = decision.verdict is Verdict.CONVERTED
    return _GREEN if converted else _COLOURS.get(decision.reason, _PLAIN)


def _cells(pattern: str, fqns: Sequence[str], decision: Decision) -> list[str]:
    shapes = [signature.shape for signature, _ in decision.signatures]
    return [
        f"{pattern} x{len(fqns)}" if len(fqns) > 1 else pattern,
        rows_words(decision),
        part_of(decision.k, {x.k for x in shapes}),
        part_of(decision.n, {x.n for x in shapes}),
        milliseconds(decision.reference_ms),
        milliseconds(decision.candidate_ms),
        speedup_words(decision),
        decision.recipe or str(Verdict.REFERENCE),
        words(decision.reason),
    ]


def _row_data(row: _Row) -> dict[str, Any]:
    pattern, fqns, decision = row
    return {"layer": pattern, "fqns": list(fqns)} | layer_data(decision)
