"""Several recipes in the table of a plan, and what each costs in accuracy and memory.

Imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8tune.decision.gemms import is_part
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Verdict
from fp8tune.report.columns import Column

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8tune.decision.records import Decision, Variant

__all__ = [
    "COST_COLUMNS",
    "LOW_SQNR_DB",
    "accuracy_lines",
    "converted_words",
    "cost_cells",
    "failure_lines",
    "has_costs",
    "other_variants",
]

COST_COLUMNS = (Column("SQNR dB", right=True), Column("peak MiB", right=True))

# The noise then has about a fifth of the signal's amplitude; tensorwise float8 without
# outliers stays above 25 dB.
LOW_SQNR_DB = 15.0

_FAILURES = (Reason.OUT_OF_MEMORY, Reason.NOT_MEASURED)


def has_costs(decisions: Iterable[Decision]) -> bool:
    """Whether accuracy or memory of any layer is known."""
    return any(
        known is not None
        for x in decisions
        for y in (x, *x.variants)
        for known in (y.sqnr_db, y.candidate_bytes)
    )


def cost_cells(numbers: Decision | Variant) -> list[str]:
    """The lowest SQNR of output and gradients; peak memory "reference > recipe"."""
    sqnr, before, after = (
        numbers.sqnr_db,
        numbers.reference_bytes,
        numbers.candidate_bytes,
    )
    peak = "-"
    if before is not None and after is not None:
        peak = f"{before / 2**20:.0f} > {after / 2**20:.0f}"
    return ["-" if sqnr is None else f"{sqnr:.1f}", peak]


def other_variants(decision: Decision) -> list[Variant]:
    """The recipes whose numbers are not those of the decision itself."""
    return [x for x in decision.variants if x.recipe != decision.nearest]


def converted_words(decisions: Iterable[Decision], name: str) -> str:
    """What layers were converted to: the name, or how many to which of several."""
    converted = [x.recipe for x in decisions if x.verdict is Verdict.CONVERTED]
    counts = {x: converted.count(x) for x in sorted({x or name for x in converted})}
    if "," not in name and not any(is_part(x) for x in counts):
        return name
    if not counts:
        return name
    return " and ".join(f"{recipe} ({count})" for recipe, count in counts.items())


def failure_lines(decisions: Sequence[Decision]) -> list[str]:
    """What could not be timed, each problem once."""
    several = any(len(x.variants) > 1 for x in decisions)
    tried = [y for x in decisions for y in x.variants or (x,)]
    failed = [x for x in tried if x.detail and x.reason in _FAILURES]
    texts = {f"{x.recipe}: {x.detail}" if several else x.detail for x in failed}
    return [f"not timed: {text}" for text in sorted(texts)]


def accuracy_lines(named: Iterable[tuple[str, Decision]]) -> list[str]:
    """A warning for each kind of layer that is converted at a low SQNR.

    Args:
        named: (name, decision), as ``fold`` gives them.
    """
    return [
        f"{name}: {x.recipe} has an SQNR of {x.sqnr_db:.1f} dB in its output or a "
        f"gradient, which is {LOW_SQNR_DB:g} dB or under and may harm training; set "
        "TuneConfig.min_sqnr_db to keep such layers from it"
        for name, x in named
        if x.verdict is Verdict.CONVERTED
        and x.sqnr_db is not None
        and x.sqnr_db <= LOW_SQNR_DB
    ]
