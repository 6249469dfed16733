"""Plan -> lines of text. Prints nothing and imports no torch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from statistics import median
from typing import TYPE_CHECKING

from fp8tune.columns import Column, column_lines, paragraph
from fp8tune.describe import describe_signature
from fp8tune.folding import fold_names
from fp8tune.intervals import looks, speedup_interval
from fp8tune.records import (
    Decision,
    LeftOut,
    Measurement,
    Reason,
    Shape,
    Verdict,
)
from fp8tune.report_recipes import (
    COST_COLUMNS,
    converted_words,
    cost_cells,
    failure_lines,
    has_costs,
    other_variants,
)
from fp8tune.report_trial import trial_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8tune.config import TuneConfig
    from fp8tune.consensus import Spread
    from fp8tune.plan import Plan
    from fp8tune.records import Candidate, Layer, Variant

__all__ = [
    "cells",
    "describe_signature",
    "fold",
    "measurement_line",
    "measurements_line",
    "milliseconds",
    "no_candidates_line",
    "part_of",
    "shape_change",
    "shape_change_line",
    "speedup_words",
    "spread_lines",
    "start_line",
    "stuck_line",
    "summary_line",
    "table_lines",
    "words",
]

_COLUMNS = (
    Column("layer"),
    *(Column(x, right=True) for x in ("M", "K", "N", "reference ms", "candidate ms")),
    Column("speedup", right=True),
    Column("verdict"),
)
_WIDTH = 160


def table_lines(plan: Plan, width: int = _WIDTH) -> list[str]:
    """The plan as a table with a summary below; times are milliseconds per call."""
    costs = has_costs(plan.decisions)
    rows = [
        row for name, x in fold(plan.decisions) for row in _rows(name, x, plan, costs)
    ]
    columns = [*_COLUMNS[:-1], *(COST_COLUMNS if costs else ()), _COLUMNS[-1]]
    footer = [line for text in _footer(plan) for line in paragraph(text, width)]
    return [*column_lines(columns, rows, width), *footer, *trial_lines(plan, width)]


def _rows(name: str, decision: Decision, plan: Plan, costs: bool) -> list[list[str]]:
    """The layer's own row, and one for each recipe that it was not converted to."""
    *numbers, verdict = cells(decision, plan.recipe)
    own = [name, *numbers, *(cost_cells(decision) if costs else ()), verdict]
    if len(decision.variants) > 1 and decision.verdict is Verdict.REFERENCE:
        own[-1] = f"{verdict} ({decision.nearest})"
    others = [
        [
            *("", "", "", "", ""),
            milliseconds(x.float8_ms),
            speedup_words(x),
            *(cost_cells(x) if costs else ()),
            f"not {x.recipe}: {words(x.reason)}",
        ]
        for x in other_variants(decision)
    ]
    return [own, *others]


def _footer(plan: Plan) -> list[str]:
    device = dict(plan.environment).get("device", "unknown device")
    lines = [
        plan.summary(),
        f"timed {plan.timing} against {plan.reference} on {device}",
    ]
    if plan.emulated and "," in plan.recipe:
        lines.append(
            f"of {plan.recipe}, those are emulated for which this device has no GEMMs: "
            "their numerics are real, their times are not those of float8 hardware"
        )
    elif plan.emulated:
        lines.append(
            f"{plan.recipe} is emulated here, since this device has no such GEMMs: its "
            "numerics are real, its times are not those of float8 hardware"
        )
    return lines + failure_lines(plan.decisions)


def cells(decision: Decision, recipe: str) -> list[str]:
    """What stands behind the name in a row of the table."""
    rows = ",".join(str(m) for m in sorted({x.shape.m for x, _ in decision.signatures}))
    converted = decision.verdict is Verdict.FLOAT8
    to = decision.recipe or recipe
    verdict = f"{to if converted else 'reference'}: {words(decision.reason)}"
    return [
        rows or "-",
        part_of(decision.k, {x.shape.k for x, _ in decision.signatures}),
        part_of(decision.n, {x.shape.n for x, _ in decision.signatures}),
        milliseconds(decision.reference_ms),
        milliseconds(decision.float8_ms),
        speedup_words(decision),
        verdict,
    ]


def summary_line(decisions: Sequence[Decision], name: str) -> str:
    """How many Linears were converted to the recipe of that name, and why not the rest."""
    left = [x for x in decisions if x.verdict is Verdict.REFERENCE]
    reasons = Counter(x.reason for x in left)
    rest = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    number, total = len(decisions) - len(left), len(decisions)
    to = converted_words(decisions, name)
    converted = f"converted {number} of {total} Linears to {to}"
    return f"{converted}; not converted: {rest}" if rest else converted


def part_of(whole: int, local: set[int]) -> str:
    """The size on one rank, and of what it is a part: "64 of 512"."""
    parts = ",".join(str(x) for x in sorted(local))
    return str(whole) if local <= {whole} else f"{parts} of {whole}"


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


