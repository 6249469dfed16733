"""Plan -> lines of text. Prints nothing and imports no torch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from statistics import median
from typing import TYPE_CHECKING

from fp8tune.columns import Column, column_lines, paragraph
from fp8tune.folding import fold_names
from fp8tune.intervals import looks, speedup_interval
from fp8tune.records import (
    Decision,
    LeftOut,
    Measurement,
    Reason,
    Shape,
    Signature,
    Verdict,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8tune.config import TuneConfig
    from fp8tune.consensus import Spread
    from fp8tune.plan import Plan
    from fp8tune.records import Candidate

__all__ = [
    "describe_signature",
    "fold",
    "measurement_line",
    "milliseconds",
    "no_candidates_line",
    "part_of",
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
    rows = [[name, *_cells(x, plan.recipe)] for name, x in fold(plan.decisions)]
    footer = [line for text in _footer(plan) for line in paragraph(text, width)]
    return [*column_lines(_COLUMNS, rows, width), *footer]


def _footer(plan: Plan) -> list[str]:
    device = dict(plan.environment).get("device", "unknown device")
    lines = [
        plan.summary(),
        f"timed {plan.timing} against {plan.reference} on {device}",
    ]
    if plan.emulated:
        lines.append(
            f"{plan.recipe} is emulated here, since this device has no such GEMMs: its "
            "numerics are real, its times are not those of float8 hardware"
        )
    failures = {x.detail for x in plan.decisions if x.detail}
    return lines + [f"not timed: {detail}" for detail in sorted(failures)]


def _cells(decision: Decision, recipe: str) -> list[str]:
    rows = ",".join(str(m) for m in sorted({x.shape.m for x, _ in decision.signatures}))
    converted = decision.verdict is Verdict.FLOAT8
    verdict = f"{recipe if converted else 'reference'}: {words(decision.reason)}"
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
    converted = f"converted {number} of {total} Linears to {name}"
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


def speedup_words(decision: Decision) -> str:
    """A speedup and its interval, or "-" where there is none."""
    if decision.speedup is None:
        return "-"
    high = "inf" if decision.speedup_high is None else f"{decision.speedup_high:.2f}"
    return f"{decision.speedup:.2f} [{decision.speedup_low:.2f}, {high}]"


def describe_signature(signature: Signature) -> str:
    """One signature in a few words, for log lines."""
    shape = signature.shape
    parts = [f"M={shape.m} K={shape.k} N={shape.n}", _dtypes(shape)]
    wanted = {
        "input": signature.grad_input,
        "weight": signature.grad_weight,
        "bias": signature.grad_bias,
    }
    grads = [name for name, needed in wanted.items() if needed]
    parts.append(f"grads of {'+'.join(grads)}" if grads else "forward only")
    if signature.recompute:
        parts.append("recomputed")
    return ", ".join(parts)


def _dtypes(shape: Shape) -> str:
    same = shape.input_dtype == shape.weight_dtype
    names = (
        shape.weight_dtype if same else f"{shape.input_dtype} x {shape.weight_dtype}"
    )
    return (
        f"{names} under {shape.autocast_dtype} autocast"
        if shape.autocast_dtype
        else names
    )


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
    what = describe_signature(measurement.signature)
    if measurement.failure:
        return f"{what}: {words(measurement.failure)} ({measurement.detail})"
    number = len(looks(config.max_samples))
    speedup = speedup_interval(measurement.ratios, config.confidence, number)
    drawn = ", on random numbers" if measurement.synthetic else ""
    unsteady = "" if measurement.steady else ", UNSTEADY: is the machine busy?"
    return (
        f"{what}: reference {median(measurement.reference_ms):.3f} ms, "
        f"{measurement.recipe} {median(measurement.candidate_ms):.3f} ms, "
        f"{speedup.middle:.2f}x [{speedup.low:.2f}, {speedup.high:.2f}] "
        f"from {len(measurement.reference_ms)} pairs{drawn}{unsteady}"
    )


def spread_lines(spreads: Sequence[Spread]) -> list[str]:
    """How far ranks differ, one line per signature."""
    return [
        f"{describe_signature(x.signature)}: fastest {x.fastest_ms:.3f} ms on rank "
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
    keys = [(x.k, x.n, x.verdict, x.reason, x.signatures) for x in known]
    groups = fold_names([x.fqn for x in known], keys)
    return [(pattern, known[indexes[0]]) for pattern, indexes in groups]
