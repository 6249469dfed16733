"""What a command returns, and what several commands do alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8tune.config import TuneConfig
from fp8tune.errors import CacheError, Fp8TuneError
from fp8tune.report.describe import layers_word
from fp8tune.store.runs import load_runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8tune.decision.records import Decision
    from fp8tune.store.runs import Run

__all__ = [
    "Answer",
    "NoEntryError",
    "Screen",
    "heading_lines",
    "layer_data",
    "name_of",
    "newest_run",
    "require_runs",
    "run_data",
    "write_page",
]


class NoEntryError(Fp8TuneError):
    """What was asked for does not exist; the command line answers with exit code 1."""


@dataclass(frozen=True)
class Screen:
    """What the lines are printed on.

    Attributes:
        width: characters in a line.
        colour: whether it understands ANSI colours.
    """

    width: int
    colour: bool


@dataclass(frozen=True)
class Answer:
    """The result of a command, for people and for programs.

    Attributes:
        lines: for people.
        data: for programs, as docs/schema describes it.
        interrupted: Ctrl-C ended it, and this is what there was by then.
    """

    lines: Sequence[str]
    data: dict[str, Any]
    interrupted: bool = False


def require_runs(path: str, min_speedup: float) -> list[Run]:
    """The runs of a cache file, at least one.

    Raises:
        NoEntryError: the file holds no run.
        Fp8TuneError, OSError: it cannot be read, or the threshold is wrong.
    """
    try:
        runs = load_runs(path, replace(TuneConfig(), min_speedup=min_speedup))
    except CacheError as error:
        raise CacheError(
            f"{path} cannot be read as a cache ({error}); give what cache= of a run "
            "wrote. A plan is read by Plan.load, and by fp8tune export"
        ) from error
    if not runs:
        raise NoEntryError(f"{path} holds no run yet")
    return runs


def newest_run(runs: Sequence[Run], number: int | None, path: str) -> Run:
    """The run of that number, or the newest.

    Raises:
        NoEntryError: there is no run of that number.
    """
    if number is None:
        return runs[-1]
    for run in runs:
        if run.number == number:
            return run
    raise NoEntryError(f"{path} has no run {number}, only 1 to {runs[-1].number}")


def heading_lines(run: Run, of: int) -> list[str]:
    """Which run this is, and what it is true of."""
    environment = dict(run.key.environment)
    device = environment.pop("device", "an unknown device")
    recorded = f", recorded {run.recorded}" if run.recorded else ""
    recipe = f"{run.key.label} (emulated)" if run.emulated else run.key.label
    number, word = len(run.layers), layers_word(run.layers)
    what = f"{number} {word}, {recipe}, {run.key.timing}"
    return [
        f"run {run.number} of {of}{recorded}: {what}, on {device}",
        ", ".join(f"{name} {value}" for name, value in environment.items()),
    ]


def run_data(run: Run) -> dict[str, Any]:
    """The same for programs."""
    return {
        "number": run.number,
        "recorded": run.recorded or None,
        "environment": dict(run.key.environment),
        "recipe": run.key.label,
        "settings": run.key.all_settings,
        "emulated": run.emulated,
        "timing": run.key.timing,
    }


def layer_data(decision: Decision) -> dict[str, Any]:
    """One decision for programs, without the layer's name."""
    shapes = [signature.shape for signature, _ in decision.signatures]
    return {
        "m": sorted({shape.m for shape in shapes}),
        "timed_m": list(decision.timed_m),
        "k": decision.k,
        "n": decision.n,
        "experts": decision.experts,
        "verdict": str(decision.verdict),
        "recipe": decision.recipe,
        "reason": str(decision.reason),
        "reference_ms": decision.reference_ms,
        "candidate_ms": decision.candidate_ms,
        "speedup": decision.speedup,
        "speedup_low": decision.speedup_low,
        "speedup_high": decision.speedup_high,
        "samples": decision.samples,
    }


def write_page(path: str, page: str) -> list[str]:
    """Write a page, and say so.

    Raises:
        OSError: it cannot be written.
    """
    data = page.encode()
    Path(path).write_bytes(data)
    return [f"wrote {path}, {len(data) / 2**20:.1f} MiB; open it in a browser"]


def name_of(fqn: str) -> str:
    """A model that is itself a Linear has an empty name, which nobody could read."""
    return fqn or "(root)"
