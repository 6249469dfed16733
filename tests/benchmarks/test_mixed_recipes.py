"""The best recipe per layer against one recipe for all, on a GPU.

Not run yet on any GPU. Writes a table for docs/measurements/ to the file that
FP8TUNE_RESULTS names::

    FP8TUNE_RESULTS=docs/measurements/mixed-recipes.md \\
        python -m pytest tests/benchmarks/test_mixed_recipes.py -m gpu
"""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fp8tune import AutoFloat8, StaticFilter, TuneConfig
from fp8tune.store.environment import describe_environment

NAMES = ["rowwise", "tensorwise", "rowwise_with_gw_hp"]
# (name, rows, width, hidden, width of keys and values): blocks of Llama3 and smaller.
WORKLOADS = [
    ("Llama3-8B, 8192 tokens", 8192, 4096, 14336, 1024),
    ("Llama3-8B, 1024 tokens", 1024, 4096, 14336, 1024),
    ("Llama3-70B, TP=8", 8192, 8192, 3584, 128),
    ("width 2048", 8192, 2048, 8192, 512),
]
ROUNDS = 30
UNCOUNTED = 5


class Block(nn.Module):
    """The Linears of a Llama block with what Inductor fuses around them."""

    def __init__(self, dim: int, hidden: int, kv: int) -> None:
        super().__init__()
        self.norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.wq, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.wk, self.wv = (nn.Linear(dim, kv, bias=False) for _ in range(2))
        self.w1, self.w3 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        mixed = self.wk(y).sigmoid().mean(-1, keepdim=True) * self.wv(y).mean()
        x = x + self.wo(self.wq(y) * mixed)
        y = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


def step_ms(module: nn.Module, x: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    module(x).square().mean().backward()
    end.record()
    end.synchronize()
    module.zero_grad()
    return start.elapsed_time(end)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda x: x[0])
def test_mixed_plan_against_single_recipes(workload: tuple[str, int, int, int, int]):
    name, rows, dim, hidden, kv = workload
    with torch.device("cuda"):
        bare = Block(dim, hidden, kv).bfloat16()
        x = torch.randn(rows, dim, dtype=torch.bfloat16, requires_grad=True)
    config = TuneConfig(
        static_filter=StaticFilter.DIVISIBLE, include_output_layer=True, trial_steps=0
    )
    models: dict[str, nn.Module] = {}
    plans: dict[str, str] = {}
    for recipe in (*NAMES, NAMES):
        auto = AutoFloat8(deepcopy(bare), recipe, compile=True, config=config)
        plan = auto.trial(lambda auto=auto: step_ms(auto, x))
        models[plan.recipe], plans[plan.recipe] = auto, str(plan)
    bare.compile()
    models["bfloat16"] = bare
    rounds = [{k: step_ms(v, x) for k, v in models.items()} for _ in range(ROUNDS)]
    times = {k: median(r[k] for r in rounds[UNCOUNTED:]) for k in models}
    _write(name, times, plans)
    mixed = ", ".join(NAMES)
    # The best single recipe is one of the choices; 2% is noise.
    assert times[mixed] <= 1.02 * min(times.values())


def _write(name: str, times: dict[str, float], plans: dict[str, str]) -> None:
    path = os.environ.get("FP8TUNE_RESULTS")
    if not path:
        return
    reference = times["bfloat16"]
    environment = ", ".join(
        f"{k} {v}" for k, v in describe_environment(torch.device("cuda"))
    )
    lines = [f"## {name}", "", environment, "", "| plan | step ms | speedup |"]
    lines += ["|---|---|---|"]
    lines += [f"| {k} | {v:.3f} | {reference / v:.3f} |" for k, v in times.items()]
    for recipe, text in plans.items():
        lines += ["", f"Recipe {recipe}:", "", "```text", text, "```"]
    with Path(path).open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n\n")
