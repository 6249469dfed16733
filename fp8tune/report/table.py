"""Plan -> lines of text. Prints nothing and imports no torch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from fp8tune.decision.decisions import Decisions
from fp8tune.decision.folding import fold_names
from fp8tune.decision.records import Decision, Verdict
from fp8tune.report.columns import Column, column_lines, paragraph
from fp8tune.report.coverage import coverage_line
from fp8tune.report.describe import layers_word, rows_words, sizes_words
from fp8tune.report.recipes import (
    COST_COLUMNS,
    converted_words,
    cost_cells,
    failure_lines,
    has_costs,
    other_variants,
)
from fp8tune.report.trials import trial_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8tune.decision.decisions import Decisions
    from fp8tune.decision.reasons import Reason
    from fp8tune.decision.records import Variant

__all__ = [
    "cells",
    "emulation_line",
    "experts_words",
    "fold",
    "hparams",
    "milliseconds",
    "part_of",
    "range_lines",
    "speedup_words",
    "summary",
    "summary_line",
    "table_lines",
    "whole_sizes",
    "words",
]

_COLUMNS = (
    Column("layer"),
    *(Column(x, right=True) for x in ("M", "K", "N", "E")),
    *(Column(x, right=True) for x in ("reference ms", "candidate ms", "speedup")),
    Column("verdict"),
)
# The place of the column E, which only a plan with experts has.
_EXPERTS = 4
_WIDTH = 160
_INTERPOLATED = (
    "speedups at the other sizes are interpolated between those that were timed"
)


def table_lines(plan: Decisions, width: int = _WIDTH) -> list[str]:
    """The plan as a table with a summary below; times are milliseconds per call."""
    costs = has_costs(plan.decisions)
    rows = [
        row for name, x in fold(plan.decisions) for row in _rows(name, x, plan, costs)
    ]
    columns = [*_COLUMNS[:-1], *(COST_COLUMNS if costs else ()), _COLUMNS[-1]]
    if not any(x.experts for x in plan.decisions):
        for row in (columns, *rows):
            del row[_EXPERTS]
    footer = [line for text in _footer(plan) for line in paragraph(text, width)]
    return [
        *column_lines(columns, rows, width),
        *footer,
        *trial_lines(plan, width),
        *(paragraph(coverage_line(plan.coverage), width) if plan.coverage else ()),
    ]


def _rows(
    name: str, decision: Decision, plan: Decisions, costs: bool
) -> list[list[str]]:
    """The layer's own row, and one for each recipe that it was not converted to."""
    *numbers, verdict = cells(decision, plan.recipe)
    numbers.insert(_EXPERTS - 1, experts_words(decision))
    own = [name, *numbers, *(cost_cells(decision) if costs else ()), verdict]
    if len(decision.variants) > 1 and decision.verdict is Verdict.REFERENCE:
        own[-1] = f"{verdict} ({decision.nearest})"
    others = [
        [
            *([""] * (_EXPERTS + 2)),
            milliseconds(x.candidate_ms),
            speedup_words(x),
            *(cost_cells(x) if costs else ()),
            f"not {x.recipe}: {words(x.reason)}",
        ]
        for x in other_variants(decision)
    ]
    return [own, *others]


def _footer(plan: Decisions) -> list[str]:
    device = dict(plan.environment).get("device", "unknown device")
    lines = [
        summary(plan),
        f"timed {plan.timing} against {plan.timed_against} on {device}",
    ]
    frozen = sum(map(_is_timed_as_frozen, plan.decisions))
    if frozen:
        lines.append(
            f"{frozen} Linears were timed with frozen weights; if they are unfrozen, "
            "auto.retune() times them anew"
        )
    lines += expected_lines(plan.decisions)
    if plan.emulated:
        lines.append(emulation_line(plan))
    ranges = range_lines(fold(plan.decisions))
    return lines + ranges + failure_lines(plan.decisions)


def expected_lines(decisions: Iterable[Decision]) -> list[str]:
    """How many layers were not timed, since their verdict was clear, and from what."""
    expected = [x for x in decisions if x.speedup and x.reference_ms is None]
    sources = " and ".join(sorted({x.detail for x in expected}))
    said = (
        f"{len(expected)} Linears were not timed; their speedups are expected, from "
        f"{sources}"
    )
    return [said] if expected else []


def _is_timed_as_frozen(decision: Decision) -> bool:
    signatures = [x for x, _ in decision.signatures]
    timed = decision.reference_ms is not None
    return timed and bool(signatures) and not any(x.grad_weight for x in signatures)


