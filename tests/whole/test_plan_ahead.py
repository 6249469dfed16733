"""A plan that one process makes before training is that of the ranks which train later."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from fp8tune import (
    AlreadyCompiledError,
    AutoFloat8,
    ConfigError,
    ModelError,
    Plan,
    Reason,
    TuneConfig,
    plan_ahead,
)
from fp8tune.recipes import BFloat16Linear
from fp8tune.store.runs import load_runs
from fp8tune.tuner.ahead import layers_ahead
from tests.conftest import ScriptedClock
from tests.helpers import all_faster, widening

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh

    from fp8tune.decision.records import Signature
    from tests.conftest import Ranks

BATCH = (4, 8)  # token ids


class Block(nn.Module):
    """With a bias and without."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 128)
        self.down = nn.Linear(128, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Token ids -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(32, 48)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def tp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    styles = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
    return parallelize_module(model, mesh["tp"], styles)


def fsdp(model: nn.Module, mesh: DeviceMesh) -> None:
    for block in model.blocks:  # pyright: ignore[reportGeneralTypeIssues]
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])


# How a model is split, over which mesh, and how the run is compiled.
LAYOUTS: dict[str, tuple[Any, Any, Any]] = {
    "TP": (tp, {"tp": 2}, {"backend": "eager"}),
    "FSDP2": (fsdp, {"dp": 2}, True),
    "DDP": (None, 2, False),
}


def _never(signature: Signature, variant: str) -> float:
    raise AssertionError(f"{variant} of {signature} was timed")


def _job(folder: str) -> list[tuple[bool, str, dict[str, Any]]]:
    """On one of two gloo ranks: for each layout what the constructor leaves, and a step."""
    found = []
    for name, (parallelize, sizes, compile) in LAYOUTS.items():
        model = Model()
        if parallelize:
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=tuple(sizes))
            model = parallelize(model, mesh) or model
        auto = AutoFloat8(
            model,
            recipe="bf16",
            compile=compile,
            cache=f"{folder}/{name}.json",
            clock=ScriptedClock(_never),
        )
        at_once = auto.frozen
        trained = auto if parallelize else DistributedDataParallel(auto)
        trained(torch.zeros(BATCH, dtype=torch.long)).sum().backward()
        auto.freeze()
        found.append((at_once, str(auto.phase), auto.plan.to_dict()))
    return found


@pytest.mark.dist
@pytest.mark.usefixtures("one_thread")
def test_two_ranks_are_frozen_at_once_with_the_plan_of_one_process(
    ranks: Ranks, tmp_path: Path
) -> None:
    ahead = [
        plan_ahead(
            Model,
            BATCH,
            recipe="bf16",
            parallelize=parallelize,
            world=sizes,
            compile=compile,
            cache=tmp_path / f"{name}.json",
            clock=ScriptedClock(widening),
        )
        for name, (parallelize, sizes, compile) in LAYOUTS.items()
    ]
    answers = ranks(2, _job, str(tmp_path))
    for answer in answers.values():
        assert answer == [(True, "frozen", x.to_dict()) for x in ahead]
    of_tp, of_fsdp, _ = ahead
    assert of_tp["blocks.0.up"].signatures[0][0].shape.n == 64
    assert of_fsdp["blocks.0.up"].signatures[0][0].shape.n == 128
    assert of_tp.converted_fqns == ["blocks.0.up", "blocks.1.up"]


def plan(**options: Any) -> Plan:
    options = {"recipe": "bf16", "clock": ScriptedClock(all_faster)} | options
    return plan_ahead(Model, BATCH, **options)


def test_a_trial_is_made_where_it_is_asked_for(
    tmp_path: Path, silent_clock: ScriptedClock
) -> None:
    path = tmp_path / "cache.json"
    plan(cache=path)
    auto = AutoFloat8(
        Model(),
        recipe="bf16",
        compile={"backend": "eager"},
        warmup_steps=1,
        cache=path,
        clock=silent_clock,
        config=TuneConfig(trial_steps=50),
    )
    assert not auto.frozen


def test_the_cache_shows_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    made = plan(cache=path)
    (run,) = load_runs(path, TuneConfig())
    assert run.decisions == made.decisions
    assert len(made.converted_fqns) == 4
    assert run.trial is None


def test_a_second_plan_ahead_times_nothing(
    tmp_path: Path, silent_clock: ScriptedClock
) -> None:
    path = tmp_path / "cache.json"
    made = plan(cache=path)
    assert plan(cache=path, clock=silent_clock) == made


