"""Verdicts that are written to the cache while other processes want the same cores.

    python tests/benchmarks/contention.py docs/measurements/contention-cpu.json

The script starts the load itself and ends it, so the machine need not be idle otherwise.
Each tuning is of a fresh model and has a cache of its own. Afterwards the same model is
made again with that cache: what it freezes with at once is what was written.

Two recipes whose truth needs no clock stand in for float8, so that the outcome does not
hang on what this CPU is good at:

- "half" computes half of the outputs and repeats them: half of the GEMMs' work, forward
  and backward, so it is faster;
- "twice" computes the mean of two equal GEMMs: twice the work, so it is slower.

An opposite verdict is "slower" for half, or "faster" for twice. "No clear difference" is
neither right nor opposite. What a busy machine timed is not cached.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from fp8tune import AutoFloat8, Reason, TuneConfig
from fp8tune.recipes import change_class, restore_class
from fp8tune.store.environment import describe_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8tune import Plan

logger = logging.getLogger("contention")

TUNINGS = 200
THREADS = (1, 2)
ROWS, WIDTH = 64, 512
CONFIG = TuneConfig(max_seconds=0.2, include_output_layer=True)

# Each ends by itself when who started it is gone.
_HEAD = """
import os, random, sys, time
def goes_on(parent=os.getppid()):
    return os.getppid() == parent
def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
print("ready", flush=True)
"""
_SPIN = _HEAD + "while goes_on(): spin(0.05)"
_GEMM = """
import numpy
a = numpy.ones((768, 768), dtype="float32")
""" + (_HEAD + "while goes_on(): a @ a")
_MEMORY = """
import numpy
a = numpy.ones(32 * 2**20, dtype="float32")
b = a.copy()
""" + (_HEAD + "while goes_on(): b[:] = a")
_BURST = _HEAD + (
    "while goes_on():\n"
    "    spin(random.uniform(0.01, 0.2))\n"
    "    time.sleep(random.uniform(0.01, 0.2))"
)

# What runs beside the tuning, as source of Python.
LOADS = {
    "spinner": [_SPIN],
    "GEMMs": [_GEMM],
    "memory": [_MEMORY],
    "bursts": [_BURST, _BURST],
    "all": [_SPIN, _GEMM, _MEMORY, _BURST],
}

# A tenth as many more, before: what is cached there shows that the rest could be.
NO_LOAD: dict[str, list[str]] = {"none of its own": []}


class HalfLinear(nn.Linear):
    """Half of the outputs, repeated: half of a Linear's work."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        some = F.linear(input, self.weight[: self.out_features // 2])
        return torch.cat([some, some], dim=-1)


class TwiceLinear(nn.Linear):
    """The mean of two equal results: twice a Linear's work."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return (F.linear(input, self.weight) + F.linear(input, self.weight)) / 2


class WorkRecipe:
    """A stopwatch's recipe: nothing but another amount of work."""

    reference = "float32"
    settings = "of tests/benchmarks/contention.py"
    emulated = False

    def __init__(self, name: str, kind: type[nn.Linear]) -> None:
        self.name = name
        self._kind = kind

    def supports(self, linear: nn.Linear) -> Reason | None:
        fits = linear.weight.dtype is torch.float32
        return None if fits else Reason.UNSUPPORTED_DTYPE

    def static_filter(self, linear: nn.Linear) -> Reason | None:
        del linear

    def convert(self, linear: nn.Linear) -> None:
        change_class(linear, self._kind, {})

    def revert(self, linear: nn.Linear) -> None:
        restore_class(linear, self._kind, {})


HALF, TWICE = WorkRecipe("half", HalfLinear), WorkRecipe("twice", TwiceLinear)
OPPOSITE = {"half": Reason.SLOWER, "twice": Reason.FASTER}
RIGHT = {"half": Reason.FASTER, "twice": Reason.SLOWER}


