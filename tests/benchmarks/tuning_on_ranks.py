"""How long two gloo ranks take to tune one block, with a cold and a warm compile cache.

    python tests/benchmarks/tuning_on_ranks.py [WORKLOAD ...]

Blocks are scaled down as ``fp8tune bench`` does on a CPU, and each rank has one thread. It
needs nothing of fp8tune that is newer than AutoFloat8 and the benchmark's blocks, so an
older commit is measured with PYTHONPATH set to a worktree of it. One line a run: workload,
how it is timed, state of the cache, seconds from the freeze's begin to its end on the
slower rank, and the CPU seconds of both ranks' processes and of their children meanwhile,
most of which are the C++ compiler.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from fp8tune import AutoFloat8, TuneConfig
from fp8tune.bench.blocks import Block
from fp8tune.bench.workloads import find_workloads, scaled_down

WORKLOADS = ("llama3-8b@8192", "llama3-70b-tp8@8192")
RUNS = (("eager", False), ("cold", True), ("warm", True))


def tune(rank: int, label: str, folder: str, name: str, *, compile: bool) -> None:
    """On one rank: a training step, then the freeze, whose seconds are written."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{name}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    (workload,) = map(scaled_down, find_workloads([label]))
    torch.manual_seed(0)
    auto = AutoFloat8(
        Block(workload),
        "bf16",
        warmup_steps=1,
        compile=compile,
        config=TuneConfig(trial_steps=0),
    )
    x = torch.randn(1, workload.m, workload.dim)
    DistributedDataParallel(auto)(x).square().mean().backward()
    dist.barrier()
    began, worked, built = time.perf_counter(), time.process_time(), children_s()
    auto.freeze()
    seconds = (
        time.perf_counter() - began,
        time.process_time() - worked,
        children_s() - built,
    )
    Path(folder, f"{name}-{rank}.json").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def children_s() -> float:
    """CPU seconds of the children that have ended."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def start(rank: int, label: str, folder: str, name: str, compile: bool) -> None:
    """For multiprocessing, which passes no keywords."""
    tune(rank, label, folder, name, compile=compile)


def main(labels: list[str]) -> None:
    """Run each workload eagerly, compiled with an empty cache, and with the filled one."""
    for label in labels or WORKLOADS:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"
            for name, compile in RUNS:
                multiprocessing.spawn(start, (label, folder, name, compile), nprocs=2)
                found = [
                    json.loads(Path(folder, f"{name}-{x}.json").read_text())
                    for x in range(2)
                ]
                wall, cpu, children = map(list, zip(*found, strict=True))
                line = f"{label} {name} {max(wall):.2f} s, CPU {sum(cpu):.1f} s"
                sys.stdout.write(f"{line}, children {sum(children):.1f} s\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
