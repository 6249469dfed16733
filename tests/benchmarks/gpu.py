"""The first run on a GPU: everything that is to be known of it, in at most ten minutes.

    python tests/benchmarks/gpu.py docs/measurements/gpu          # or: make gpu
    python tests/benchmarks/gpu.py /tmp/results --device cpu      # scaled down, to try it

Each part is a process with a time limit, in order of importance, so that one that fails,
hangs or breaks the GPU's context costs only itself; ``parts.json`` says how each ended.
A part writes what it has as soon as it has it. No part needs a network. In the end
``gpu_page.py`` makes docs/measurements/gpu.md of the folder, where the device is a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fp8tune import AutoFloat8, TuneConfig
from fp8tune.bench.agreement import queue_depth
from fp8tune.bench.policies import Setting, compare_policies
from fp8tune.bench.race import COMPILE, model_of
from fp8tune.bench.report import outcome_data
from fp8tune.bench.suite import Findings, GpuSuite
from fp8tune.bench.workloads import find_workloads, scaled_down
from fp8tune.recipes.registry import get_recipe
from fp8tune.store.environment import describe_environment
from fp8tune.timing.clocks import clock_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8tune.bench.sizes import Workload
    from fp8tune.timing.clock import Clock, Work

ROOT = Path(__file__).parents[2]
LIMIT_S = 590.0
# What a part needs at least to be worth starting.
LEAST_S = 5.0
WORKLOAD = "llama3-8b@8192"
SMALL_WORKLOAD = "torchtitan-debug@16384"


def write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def smallest(workload: Workload) -> Workload:
    """For a CPU, where nothing but the way is tried out."""
    return replace(scaled_down(workload), m=16)


# Parts that run our own code. Each gets the folder, the device, a clock and its seconds.


def environment(
    folder: Path, device: torch.device, clock: Clock, seconds: float
) -> None:
    del clock, seconds
    git = shutil.which("git")
    commit = "unknown"
    if git:
        asked = [git, "-C", str(ROOT), "rev-parse", "HEAD"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False)  # noqa: S603
        commit = answer.stdout.strip() or commit
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
        "python": sys.version.split()[0],
        **dict(describe_environment(device)),
    }
    write(folder / "environment.json", found)


def bench(folder: Path, device: torch.device, clock: Clock, seconds: float) -> None:
    """The suite of ``fp8tune bench``, on a CPU one small workload."""
    small = device.type == "cpu"
    setting = Setting(
        recipe=get_recipe("bf16" if small else "rowwise", device),
        device=device,
        clock=clock,
        compiled=not small,
        max_seconds=0.1 if small else 5.0,
        max_compile_seconds=1.0 if small else 60.0,
    )
    found = Findings()

    def save() -> None:
        write(
            folder / "bench.json",
            {
                "recipe": setting.recipe.name,
                "workloads": [outcome_data(x) for x in found.outcomes],
                "clock_agreement": [asdict(x) for x in found.agreement],
                "tuning_cost": found.cost,
                "missing": found.missing,
                "discarded": getattr(clock, "discarded", None),
                "with_gaps": getattr(clock, "with_gaps", None),
            },
        )

    if small:
        (workload,) = find_workloads([SMALL_WORKLOAD])
        found.outcomes.append(compare_policies(smallest(workload), setting))
    else:
        GpuSuite(setting, found, save, limit_s=seconds).run()
    save()


def queue(folder: Path, device: torch.device, clock: Clock, seconds: float) -> None:
    """How many launches fit into the driver's queue."""
    del clock, seconds
    if device.type == "cuda":
        write(folder / "queue.json", {"launches": queue_depth(device)})


class Noted:
    """A clock that notes the spans of a trial's steps, and the SM clock while timing."""

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self._clock = clock
        self._device = device
        self._looked_at = float("-inf")
        self.spans: list[float] = []
        self.timing_mhz: list[int | None] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clock, name)

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        times = self._clock.time_ms(work)
        if time.monotonic() - self._looked_at >= 1:
            self._looked_at = time.monotonic()
            self.timing_mhz.append(sm_mhz(self._device))
        return times

    def elapsed_ms(self, start: Any, end: Any, what: object) -> float:
        self.spans.append(self._clock.elapsed_ms(start, end, what))
        return self.spans[-1]