def start_line(screened: Sequence[Candidate | LeftOut], recipe: str) -> str:
    """How many Linears will be timed, and why not the others."""
    number = sum(not isinstance(x, LeftOut) for x in screened)
    text = f"{number} of {len(screened)} Linears are candidates for {recipe}"
    reasons = _counted_reasons(screened)
    return f"{text}; left out: {reasons}" if reasons else text


def no_candidates_line(screened: Sequence[LeftOut | Candidate]) -> str:
    """What a user reads whose model has nothing to tune."""
    return (
        f"none of the {len(screened)} Linears is a candidate "
        f"({_counted_reasons(screened)}), so the model trains on in high precision"
    )


def _counted_reasons(screened: Sequence[Candidate | LeftOut]) -> str:
    reasons = Counter(x.reason for x in screened if isinstance(x, LeftOut))
    return ", ".join(f"{n} {words(reason)}" for reason, n in reasons.most_common())


def measurement_line(measurement: Measurement, config: TuneConfig) -> str:
    """One signature and its times, or why there are none."""
    return measurements_line([measurement], config)


def measurements_line(measurements: Sequence[Measurement], config: TuneConfig) -> str:
    """One signature and its times with each recipe."""
    what = describe_signature(measurements[0].signature)
    parts = [_measured(x, config) for x in measurements]
    if len(parts) > 1:
        pairs = zip(measurements, parts, strict=True)
        parts = [f"{x.recipe}: {part}" if x.failure else part for x, part in pairs]
    return f"{what}: {'; '.join(parts)}"


def cost_line(signatures: int, seconds: float, warm_up_s: float) -> str:
    """What timing took, compilation apart."""
    counted = f"{signatures} signature{'' if signatures == 1 else 's'}"
    return (
        f"timed {counted} in {seconds:.1f} s, of which {warm_up_s:.1f} s went into "
        "compiling and warming up"
    )


def _measured(measurement: Measurement, config: TuneConfig) -> str:
    if measurement.failure:
        return f"{words(measurement.failure)} ({measurement.detail})"
    number = len(looks(config.max_samples))
    speedup = speedup_interval(measurement.ratios, config.confidence, number)
    drawn = ", on random numbers" if measurement.synthetic else ""
    unsteady = "" if measurement.steady else ", UNSTEADY: is the machine busy?"
    accuracy = measurement.accuracy and measurement.accuracy.worst_db
    sqnr = "" if accuracy is None else f", SQNR {accuracy:.1f} dB"
    return (
        f"reference {median(measurement.reference_ms):.3f} ms, "
        f"{measurement.recipe} {median(measurement.candidate_ms):.3f} ms, "
        f"{speedup.middle:.2f}x [{speedup.low:.2f}, {speedup.high:.2f}] "
        f"from {len(measurement.reference_ms)} pairs{sqnr}{drawn}{unsteady}"
    )


def spread_lines(spreads: Sequence[Spread]) -> list[str]:
    """How far ranks differ, one line per signature."""
    return [
        f"{describe_signature(x.signature)}, {x.recipe}: fastest {x.fastest_ms:.3f} ms on rank "
        f"{x.fastest_rank}, slowest {x.slowest_ms:.3f} ms on rank {x.slowest_rank}, "
        "which counts"
        for x in spreads
    ]


def shape_change_line(fqn: str, planned: Sequence[Shape], found: Shape) -> str:
    """Which field of a layer's shape is not as the plan has it, with both values."""
    name = fqn or "(root)"
    if not planned:
        return f"{name} is called, which the plan has never seen"
    now = dataclasses.asdict(found)
    differences = [
        [
            f"{field} was {was!r}, is {now[field]!r}"
            for field, was in old
            if was != now[field]
        ]
        for old in (dataclasses.asdict(shape).items() for shape in planned)
    ]
    return f"{name}: " + ", ".join(min(differences, key=len))


def stuck_line(forwards: int, steps: int, waiting: int) -> str:
    """Why tuning has not ended after so many forwards."""
    return (
        f"{forwards} forwards with gradients, but {steps} training steps with a backward; "
        f"{waiting} forwards still wait for theirs. Tuning goes on until they are done: "
        "run evaluations in eval mode or under torch.no_grad(), delete outputs that are "
        "never differentiated, or call freeze()"
    )


def fold(decisions: Iterable[Decision]) -> list[tuple[str, Decision]]:
    """Layers that differ only in the numbers of their names, under one name.

    Returns:
        (name, a decision of the group) in model order; the name is the FQN, or a
        pattern such as ``layers.{0..31}.wq``.
    """
    known = list(decisions)
    keys = [(x.k, x.n, x.verdict, x.reason, x.recipe, x.signatures) for x in known]
    groups = fold_names([x.fqn for x in known], keys)
    return [(pattern, known[indexes[0]]) for pattern, indexes in groups]


def shape_change(layers: Sequence[Layer], plan: Plan) -> str | None:
    """What the first call that the plan does not know was called with, or None."""
    for layer in layers:
        planned = [signature.shape for signature, _ in plan[layer.fqn].signatures]
        for signature, _ in layer.calls:
            if signature.shape not in planned:
                return shape_change_line(layer.fqn, planned, signature.shape)
    return None