def emulation_line(plan: Decisions) -> str:
    """What the times of a device without such GEMMs are worth."""
    if "," in plan.recipe:
        return (
            f"of {plan.recipe}, those are emulated for which this device has no GEMMs: "
            "their numerics are real, their times are not those of float8 hardware"
        )
    return (
        f"{plan.recipe} is emulated here, since this device has no such GEMMs: its "
        "numerics are real, its times are not those of float8 hardware"
    )


def range_lines(rows: Iterable[tuple[str, Decision]]) -> list[str]:
    """How many M each range in the table stands for, and how many of them were timed."""
    ranges = [(name, sizes_words(x)) for name, x in rows]
    told = [f"{name or '(root)'}: {said}" for name, said in ranges if said]
    return [*told, _INTERPOLATED] if told else []


def cells(decision: Decision, recipe: str) -> list[str]:
    """What stands behind the name in a row of the table."""
    converted = decision.verdict is Verdict.CONVERTED
    to = decision.recipe or recipe
    verdict = f"{to if converted else 'reference'}: {words(decision.reason)}"
    k, n = whole_sizes(decision)
    return [
        rows_words(decision),
        part_of(k, {x.shape.k for x, _ in decision.signatures}),
        part_of(n, {x.shape.n for x, _ in decision.signatures}),
        milliseconds(decision.reference_ms),
        milliseconds(decision.candidate_ms),
        speedup_words(decision),
        verdict,
    ]


def summary(plan: Decisions) -> str:
    """One line: how many Linears were converted, and why the others were not."""
    name = f"{plan.recipe} (emulated)" if plan.emulated else plan.recipe
    return summary_line(plan.decisions, name)


def summary_line(decisions: Sequence[Decision], name: str) -> str:
    """How many layers were converted to the recipe of that name, and why not the rest."""
    left = [x for x in decisions if x.verdict is Verdict.REFERENCE]
    reasons = Counter(x.reason for x in left)
    rest = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    number, total = len(decisions) - len(left), len(decisions)
    to = converted_words(decisions, name)
    converted = f"converted {number} of {total} {layers_word(decisions)} to {to}"
    return f"{converted}; not converted: {rest}" if rest else converted


def whole_sizes(decision: Decision) -> tuple[int, int]:
    """K and N; of experts as they were called, which says for certain which is which."""
    k, n = decision.k, decision.n
    called = [(x.shape.k, x.shape.n) for x, _ in decision.signatures]
    exchanged = decision.experts and called and set(called) == {(n, k)}
    return (n, k) if exchanged else (k, n)


def experts_words(decision: Decision) -> str:
    """How many experts, and on this rank: "8", "4 of 8"; "-" for a Linear."""
    if not decision.experts:
        return "-"
    return part_of(decision.experts, {x.shape.experts for x, _ in decision.signatures})


def part_of(whole: int, local: set[int]) -> str:
    """The size on one rank, and of what it is a part: "64 of 512"."""
    parts = ",".join(str(x) for x in sorted(local))
    return str(whole) if local <= {whole} else f"{parts} of {whole}"


def hparams(plan: Decisions) -> dict[str, str | int]:
    """What a tracker compares runs by, by name."""
    return {
        "fp8tune/recipe": plan.recipe,
        "fp8tune/timing": plan.timing,
        "fp8tune/linears": len(plan.decisions),
        "fp8tune/converted": len(plan.converted_fqns),
        **{f"fp8tune/{name}": value for name, value in plan.environment},
    }


def words(reason: Reason) -> str:
    """The reason in a few words, for tables."""
    return reason.replace("_", " ")


def milliseconds(value: float | None) -> str:
    """A time, or "-" where there is none."""
    return "-" if value is None else f"{value:.3f}"


def speedup_words(numbers: Decision | Variant) -> str:
    """A speedup and its interval, or "-" where there is none."""
    if numbers.speedup is None:
        return "-"
    high = "inf" if numbers.speedup_high is None else f"{numbers.speedup_high:.2f}"
    return f"{numbers.speedup:.2f} [{numbers.speedup_low:.2f}, {high}]"


def fold(decisions: Iterable[Decision]) -> list[tuple[str, Decision]]:
    """Layers that differ only in the numbers of their names, under one name.

    Returns:
        (name, a decision of the group) in model order; the name is the FQN, or a
        pattern such as ``layers.{0..31}.wq``.
    """
    known = list(decisions)
    keys = [
        (x.k, x.n, x.experts, x.verdict, x.reason, x.recipe, x.signatures)
        for x in known
    ]
    groups = fold_names([x.fqn for x in known], keys)
    return [(pattern, known[indexes[0]]) for pattern, indexes in groups]