def trial(folder: Path, device: torch.device, clock: Clock, seconds: float) -> None:
    """One trial: spans by events, and wall time from start to start; the SM clock too."""
    small = device.type == "cpu"
    (workload,) = find_workloads([SMALL_WORKLOAD if small else WORKLOAD])
    recipe = get_recipe("bf16" if small else "rowwise", device)
    model = model_of(smallest(workload) if small else workload, recipe, device)
    noted: Any = Noted(clock, device)
    steps = 8 if small else 100
    times = {"timing": "eager", "max_seconds": 0.1} if small else {}
    config = TuneConfig(trial_steps=steps, **times)
    auto = AutoFloat8(
        model,
        recipe=recipe,
        compile=(lambda module: module) if small else COMPILE,
        config=config,
        clock=noted,
    )
    records: list[dict[str, Any]] = []
    deadline = time.monotonic() + 0.8 * seconds
    while not auto.frozen and len(records) < 1000 and time.monotonic() < deadline:
        began, phase = clock.now(), auto.phase
        auto().backward(model.grad_output)
        auto.zero_grad()
        record = {"phase": str(phase), "wall_ms": (clock.now() - began) * 1e3}
        records.append({**record, "sm_mhz": sm_mhz(device)})
    for _ in range(10):
        began = clock.now()
        auto().backward(model.grad_output)
        auto.zero_grad()
        record = {"phase": "after", "wall_ms": (clock.now() - began) * 1e3}
        records.append({**record, "sm_mhz": sm_mhz(device)})
    plan = auto.freeze()
    data = {
        "steps": records,
        "spans_ms": noted.spans,
        "timing_sm_mhz": noted.timing_mhz,
        "plan": str(plan),
    }
    write(folder / "trial.json", data)


def sm_mhz(device: torch.device) -> int | None:
    """The frequency of the SMs, if the driver's tool is there."""
    tool = shutil.which("nvidia-smi") if device.type == "cuda" else None
    if tool is None:
        return None
    asked = [tool, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    asked += ["-i", str(device.index or 0)]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)  # noqa: S603
    first = answer.stdout.strip().split("\n", 1)[0]
    return int(first) if first.isdigit() else None


PARTS: dict[str, Callable[[Path, torch.device, Clock, float], None]] = {
    "environment": environment,
    "queue": queue,
    "bench": bench,
    "trial": trial,
}

# Name, most seconds, and a command; None runs the part above of that name. "{folder}" and
# "{device}" are filled in.
ORDER: list[tuple[str, float, list[str] | None]] = [
    ("environment", 30, None),
    ("queue", 30, None),
    ("bench", 270, None),
    ("tests", 90, ["-m", "pytest", "-m", "gpu", "-q", "--junitxml={folder}/tests.xml"]),
    ("trial", 90, None),
    ("demo", 120, ["examples/train_llama.py"]),
    *(
        (
            f"sweep-{x}",
            120,
            [
                *("-m", "fp8tune", "sweep", "--device", "{device}"),
                *("--recipe", x, "--json"),
            ],
        )
        for x in ("rowwise", "tensorwise")
    ),
]
# On a CPU these take minutes and say nothing about a GPU.
GPU_ONLY = {"tests", "demo", "sweep-rowwise", "sweep-tensorwise"}


def run_process(
    name: str, command: list[str] | None, folder: Path, device: str, seconds: float
) -> str:
    """Run a part in a process of its own; how it ended, in words."""
    own = [__file__, str(folder), "--device", device, "--part", name]
    filled = [x.format(folder=folder, device=device) for x in command or own]
    filled += [] if command else ["--seconds", str(seconds)]
    printed = folder / f"{name}.{'json' if filled[-1] == '--json' else 'txt'}"
    said = folder / f"{name}.log"
    with printed.open("w") as out, said.open("w") as log:
        try:
            done = subprocess.run(  # noqa: S603 - our own code
                [sys.executable, *filled],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=out,
                stderr=log,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"cut after {seconds:.0f} s"
    return "done" if done.returncode == 0 else f"failed with {done.returncode}"


def run_all(
    folder: Path,
    device: str,
    run: Callable[..., str] = run_process,
    order: Sequence[tuple[str, float, list[str] | None]] = ORDER,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, dict[str, Any]]:
    """Run every part that there is time for; returns and writes how each ended."""
    folder.mkdir(parents=True, exist_ok=True)
    end = now() + LIMIT_S
    ended: dict[str, dict[str, Any]] = {}
    for name, most, command in order:
        if device == "cpu" and name in GPU_ONLY:
            ended[name] = {"outcome": "needs a GPU", "seconds": 0.0}
            continue
        started = now()
        left = min(most, end - started)
        try:
            outcome = (
                run(name, command, folder, device, left)
                if left >= LEAST_S
                else "no time left"
            )
        except Exception as error:  # noqa: BLE001 - the other parts go on
            outcome = f"failed: {type(error).__name__}: {error}".split("\n", 1)[0]
        ended[name] = {"outcome": outcome, "seconds": round(now() - started, 1)}
        write(folder / "parts.json", ended)
    return ended


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--part", choices=sorted(PARTS))
    parser.add_argument("--seconds", type=float, default=60.0)
    parsed = parser.parse_args(arguments)
    folder = parsed.folder.resolve()
    if parsed.part:
        device = torch.device(parsed.device)
        PARTS[parsed.part](folder, device, clock_for(device), parsed.seconds)
        return
    if parsed.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu tries it out, scaled down")
    for name, ended in run_all(folder, parsed.device).items():
        print(f"{name}: {ended['outcome']}, {ended['seconds']} s")  # noqa: T201


if __name__ == "__main__":
    main()
