"""``fp8tune bench``: policies compared on blocks of published models, on this device."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8tune.bench.cost import tuning_cost
from fp8tune.bench.policies import Setting, compare_policies
from fp8tune.bench.report import outcome_data, outcome_lines, summary_lines
from fp8tune.bench.suite import Findings, GpuSuite
from fp8tune.bench.workloads import find_workloads, scaled_down
from fp8tune.commands.answer import Answer, Screen
from fp8tune.commands.device import pick_device
from fp8tune.recipes.registry import get_recipe
from fp8tune.report.columns import paragraph
from fp8tune.report.progress import Progress, log_level
from fp8tune.store.environment import describe_environment
from fp8tune.timing.clocks import clock_for

if TYPE_CHECKING:
    import argparse

    from fp8tune.timing.clock import Clock

__all__ = ["answer"]


def answer(
    arguments: argparse.Namespace, screen: Screen, clock: Clock | None = None
) -> Answer:
    """Run the workloads or the suite; Ctrl-C ends with what there is by then.

    Raises:
        ConfigError: an unknown workload, recipe or device; ``--suite gpu`` without one.
    """
    device = pick_device(arguments.device)
    setting = Setting(
        recipe=get_recipe(arguments.recipe, device),
        device=device,
        clock=clock or clock_for(device),
        compiled=not arguments.eager,
        max_seconds=arguments.max_seconds,
        max_compile_seconds=arguments.max_compile_seconds,
    )
    results = _Results(setting, arguments.json)
    run = {"gpu": _run_gpu, "cost": _run_cost, None: _run_workloads}[arguments.suite]
    try:
        run(arguments, setting, results)
    except KeyboardInterrupt:
        return Answer(results.lines(screen), results.data(), interrupted=True)
    return Answer(results.lines(screen), results.data())


class _Results:
    """What there is so far; also written to a file whenever something is added."""

    def __init__(self, setting: Setting, target: str | bool) -> None:
        self.found = Findings()
        self._setting = setting
        self._path = Path(target) if isinstance(target, str) else None
        self.save()

    def save(self) -> None:
        """Write what there is, so that nothing is lost with the process."""
        if self._path:
            text = json.dumps(self.data(), indent=1) + "\n"
            self._path.write_text(text, encoding="utf-8")

    def data(self) -> dict[str, Any]:
        """As docs/schema describes it."""
        setting = self._setting
        return {
            "environment": dict(describe_environment(setting.device)),
            "recipe": setting.recipe.name,
            "emulated": setting.recipe.emulated,
            "compiled": setting.compiled,
            "workloads": [outcome_data(x) for x in self.found.outcomes],
            "clock_agreement": [asdict(x) for x in self.found.agreement],
            "tuning_cost": self.found.cost,
            "missing": self.found.missing,
        }

    def lines(self, screen: Screen) -> list[str]:
        """As people read it."""
        width, found = screen.width, self.found
        tables = [outcome_lines(x, self._setting, width) for x in found.outcomes]
        ends = [
            f"clock: {x.m} x {x.k} x {x.n}, {x.variant}: events {x.event_ms:.4f} ms, "
            f"kernels {x.span_ms:.4f} ms, {x.ratio:.3f}"
            for x in found.agreement
        ]
        ends += [
            f"tuning with a {state} compile cache: {x['tuning_s']:.1f} s, "
            f"{x['warm_up_s']:.1f} s of it compiling and warming up"
            for state, x in found.cost.items()
        ]
        ends += [f"not run: {x}" for x in found.missing]
        summary = summary_lines(found.outcomes, width)
        folded = [line for x in ends for line in paragraph(x, width)]
        return [*(line for table in tables for line in table), *folded, *summary]


def _run_workloads(
    arguments: argparse.Namespace, setting: Setting, results: _Results
) -> None:
    workloads = find_workloads(arguments.workload)
    if setting.device.type == "cpu":
        workloads = [scaled_down(x) for x in workloads]
    if arguments.m is not None:
        workloads = list(dict.fromkeys(replace(x, m=arguments.m) for x in workloads))
    with log_level(logging.INFO):
        progress = Progress(len(workloads))
    with progress as bar:
        for workload in workloads:
            bar.begin(workload.label)
            results.found.outcomes.append(compare_policies(workload, setting))
            results.save()
            bar.end(workload.label)


def _run_gpu(
    arguments: argparse.Namespace, setting: Setting, results: _Results
) -> None:
    del arguments
    GpuSuite(setting, results.found, results.save).run()


def _run_cost(
    arguments: argparse.Namespace, setting: Setting, results: _Results
) -> None:
    label = find_workloads(arguments.workload)[0].label
    results.found.cost |= tuning_cost(label, setting.recipe.name, setting.device)
    results.save()
