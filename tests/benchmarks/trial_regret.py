"""How far the final plan is from the best of all plans, with and without a trial.

    python tests/benchmarks/trial_regret.py docs/measurements/trial-cpu.json

One grouped-query Llama block in float32, recipe bf16, compiled, at ten sizes. Its four
roles (wq + wo, wk + wv, w1 + w3, w2) make 16 plans; after tuning all of them are measured
again, interleaved, and compared with the plan that tuning ended with. Here wq and wo (wk
and wv, w1 and w3) are switched together, so that all plans can be measured.
"""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
from itertools import product
from pathlib import Path
from statistics import median

import torch
import torchao
from torch import nn
from torch.nn import functional as F

from fp8tune import AutoFloat8, TuneConfig, get_recipe
from fp8tune.decision.intervals import speedup_interval
from fp8tune.decision.rounds import balanced_order

logger = logging.getLogger("trial_regret")

GROUPS = (("wq", "wo"), ("wk", "wv"), ("w1", "w3"), ("w2",))
ROUNDS = 40
UNCOUNTED = 3


class Block(nn.Module):
    """Attention with a quarter of the heads for keys and values, then SwiGLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(dim * 2.6875)
        self.norm_1, self.norm_2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim // 4, bias=False)
        self.wv = nn.Linear(dim, dim // 4, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm_1(x)
        q, k, v = (
            w(y).unflatten(-1, (-1, 32)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.wo(y.transpose(1, 2).flatten(2))
        y = self.norm_2(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Model(nn.Module):
    """A trained input in front of the block, so that its input needs a gradient."""

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(1, rows, dim))
        self.block = Block(dim)

    def forward(self) -> torch.Tensor:
        return self.block(self.embedding)


def compile_block(model: nn.Module) -> None:
    model.block.compile(fullgraph=True, dynamic=False)


def step(model: nn.Module) -> float:
    start = time.perf_counter()
    model().square().mean().backward()
    elapsed = time.perf_counter() - start
    model.zero_grad()
    return elapsed * 1e3


def tuned(dim: int, rows: int, trial_steps: int) -> tuple[frozenset[str], float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    started = time.perf_counter()
    auto = AutoFloat8(
        Model(dim, rows),
        recipe="bf16",
        warmup_steps=1,
        compile=compile_block,
        config=TuneConfig(trial_steps=trial_steps),
    )
    for _ in range(trial_steps + 20):
        if not auto.frozen:
            step(auto)
    names = frozenset(x.rsplit(".", 1)[1] for x in auto.freeze().converted_fqns)
    return names, time.perf_counter() - started


def all_plans(extra: list[frozenset[str]]) -> list[frozenset[str]]:
    grouped = [
        frozenset(
            x for group, on in zip(GROUPS, bits, strict=True) if on for x in group
        )
        for bits in product((False, True), repeat=len(GROUPS))
    ]
    return list(dict.fromkeys([*grouped, *extra]))


def measured(dim: int, rows: int, plans: list[frozenset[str]]) -> list[list[float]]:
    """Step times in ms of each plan, one list a plan, taken in turns.

    One model that is switched in place, since in training a plan finds the weights in
    the caches that its own last step left them in.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(dim, rows)
    compile_block(model)
    times: list[list[float]] = [[] for _ in plans]
    with torch._dynamo.config.patch(recompile_limit=64):
        for turn in range(UNCOUNTED + ROUNDS):
            for i in balanced_order(len(plans), turn):
                switch(model.block, plans[i])
                elapsed = step(model)
                if turn >= UNCOUNTED:
                    times[i].append(elapsed)
    return times


def switch(block: Block, plan: frozenset[str]) -> None:
    recipe = get_recipe("bf16", "cpu")
    for name, child in block.named_children():
        if isinstance(child, nn.Linear) and (name in plan) == (
            type(child) is nn.Linear
        ):
            (recipe.convert if name in plan else recipe.revert)(child)


def compared(slow: list[float], fast: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    interval = speedup_interval(ratios, 0.95)
    return {"low": interval.low, "middle": interval.middle, "high": interval.high}


def one_size(dim: int, rows: int) -> dict[str, object]:
    alone, alone_s = tuned(dim, rows, 0)
    trial, trial_s = tuned(dim, rows, 400)
    plans = all_plans([alone, trial])
    times = measured(dim, rows, plans)
    best = min(range(len(plans)), key=lambda i: median(times[i]))
    named = {"alone": alone, "trial": trial, "all": frozenset(sum(GROUPS, ()))}
    return {
        "D": dim,
        "M": rows,
        "best": sorted(plans[best]),
        "best_ms": median(times[best]),
        "reference_ms": median(times[plans.index(frozenset())]),
        "seconds": {"alone": alone_s, "trial": trial_s},
        "plans": {name: sorted(plan) for name, plan in named.items()},
        "slower_than_best": {
            name: compared(times[plans.index(plan)], times[best])
            for name, plan in named.items()
        },
        "slower_than_reference": {
            name: compared(times[plans.index(plan)], times[plans.index(frozenset())])
            for name, plan in named.items()
        },
    }


def machine() -> dict[str, object]:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "cpu": names[0],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchao": torchao.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    # One thread, so that another process costs its time slices and not two threads'
    # waiting for each other at every barrier.
    torch.set_num_threads(1)
    sizes = list(product((256, 512), (16, 32, 64, 128, 256)))
    results: list[dict[str, object]] = []
    for dim, rows in sizes:
        results.append(one_size(dim, rows))
        logger.info("%s", json.dumps(results[-1]))
        text = json.dumps({"machine": machine(), "sizes": results}, indent=1)
        Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