def test_other_rows_are_timed_anew(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    plan(cache=path)
    clock = ScriptedClock(all_faster)
    plan_ahead(Model, (4, 64), recipe="bf16", cache=path, clock=clock)
    assert {x.shape.m for x, _ in clock.timed} == {256}


def test_real_timings_and_what_they_cannot_know(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    config = TuneConfig(max_seconds=0.01, max_samples=8)
    made = plan(clock=None, compile=False, config=config)
    assert made["blocks.0.up"].samples == 8
    assert made["blocks.0.up"].sqnr_db is not None
    assert "on random numbers" in caplog.text
    assert "each SQNR is synthetic; real activations" in caplog.text


def test_the_plan_applies_to_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = Model()
    plan().apply(model)
    assert type(model.blocks[0].up) is BFloat16Linear


def test_filtered_layers_stay(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    made = plan(cache=path, filter_fqns=["down"], compile=False)
    assert made.converted_fqns == ["blocks.0.up", "blocks.1.up"]
    auto = AutoFloat8(Model(), recipe="bf16", cache=path, filter_fqns=["down"])
    assert auto.plan == made


def test_autocast_is_that_of_the_caller() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = plan()
    assert made["blocks.0.up"].signatures[0][0].shape.autocast_dtype == "bfloat16"


def test_a_model_without_embedding_takes_activations() -> None:
    made = plan_ahead(
        lambda: nn.Linear(32, 64).bfloat16(),
        {"input": (16, 32)},
        recipe="tensorwise",
        config=TuneConfig(static_filter="divisible"),
        clock=ScriptedClock(all_faster),
    )
    shape = made[""].signatures[0][0].shape
    assert (shape.m, shape.input_dtype) == (16, "bfloat16")


def test_no_candidate_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert plan(filter_fqns=["blocks"]).converted_fqns == []
    assert "is a candidate" in caplog.text


class LooksAtValues(Model):
    """Stops early where tokens say so."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * (1 if ids.sum() > 3 else 2)


def moved() -> nn.Module:
    return Model().to("cpu")


def ddp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model, device_mesh=mesh)


def compiled(model: nn.Module, mesh: DeviceMesh) -> Any:
    del mesh
    return torch.compile(model)


@pytest.mark.parametrize(
    ("build", "batch", "options", "error", "expected"),
    [
        (Model, BATCH, {"world": {"tp": 2}}, ConfigError, r"'tp'.*give parallelize"),
        (Model, BATCH, {"world": 0}, ConfigError, r"world is 0; it must be"),
        (Model, "2x8", {}, ConfigError, r"batch is '2x8'; it must be"),
        (Model, [], {}, ConfigError, r"batch is \[\]; it must be"),
        (Model, {"idx": BATCH}, {}, ModelError, r"idx.*check the batch"),
        (Model, torch.zeros(2, 8), {}, ModelError, r"check the batch"),
        (LooksAtValues, BATCH, {}, ModelError, r"let AutoFloat8 tune in the training"),
        (moved, BATCH, {}, ModelError, r"not load or move it"),
        (Model(), BATCH, {}, ModelError, r"cannot be built"),
        ("Model", BATCH, {}, ConfigError, r"build is 'Model'; it must be"),
        (nn.ReLU, BATCH, {}, ModelError, r"holds no nn.Linear"),
        (
            Model,
            BATCH,
            {"parallelize": tp, "world": {"dp": 2}},
            ModelError,
            r"over the mesh of \('dp',\).*'tp'.*give world the dimensions",
        ),
        (
            Model,
            BATCH,
            {"parallelize": ddp, "world": 2},
            ModelError,
            r"leave out of it.*DistributedDataParallel",
        ),
        (
            Model,
            BATCH,
            {"parallelize": compiled, "world": 2},
            AlreadyCompiledError,
            r"is compiled already",
        ),
        (
            Model,
            BATCH,
            {"parallelize": lambda *_: 3, "world": 2},
            ModelError,
            r"module is 3; it must be",
        ),
        (Model, BATCH, {"device": "mars"}, ConfigError, r"device is 'mars'"),
        (Model, BATCH, {"device": "meta"}, ConfigError, r"device is 'meta'"),
    ],
)
def test_what_cannot_be_planned_is_said_with_the_way_out(
    build: Any, batch: Any, options: Any, error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected) as caught:
        plan_ahead(build, batch, recipe="bf16", **options)
    assert "\n" not in str(caught.value)


class Ordered(Model):
    """Calls its blocks by a list of its own, and holds what has no copies."""

    def __init__(self) -> None:
        super().__init__()
        self.order = list(self.blocks)
        self.lock = threading.Lock()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.order:
            x = block(x)
        return self.out(x)


def test_what_has_no_copies_is_no_reason_to_run_sharded_parts_for_real() -> None:
    options: Any = {"recipe": "bf16", "parallelize": fsdp, "world": {"dp": 2}}
    layers = {x.fqn: x for x in layers_ahead(Ordered, BATCH, **options)}
    assert layers["blocks.1.down"].calls[0][0].shape.m == 32


def test_calls_are_known_without_timing() -> None:
    layers = {x.fqn: x for x in layers_ahead(Model, BATCH, recipe="bf16")}
    assert layers["blocks.1.down"].calls[0][0].shape.m == 32
    assert layers["out"].reason is Reason.OUTPUT_LAYER


def test_ranks_are_sent_to_a_process_of_its_own(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        with pytest.raises(ConfigError, match="before init_process_group"):
            plan()
    finally:
        torch.distributed.destroy_process_group()
