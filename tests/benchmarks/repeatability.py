"""How often ten tunings of one model disagree.

    python tests/benchmarks/repeatability.py docs/measurements/repeatability-cpu.json

Recipe bf16, real clocks, no cache. Each model is tuned ten times in each mode: eager,
compiled by per-layer timing alone, and compiled with the default trial. The layers that
any tuning reports as "no clear difference", alone or in training, may end either way and
are listed apart. Of the others a flip is a verdict that differs from that of most tunings
of the layer.

Modes can be named behind the file, as ``eager trial``; the default is all.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from fp8tune import AutoFloat8, Reason, TuneConfig
from fp8tune.bench.blocks import Block
from fp8tune.bench.workloads import find_workloads, scaled_down
from fp8tune.store.environment import describe_environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8tune import Decision, Plan

logger = logging.getLogger("repeatability")

TUNINGS = 10
MODES = {
    "eager": (False, TuneConfig()),
    "compiled": (True, TuneConfig(trial_steps=0)),
    "trial": (True, TuneConfig()),
}


class LlamaBlock(Block):
    """Llama3-8B's block with every width divided by 8, for 128 rows."""

    def __init__(self) -> None:
        (full,) = find_workloads(["llama3-8b@8192"])
        small = scaled_down(full)
        super().__init__(small)
        self.shape = (1, small.m, small.dim)


class MixedSizes(nn.Module):
    """At 64 rows, Linears from clearly slower to clearly faster on a CPU with AMX."""

    shape = (64, 256)

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64, 128, 256, 512, 1024)
        self.up = nn.ModuleList(nn.Linear(256, n) for n in widths)
        self.down = nn.ModuleList(nn.Linear(n, 256) for n in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.relu(up(x)))
        return x


def tuned(kind: Callable[[], nn.Module], mode: str) -> Plan:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = kind()
    x = torch.randn(model.shape, requires_grad=True)
    compile, config = MODES[mode]
    auto = AutoFloat8(model, recipe="bf16", compile=compile, config=config)

    def step() -> None:
        model(x).square().mean().backward()
        model.zero_grad()
        x.grad = None

    return auto.trial(step)


def counted(plans: list[Plan]) -> dict[str, object]:
    """Flips, and what became of each layer in each tuning."""
    layers: dict[str, list[Decision]] = {
        x.fqn: [plan[x.fqn] for plan in plans] for x in plans[0].decisions
    }
    unclear = [fqn for fqn, each in layers.items() if any(map(is_unclear, each))]
    clear = {fqn: each for fqn, each in layers.items() if fqn not in unclear}
    flips = {fqn: flips_of(each) for fqn, each in clear.items()}
    decisions = len(plans) * len(clear)
    return {
        "tunings": len(plans),
        "decisions": decisions,
        "flips": sum(flips.values()),
        "flips_per_100_decisions": 100 * sum(flips.values()) / max(decisions, 1),
        "no_clear_difference": unclear,
        "layers": {
            fqn: [{"reason": x.reason, "speedup": x.speedup} for x in each]
            for fqn, each in layers.items()
        },
    }


def is_unclear(decision: Decision) -> bool:
    unclear = (Reason.NO_CLEAR_DIFFERENCE, Reason.UNCLEAR_IN_TRAINING)
    return decision.reason in unclear


def flips_of(decisions: list[Decision]) -> int:
    verdicts = Counter(x.verdict for x in decisions)
    return len(decisions) - max(verdicts.values())


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    path, *modes = sys.argv[1:]
    machine = {
        "environment": dict(describe_environment(torch.device("cpu"))),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python", *sys.argv]),
    }
    results: dict[str, object] = {}
    for mode in modes or MODES:
        for kind in (LlamaBlock, MixedSizes):
            name = f"{kind.__name__}, {mode}"
            results[name] = found = counted([tuned(kind, mode) for _ in range(TUNINGS)])
            logger.info(
                "%s: %s flips in %s decisions, apart from %s",
                name,
                found["flips"],
                found["decisions"],
                found["no_clear_difference"] or "none",
            )
            text = json.dumps({"machine": machine, "results": results}, indent=1)
            Path(path).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
