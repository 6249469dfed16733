"""What tests of several rooms need; imported, not copied. Fixtures are in conftest.py."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from fp8tune.decision.records import REFERENCE, Shape, Signature
from fp8tune.timing.cpu_clock import CpuClock
from fp8tune.trial.results import record_of
from fp8tune.trial.search import Role, Search, TrialPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from fp8tune.decision.trials import TrialRecord
    from fp8tune.timing.clock import Work

TORCH_2_11 = torch.__version__.startswith("2.11.")
TORCHAO_0_17 = importlib.metadata.version("torchao").startswith("0.17.")
needs_mxfp8 = pytest.mark.skipif(
    TORCHAO_0_17, reason="MXFP8Linear came with torchao 0.18"
)


class Block(nn.Module):
    """Two Linears of a residual block, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def two_blocks(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Two of them before a Linear, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(32, 16)).to(dtype)


class TwiceAsFast(CpuClock):
    """Layers are scripted to gain, and run once, for their accuracy."""

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        return [1.0 if x.variant == "reference" else 0.5 for x in work]


def sharded(model: nn.Module, layout: str = "fsdp", **kwargs: Any) -> nn.Module:
    """Two blocks under FSDP2, around tensor parallelism ("tp"), or hybrid ("hsdp")."""
    size = dist.get_world_size()
    if layout == "tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        for block in list(model)[:2]:
            styles = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tp"], styles)
        mesh = mesh["dp"]
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("rep", "dp"))
    else:
        mesh = init_device_mesh("cpu", (size,))
    for child in list(model)[:2]:
        fully_shard(child, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def signature(m: int, k: int, n: int) -> Signature:
    """bfloat16 without bias; backward computes both gradients."""
    shape = Shape(m, k, n, "bfloat16", "bfloat16", None, bias=False)
    return Signature(shape, grad_input=True, grad_weight=True, grad_bias=False)


def all_faster(signature: Signature, variant: str) -> float:
    """Milliseconds of a scripted clock: twice as fast."""
    del signature
    return 1.0 if variant == REFERENCE else 0.5


def all_slower(signature: Signature, variant: str) -> float:
    """Milliseconds of a scripted clock: half as fast."""
    del signature
    return 0.5 if variant == REFERENCE else 1.0


def widening(signature: Signature, variant: str) -> float:
    """Milliseconds of a scripted clock: layers with N > K gain, the others lose."""
    faster = signature.shape.n > signature.shape.k
    return 1.0 if variant == REFERENCE else (0.5 if faster else 2.0)


@functools.cache
def tried(roles: tuple[Role, ...], saved: tuple[float, ...]) -> TrialRecord:
    """The record of a trial in steps of 100 ms of which each role saves so much."""
    search = Search(roles, TrialPlan(x for x in roles if x.gain_ms > 0))
    each = dict(zip(roles, saved, strict=True))
    while not search.finished:
        # One in a thousand up and down, and compiling.
        wobble = 1 + 0.001 * (search.steps % 5 - 2)
        search.record(
            {
                plan: wobble * (100 - sum(each[x] for x in plan))
                + (0 if search.seen.is_compiled(search.mask(plan)) else 4e4)
                for plan in search.order()
            }
        )
    return record_of(search, search.best, {})


def has_fast_bf16() -> bool:
    """Whether bfloat16 GEMMs of this CPU have a crossover with float32 ones."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def graph_texts(run: Callable[[Callable[..., object]], object]) -> list[str]:
    """What Dynamo hands to the compiler.

    Args:
        run: gets a backend for torch.compile, compiles with it and runs.
    """
    texts: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        del inputs
        texts.append(graph.print_readable(print_output=False))
        return graph.forward

    torch._dynamo.reset()
    run(backend)
    return texts


def hooks_of(module: nn.Module) -> dict[str, object]:
    """Every hook that is set anywhere in the model, by its place."""
    return {
        f"{fqn}.{name}": hooks
        for fqn, child in module.named_modules()
        for name, hooks in vars(child).items()
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
        and hooks
    }


def load_example(name: str) -> ModuleType:
    """A module of examples/, which is no package."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
