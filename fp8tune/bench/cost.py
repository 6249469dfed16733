"""What tuning one workload costs, with a cold and with a warm compile cache.

Each run is a process of its own, so that nothing compiled is left in memory, with
Inductor's and Triton's caches in a folder that is empty for the first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fp8tune.bench.tuning import tune
from fp8tune.bench.workloads import find_workloads, scaled_down
from fp8tune.config import TuneConfig
from fp8tune.errors import BenchError
from fp8tune.recipes.registry import resolve_recipe
from fp8tune.timing.clocks import clock_for

__all__ = ["record_tuning", "tuning_cost"]

_LONGEST_S = 240
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def tuning_cost(label: str, recipe: str, device: torch.device) -> dict[str, Any]:
    """Seconds until all signatures of a workload are timed, compiled.

    Args:
        label: the workload, such as "llama3-8b@8192"; scaled down on a CPU.
        recipe: its name.
        device: where.

    Returns:
        "cold" and "warm", each with the seconds of the whole, as ``tuning_s``, and those
        of compiling and warming up, as ``warm_up_s``. Importing torch is not counted, what
        the compiler imports is.

    Raises:
        BenchError: tuning failed, or took more than four minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        states = ("cold", "warm")
        return {x: _in_a_process(label, recipe, str(device), folder) for x in states}


def _in_a_process(label: str, recipe: str, device: str, folder: str) -> dict[str, Any]:
    answer = Path(folder) / "answer.json"
    code = "import sys; from fp8tune.bench.cost import record_tuning as f; f(*sys.argv[1:])"
    try:
        subprocess.run(  # noqa: S603 - our own code and arguments
            [sys.executable, "-c", code, label, recipe, device, str(answer)],
            env={
                **os.environ,
                **dict.fromkeys(_CACHES, str(Path(folder) / "compiled")),
            },
            check=True,
            capture_output=True,
            text=True,
            timeout=_LONGEST_S,
        )
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().rsplit("\n", 1)[-1]
        raise BenchError(
            f"tuning {label} in a process of its own failed: {last}"
        ) from None
    except subprocess.TimeoutExpired:
        raise BenchError(f"tuning {label} took more than {_LONGEST_S} s") from None
    return json.loads(answer.read_text(encoding="utf-8"))


def record_tuning(label: str, recipe: str, device: str, answer: str) -> None:
    """Tune once in this process, without a trial, and write what it took as JSON."""
    place = torch.device(device)
    (workload,) = find_workloads([label])
    if place.type == "cpu":
        workload = scaled_down(workload)
    choice = tune(
        workload,
        resolve_recipe(recipe, place),
        place,
        clock_for(place),
        TuneConfig(trial_steps=0),
        compiled=True,
    )
    found = {"tuning_s": choice.seconds, "warm_up_s": choice.warm_up_s}
    Path(answer).write_text(json.dumps(found), encoding="utf-8")
