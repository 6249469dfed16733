"""Plans in experiment trackers, by their public calls. Imports a tracker that is used.

::

    fp8tune/table               the table of decisions
    fp8tune/plan                the plan, as Plan.save writes it
    fp8tune/report              the page
    fp8tune/converted_share     of all Linears
    fp8tune_speedup/<layer>     one value for each kind of layer
    fp8tune/<field>             recipe, device, versions and the numbers of layers
"""

from __future__ import annotations

import importlib
import json
import re
from typing import TYPE_CHECKING, Any

from fp8tune.errors import ConfigError
from fp8tune.report.html import run_page
from fp8tune.report.page_rows import layer_columns, layer_rows
from fp8tune.report.table import fold, hparams

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8tune.report.subject import Subject

    # Of the run, what is written, the plan as plain data, and the step.
    _Log = Callable[[Any, Subject, dict[str, Any], int | None], None]

__all__ = ["tracker_of"]

# What MLflow takes in the name of a metric.
_STRANGE = re.compile(r"[^\w\-. :/]")


def tracker_of(run: Any) -> _Log:
    """The function that writes to this kind of run.

    Raises:
        ConfigError: the run is not of a tracker that is known.
    """
    package = type(run).__module__.partition(".")[0]
    if package == "wandb" and hasattr(run, "log_artifact"):
        return _to_wandb
    if package == "mlflow" and hasattr(run, "info"):
        return _to_mlflow
    raise ConfigError(
        f"log_to got a {type(run).__module__}.{type(run).__qualname__}; it takes the run "
        "that wandb.init() or mlflow.start_run() returns"
    )


def _to_wandb(
    run: Any, subject: Subject, plan: dict[str, Any], step: int | None
) -> None:
    wandb = importlib.import_module("wandb")
    headings, cells = _table(subject)
    run.config.update(hparams(subject.plan), allow_val_change=True)
    run.log(
        {
            "fp8tune/table": wandb.Table(columns=headings, data=cells),
            "fp8tune/report": wandb.Html(run_page(subject), inject=False),
            **_metrics(subject),
        },
        step=step,
    )
    artifact = wandb.Artifact("fp8tune-plan", type="fp8tune-plan")
    with artifact.new_file("plan.json", encoding="utf-8") as file:
        json.dump(plan, file)
    run.log_artifact(artifact)


def _to_mlflow(
    run: Any, subject: Subject, plan: dict[str, Any], step: int | None
) -> None:
    client = importlib.import_module("mlflow").MlflowClient()
    number: str = run.info.run_id
    headings, cells = _table(subject)
    columns = {x: [row[i] for row in cells] for i, x in enumerate(headings)}
    for name, value in hparams(subject.plan).items():
        # Not a parameter, which MLflow refuses to change when it is logged again.
        client.set_tag(number, name, value)
    for name, value in _metrics(subject).items():
        client.log_metric(number, _STRANGE.sub("_", name), value, step=step)
    client.log_dict(number, columns, "fp8tune/table.json")
    client.log_dict(number, plan, "fp8tune/plan.json")
    client.log_text(number, run_page(subject), "fp8tune/report.html")


def _table(subject: Subject) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table of layers, folded."""
    rows = layer_rows(subject)
    columns = layer_columns(rows)
    cells = [[x.name, *(x.cells[column.place] for column in columns[1:])] for x in rows]
    return [x.heading for x in columns], cells


def _metrics(subject: Subject) -> dict[str, float]:
    plan = subject.plan
    share = len(plan.converted_fqns) / max(len(plan.decisions), 1)
    known = [(name, x.speedup) for name, x in fold(plan.decisions)]
    speedups = {f"fp8tune_speedup/{name}": x for name, x in known if x is not None}
    return {"fp8tune/converted_share": share, **speedups}
