"""``fp8tune export``: a plan as text to paste into another trainer's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8tune.commands.answer import Answer, Screen, newest_run, require_runs
from fp8tune.errors import CacheError
from fp8tune.plan.export import export_lines, single_recipe
from fp8tune.plan.plan import Plan

if TYPE_CHECKING:
    import argparse

__all__ = ["answer"]


def answer(arguments: argparse.Namespace, screen: Screen) -> Answer:
    """The text for ``arguments.to``; not folded, since it is to be pasted."""
    del screen
    plan = _plan(arguments)
    lines = export_lines(plan, arguments.to)
    data = {
        "to": arguments.to,
        "recipe": single_recipe(plan),
        "converted_fqns": plan.converted_fqns,
        "lines": lines,
    }
    return Answer(lines, data)


def _plan(arguments: argparse.Namespace) -> Plan:
    """What ``Plan.save`` wrote, or what a run in a cache file decides."""
    path: str = arguments.cache
    try:
        return Plan.load(path)
    except CacheError:
        runs = require_runs(path, arguments.min_speedup)
    return Plan.of(newest_run(runs, arguments.run, path).plan)
