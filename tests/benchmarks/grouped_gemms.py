"""Each GEMM of the blocks with experts by itself, and grouped GEMMs of many sizes.

    python tests/benchmarks/grouped_gemms.py docs/measurements/grouped-gemms-cpu.json

Recipe bf16 in float32 models, eager, real clocks, no cache, no trial: what AutoFloat8 times
when it decides about each GEMM, forward + backward. Blocks are scaled down as ``fp8tune
bench`` does on a CPU. In the table of sizes each expert has equally many rows, or one row
less.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fp8tune import AutoFloat8, TuneConfig
from fp8tune.bench.blocks import Model
from fp8tune.bench.workloads import WORKLOADS, scaled_down
from fp8tune.store.environment import describe_environment

CPU = torch.device("cpu")

# T, E, K, N: from few rows for each of many experts to many rows for few.
SIZES = [
    (1, 8, 512, 1024),
    (16, 128, 512, 384),
    (64, 64, 1024, 256),
    (512, 64, 512, 384),
    (1024, 128, 512, 384),
    (1024, 256, 64, 64),
    (64, 8, 2048, 2048),
    (256, 8, 512, 1024),
    (2048, 32, 512, 768),
    (2048, 8, 512, 1024),
    (4096, 8, 512, 1376),
]


class One(nn.Module):
    """One grouped GEMM; rows are spread evenly."""

    def __init__(self, rows: int, experts: int, k: int, n: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(rows, k))
        self.weight = nn.Parameter(torch.randn(experts, n, k) / k**0.5)
        self.grad_output = torch.randn(rows, n)
        ends = torch.arange(1, experts + 1) * rows
        self.offs = (ends / experts).ceil().int()

    def forward(self) -> torch.Tensor:
        return F.grouped_mm(self.input, self.weight.mT, offs=self.offs)


def decisions(model: Any) -> list[dict[str, Any]]:
    """What tuning says of each GEMM."""
    config = TuneConfig(trial_steps=0)
    auto = AutoFloat8(model, "bf16", warmup_steps=1, config=config)
    for _ in range(2):
        auto().backward(model.grad_output)
        auto.zero_grad()
    return [
        {
            "fqn": x.fqn,
            "experts": x.experts,
            "m": x.signatures[0][0].shape.m,
            "k": x.k,
            "n": x.n,
            "reference_ms": x.reference_ms,
            "speedup": [x.speedup_low, x.speedup, x.speedup_high],
            "reason": str(x.reason),
        }
        for x in auto.freeze().decisions
    ]


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)  # noqa: T201 - its output


def shown(found: dict[str, Any]) -> tuple[str, str]:
    low, middle, high = found["speedup"]
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]", found["reason"]


def main(target: Path) -> None:
    logging.getLogger("fp8tune").setLevel(logging.ERROR)
    torch.manual_seed(0)
    result: dict[str, Any] = {"environment": dict(describe_environment(CPU))}
    result |= {"blocks": {}, "sizes": []}
    for workload in WORKLOADS:
        if workload.moe is None:
            continue
        small = scaled_down(workload)
        found = decisions(Model(small, CPU, torch.float32))
        result["blocks"][small.label] = found
        for x in found:
            name = x["fqn"].removeprefix("block.")
            sizes = (x["m"], x["k"], x["n"], x["experts"] or "-")
            row(small.label, name, *sizes, *shown(x))
    for rows, experts, k, n in SIZES:
        (found,) = decisions(One(rows, experts, k, n))
        result["sizes"].append(found)
        row(rows, experts, k, n, *shown(found))
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
