"""``fp8tune sweep``: the M, K, N grid of torchao's table of speedups, timed here.

torchao published such a table for one H100 (torchao PR 2312) and took the thresholds of
its static filter from it. Both look the same: a row for each M and K, a column for each
N, reference time / recipe time in the cells.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fp8tune.commands.answer import Answer, NoEntryError, Screen
from fp8tune.commands.device import pick_device
from fp8tune.commands.measure import decide_alone, lone_sample
from fp8tune.config import Timing, TuneConfig
from fp8tune.decision.reasons import Reason
from fp8tune.errors import ConfigError
from fp8tune.recipes.registry import get_recipe
from fp8tune.report.columns import Column, column_lines, paragraph
from fp8tune.report.messages import measurement_line
from fp8tune.report.progress import Progress, log_level
from fp8tune.store.environment import describe_environment
from fp8tune.timing.clocks import clock_for
from fp8tune.timing.measure import measure

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence

    from fp8tune.decision.records import Decision
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.timing.clock import Clock

__all__ = ["answer"]

# The table's own grid, and one that a CPU gets through.
_GPU_SIZES = tuple(1024 << i for i in range(6))
_CPU_SIZES = tuple(16 << i for i in range(6))

_SHORT = {
    Reason.OUT_OF_MEMORY: "oom",
    Reason.NOT_MEASURED: "failed",
    Reason.NOT_DIVISIBLE_BY_16: "no",
}
_LEGEND = {
    Reason.NO_CLEAR_DIFFERENCE: "~ is no clear difference from 1.00",
    Reason.OUT_OF_MEMORY: "oom ran out of memory",
    Reason.NOT_MEASURED: "failed could not be timed",
    Reason.NOT_DIVISIBLE_BY_16: "no is a K or N that the recipe does not take",
}


@dataclass(frozen=True)
class _Cell:
    """One M, K, N.

    Attributes:
        m: rows.
        k: in_features.
        n: out_features.
        reason: how it ended; faster, slower or neither, if it could be timed.
        accepted: whether torchao's static filter converts it; None without thresholds.
        decision: the times, if there are any.
    """

    m: int
    k: int
    n: int
    reason: Reason
    accepted: bool | None
    decision: Decision | None = None

    @property
    def text(self) -> str:
        """As it stands in the table."""
        if self.decision is None or self.decision.speedup is None:
            return _SHORT.get(self.reason, "failed")
        unclear = self.reason is Reason.NO_CLEAR_DIFFERENCE
        return f"{'~' if unclear else ''}{self.decision.speedup:.2f}"


class _Sweep:
    """Times cells, one after the other.

    Attributes:
        recipe: what is timed.
        timing: compiled or eager.
        has_filter: whether torchao has thresholds for the recipe.
        interrupted: Ctrl-C came before the last cell.
    """

    def __init__(
        self, arguments: argparse.Namespace, device: torch.device, clock: Clock | None
    ) -> None:
        self.recipe = get_recipe(arguments.recipe, device)
        self.timing = Timing.EAGER if arguments.eager else Timing.COMPILED
        self._device = device
        self._clock = clock or clock_for(device)
        self._config = TuneConfig(max_seconds=arguments.max_seconds)
        self.has_filter: bool = getattr(self.recipe, "has_static_filter", False)
        self.interrupted = False

    def run(self, grid: Sequence[Sequence[int]]) -> Iterator[_Cell]:
        """The cells of a grid of M, K and N, until Ctrl-C."""
        sizes = list(product(*grid))
        try:
            with log_level(logging.INFO), Progress(len(sizes)) as bar:
                for m, k, n in sizes:
                    bar.begin(f"M={m} K={k} N={n}")
                    cell, line = self._time(m, k, n)
                    bar.end(line)
                    yield cell
        except KeyboardInterrupt:
            self.interrupted = True

    def _time(self, m: int, k: int, n: int) -> tuple[_Cell, str]:
        """The cell, and a line about it."""
        accepted = _accepts(self.recipe, k, n) if self.has_filter else None
        try:
            sample = lone_sample((m, k, n), self.recipe, self._device)
        except NoEntryError as problem:
            return _Cell(m, k, n, Reason.OUT_OF_MEMORY, accepted), str(problem)
        except ConfigError as problem:
            return _Cell(m, k, n, Reason.NOT_DIVISIBLE_BY_16, accepted), str(problem)
        options = {} if self.timing is Timing.COMPILED else None
        measured = measure(sample, self.recipe, self._clock, self._config, options)
        decision = decide_alone(measured, self._config)
        line = measurement_line(measured, self._config)
        return _Cell(m, k, n, decision.reason, accepted, decision), line


def answer(
    arguments: argparse.Namespace, screen: Screen, clock: Clock | None = None
) -> Answer:
    """The table, and how many cells torchao's static filter decides wrongly here.

    Ctrl-C ends it early, with the cells that are timed by then.

    Raises:
        ConfigError: the recipe or the device is unknown.
    """
    device = pick_device(arguments.device)
    default = _GPU_SIZES if device.type == "cuda" else _CPU_SIZES
    grid = [x or default for x in (arguments.m, arguments.k, arguments.n)]
    sweep = _Sweep(arguments, device, clock)
    cells = list(sweep.run(grid))
    recipe = sweep.recipe
    what = f"speedup of {recipe.name} over {recipe.reference}, forward + backward"
    texts = _remarks(sweep, cells, scaled_down=_CPU_SIZES in grid)
    lines = [
        *paragraph(f"{what}, {sweep.timing}, on {device}", screen.width),
        "",
        *_table(grid, cells, screen.width),
        "",
        *(line for text in texts for line in paragraph(text, screen.width)),
    ]
    data = {
        "environment": dict(describe_environment(device)),
        "recipe": recipe.name,
        "reference": recipe.reference,
        "emulated": recipe.emulated,
        "timing": str(sweep.timing),
        "complete": not sweep.interrupted,
        "cells": [_cell_data(x) for x in cells],
        "static_filter": _filter_data(cells) if sweep.has_filter else None,
    }
    return Answer(lines, data, sweep.interrupted)


def _accepts(recipe: Recipe, k: int, n: int) -> bool:
    return recipe.static_filter(nn.Linear(k, n, bias=False, device="meta")) is None


def _table(
    grid: Sequence[Sequence[int]], cells: Iterable[_Cell], width: int
) -> list[str]:
    """In the layout of the published table; empty where nothing was timed."""
    rows, columns = list(product(*grid[:2])), grid[2]
    texts = {(x.m, x.k, x.n): x.text for x in cells}
    names = ["M", "K", *(f"N{n}" for n in columns)]
    body = [
        [str(m), str(k), *(texts.get((m, k, n), "") for n in columns)] for m, k in rows
    ]
    return column_lines([Column(x, right=True) for x in names], body, width)


def _remarks(
    sweep: _Sweep, cells: Sequence[_Cell], *, scaled_down: bool
) -> Iterable[str]:
    reasons = {x.reason for x in cells}
    legend = "; ".join(text for reason, text in _LEGEND.items() if reason in reasons)
    if legend:
        yield legend
    yield _filter_line(sweep, cells)
    if sweep.recipe.emulated:
        yield f"{sweep.recipe.name} is emulated: no times of float8 hardware"
    if scaled_down:
        yield "scaled down: a GPU gets sizes from 1024 to 32768"


def _filter_line(sweep: _Sweep, cells: Sequence[_Cell]) -> str:
    name = sweep.recipe.name
    if not sweep.has_filter:
        return f"torchao's static filter has no thresholds for {name}"
    found = _filter_data(cells)
    slower, faster = found["accepted_slower"], found["rejected_faster"]
    return (
        f"torchao's static filter for {name} would decide {slower + faster} of "
        f"{found['clear']} clear cells wrongly here: it accepts {slower} that are "
        f"slower and rejects {faster} that are faster"
    )


def _filter_data(cells: Iterable[_Cell]) -> dict[str, int]:
    counts = Counter((x.accepted, x.reason) for x in cells)
    clear = (Reason.FASTER, Reason.SLOWER)
    return {
        "clear": sum(counts[x, reason] for x in (True, False) for reason in clear),
        "accepted_slower": counts[True, Reason.SLOWER],
        "rejected_faster": counts[False, Reason.FASTER],
    }


def _cell_data(cell: _Cell) -> dict[str, Any]:
    found = cell.decision
    return {
        "m": cell.m,
        "k": cell.k,
        "n": cell.n,
        "reason": str(cell.reason),
        "accepted": cell.accepted,
        "reference_ms": found and found.reference_ms,
        "candidate_ms": found and found.candidate_ms,
        "speedup": found and found.speedup,
        "speedup_low": found and found.speedup_low,
        "speedup_high": found and found.speedup_high,
        "samples": found.samples if found else 0,
    }