@contextlib.contextmanager
def load(sources: list[str]) -> Iterator[None]:
    """Run these beside the block."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for source in sources:
            command = [sys.executable, "-c", source]
            child = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603
            started.append(child)
        for child in started:
            if child.stdout is None or child.stdout.readline() != b"ready\n":
                raise RuntimeError("a process that was to keep the machine busy ended")
        yield
    finally:
        for child in started:
            child.kill()
        for child in started:
            child.communicate()


def wrapped(recipe: WorkRecipe, cache: Path) -> AutoFloat8:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    return AutoFloat8(model, recipe=recipe, warmup_steps=1, cache=cache, config=CONFIG)


def tuned(recipe: WorkRecipe, cache: Path) -> AutoFloat8:
    auto = wrapped(recipe, cache)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    while not auto.frozen:
        auto(x).square().mean().backward()
        auto.zero_grad()
        x.grad = None
    return auto


def of_plan(plan: Plan | None) -> str | None:
    return None if plan is None else str(plan.decisions[0].reason)


def one_tuning(recipe: WorkRecipe, folder: Path) -> dict[str, Any]:
    """What one tuning found, and what a later run would take from its cache."""
    cache = folder / "cache.json"
    cache.unlink(missing_ok=True)
    auto = tuned(recipe, cache)
    again = wrapped(recipe, cache)
    found = auto.plan.decisions[0]
    return {
        "recipe": recipe.name,
        "found": of_plan(auto.plan),
        "speedup": found.speedup,
        "pairs": found.samples,
        "cached": of_plan(again.plan if again.frozen else None),
    }


def counted(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Verdicts by what became of them."""
    cached = [x for x in rows if x["cached"]]
    return {
        "tunings": len(rows),
        "cached": len(cached),
        "not cached as unsteady": len(rows) - len(cached),
        "opposite in the cache": sum(
            x["cached"] == OPPOSITE[x["recipe"]] for x in cached
        ),
        "right in the cache": sum(x["cached"] == RIGHT[x["recipe"]] for x in cached),
        "opposite in the run": sum(x["found"] == OPPOSITE[x["recipe"]] for x in rows),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each load and number of threads, and one for all, in Markdown."""
    groups = {
        f"{name}, {threads} {'thread' if threads == 1 else 'threads'}": [
            x for x in rows if (x["load"], x["threads"]) == (name, threads)
        ]
        for name, threads in product([*NO_LOAD, *LOADS], THREADS)
    }
    counts = {name: counted(x) for name, x in groups.items() if x}
    counts["sum under load"] = counted([x for x in rows if x["load"] in LOADS])
    head = ["load", *counts["sum under load"]]
    lines = [head, ["---"] * len(head)]
    lines += [[name, *map(str, x.values())] for name, x in counts.items()]
    return "\n".join("| " + " | ".join(x) + " |" for x in lines)


def run(loads: dict[str, list[str]], tunings: int) -> Iterator[dict[str, Any]]:
    """So many tunings, spread evenly over loads, threads and recipes."""
    kinds = list(product(loads, THREADS, (HALF, TWICE)))
    turns = [kinds[i % len(kinds)] for i in range(tunings)]
    threads_before = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, sources in loads.items():
                ours = [x for x in turns if x[0] == name]
                with load(sources if ours else []):
                    for _, threads, recipe in ours:
                        torch.set_num_threads(threads)
                        found = one_tuning(recipe, Path(folder))
                        yield {"load": name, "threads": threads, **found}
    finally:
        torch.set_num_threads(threads_before)


def machine() -> dict[str, Any]:
    return {
        "environment": dict(describe_environment(torch.device("cpu"))),
        "cores": os.cpu_count(),
        "load average before": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO)
    path, *number = sys.argv[1:]
    tunings = int(number[0]) if number else TUNINGS
    before, started = machine(), time.monotonic()
    rows: list[dict[str, Any]] = []
    for loads, share in ((NO_LOAD, tunings // 10), (LOADS, tunings)):
        for row in run(loads, share):
            rows.append(row)
            document = {
                "machine": before,
                "load average after": os.getloadavg(),
                "seconds": round(time.monotonic() - started, 1),
                "counts": counted([x for x in rows if x["load"] in LOADS]),
                "tunings": rows,
            }
            text = json.dumps(document, indent=1) + "\n"
            Path(path).write_text(text, encoding="utf-8")
    logger.info("%s", table(rows))


if __name__ == "__main__":
    main()
