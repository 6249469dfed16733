"""A tuned model, or two, as one HTML file that needs no network and no script.

jinja2, which torch brings along, fills the templates; matplotlib, in the extra "plot",
draws the pictures, which stand in the page as SVG. JavaScript only sorts, filters and
unfolds what can be read without it. Imports no torch.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import logging
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from fp8tune.report.coverage import coverage_shares
from fp8tune.report.page_map import shape_map
from fp8tune.report.page_rows import (
    accuracy_rows,
    choices,
    layer_columns,
    layer_rows,
)
from fp8tune.report.recipes import accuracy_lines, failure_lines
from fp8tune.report.table import emulation_line, fold, range_lines, summary
from fp8tune.report.trials import TRIAL_HEADINGS, trial_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8tune.decision.coverage import Coverage
    from fp8tune.report.page_rows import LayerRow, PageColumn
    from fp8tune.report.subject import Subject

__all__ = ["diff_page", "run_page"]

logger = logging.getLogger("fp8tune")

# More kinds of calls than this are not looked at one by one.
_MOST_ACCURACIES = 200
_NO_CHARTS: dict[str, Any] = {"speedups": None, "trials": ()}


def run_page(subject: Subject) -> str:
    """The page of one tuned model.

    Args:
        subject: what is shown; of its measurements, what was synthetic or unsteady and
            the accuracy.

    Returns:
        HTML in UTF-8.
    """
    plan = subject.plan
    rows = layer_rows(subject)
    columns = layer_columns(rows)
    grids, map_left_out = shape_map(subject.by_signature)
    accuracies = accuracy_rows(subject.measurements)
    environment = dict(plan.environment)
    charts, no_charts = _charts(subject)
    values = {
        "subject": subject,
        "plan": plan,
        "summary": summary(plan),
        "device": environment.get("device", "an unknown device"),
        "warnings": _warnings(subject),
        "columns": columns,
        "rows": rows,
        "choices": choices(rows, columns, ("verdict", "recipe", "reason")),
        "sizes": "MKN",
        "grids": grids,
        "map_left_out": map_left_out,
        "charts": charts,
        "no_charts": no_charts,
        "trial_columns": TRIAL_HEADINGS,
        "trial_rows": trial_rows(plan),
        "contents": _contents(subject, accuracies),
        "coverage": _coverage(plan.coverage),
        "accuracy": accuracies[:_MOST_ACCURACIES],
        "accuracy_left_out": len(accuracies[_MOST_ACCURACIES:]),
        "environment": [
            ("recipe", plan.recipe),
            ("reference", plan.timed_against),
            ("timing", plan.timing),
            *plan.environment,
        ],
    }
    return _render("run.html", values)


def diff_page(
    a: Subject,
    b: Subject,
    rows: Sequence[LayerRow],
    columns: Sequence[PageColumn],
    summary: str,
) -> str:
    """The page of two tuned models side by side.

    Args:
        a: the one.
        b: the other.
        rows: the layers of both.
        columns: of those rows.
        summary: how many layers differ, in one sentence.
    """
    (charts_a, no_charts), (charts_b, _) = _charts(a), _charts(b)
    facts = [_facts(x) for x in (a, b)]
    values = {
        "a": a,
        "b": b,
        "summary": summary,
        "environments": [
            (name, facts[0].get(name, "-"), facts[1].get(name, "-"))
            for name in facts[0] | facts[1]
        ],
        "charts": {"a": charts_a["speedups"], "b": charts_b["speedups"]},
        "no_charts": no_charts,
        "rows": rows,
        "columns": columns,
        "choices": choices(rows, columns, ("A", "B", "change")),
        "sizes": "MKN",
    }
    return _render("diff.html", values)


def _contents(subject: Subject, accuracies: Sequence[object]) -> list[tuple[str, str]]:
    """(id, heading) of the parts that the page has."""
    there = {
        ("speedups", "Speedups"): True,
        ("layers", "Layers"): True,
        ("map", "Shapes"): True,
        ("trial", "Whole plans in training steps"): bool(subject.plan.trials),
        ("coverage", "Coverage"): subject.plan.coverage is not None,
        ("accuracy", "Accuracy"): bool(accuracies),
        ("environment", "Environment"): True,
    }
    return [part for part, shown in there.items() if shown]


def _coverage(coverage: Coverage | None) -> list[tuple[str, float]]:
    """(what, share of a step's FLOPs), candidates first."""
    if coverage is None:
        return []
    candidates, rest = coverage_shares(coverage)
    return [("candidates", candidates), *rest]


def _facts(subject: Subject) -> dict[str, str]:
    plan = subject.plan
    return {
        "run": subject.title,
        "recorded": subject.recorded or "-",
        "recipe": f"{plan.recipe} (emulated)" if plan.emulated else plan.recipe,
        "timing": plan.timing,
        "decided": summary(plan),
        **dict(plan.environment),
    }


def _warnings(subject: Subject) -> list[str]:
    """What makes the numbers say less than they seem to."""
    plan, measured = subject.plan, subject.measurements
    synthetic = sum(x.synthetic for x in measured)
    unsteady = sum(not x.steady for x in measured)
    lines = [emulation_line(plan)] if plan.emulated else []
    if unsteady:
        lines.append(
            f"{unsteady} of {len(measured)} timings are unsteady: the machine was busy "
            "while they were taken, and their verdicts may be wrong"
        )
    if synthetic:
        lines.append(
            f"{synthetic} of {len(measured)} timings were taken on random numbers, "
            "since the tensors of the training step were not kept"
        )
    lines += accuracy_lines(fold(plan.decisions))
    ranges = range_lines(fold(plan.decisions))
    return lines + ranges + failure_lines(plan.decisions)


def _charts(subject: Subject) -> tuple[dict[str, Any], str]:
    """Pictures by name, and what to say where there are none."""
    if all(x.speedup is None for x in subject.plan.decisions):
        return _NO_CHARTS, "No layer has a speedup."
    try:
        from fp8tune.report import page_charts  # noqa: PLC0415 - matplotlib is an extra
    except ImportError as error:
        line = (
            f"no pictures in the page: {error}; install what they need with "
            'pip install "fp8tune[plot]"'
        )
        logger.warning("%s", line)
        return _NO_CHARTS, f"There are {line}"
    return page_charts.charts_of(subject), ""


def _render(template: str, values: dict[str, Any]) -> str:
    script = _asset("page.js")
    # The browser runs this script and no other, whatever a layer is called.
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest())
    return (
        _templates()
        .get_template(template)
        .render(
            **values,
            style=_asset("style.css"),
            script=script,
            script_hash=f"sha256-{digest.decode()}",
        )
    )


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("fp8tune.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> Any:
    environment = _templates()
    assert environment.loader is not None
    source, *_ = environment.loader.get_source(environment, name)
    return Markup(source)  # noqa: S704 - of this package
