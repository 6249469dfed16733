"""Several processes end with one plan; sharded models are tuned on what they compute."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from fp8tune import AutoFloat8, StaticFilter, TuneConfig
from fp8tune.store.codec import encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.pipelining.schedules import PipelineScheduleSingle

    from fp8tune.decision.records import Signature
    from tests.conftest import Ranks, ScriptedClock

pytestmark = pytest.mark.dist

DIVISIBLE = TuneConfig(static_filter=StaticFilter.DIVISIBLE)
CONFIG = replace(
    Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True, emulate=True
)


def scripted(script: Callable[[Signature, str], float]) -> ScriptedClock:
    from tests.conftest import ScriptedClock  # noqa: PLC0415 - in the rank's process

    return ScriptedClock(script)


def up_is_faster(signature: Signature, variant: str) -> float:
    up = signature.shape.n >= signature.shape.k
    return 1.0 if (variant == "reference") == up else 0.5


def one_way(*, faster: bool) -> ScriptedClock:
    reference, candidate = (1.0, 0.5) if faster else (0.5, 1.0)
    return scripted(
        lambda _, variant: reference if variant == "reference" else candidate
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def by_hand(keep: Callable[[str], bool] = lambda _: True) -> nn.Module:
    return convert_to_float8_training(
        stack(), config=CONFIG, module_filter_fn=lambda _, fqn: keep(fqn)
    )


def auto_of(model: nn.Module, **options: object) -> AutoFloat8:
    defaults = {"warmup_steps": 2, "config": DIVISIBLE, "clock": scripted(up_is_faster)}
    return AutoFloat8(model, recipe="rowwise", **(defaults | options))


def train(model: nn.Module, steps: int = 2, *, same_batch: bool = False) -> None:
    """Each rank on its own batch, unless tensor parallelism wants the same."""
    generator = torch.Generator().manual_seed(0 if same_batch else dist.get_rank())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    for _ in range(steps):
        x = torch.randn(4, 8, 32, generator=generator)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [
        (x.full_tensor() if isinstance(x, DTensor) else x).detach()
        for x in model.parameters()
    ]


def types(model: nn.Module) -> dict[str, str]:
    return {
        name.replace("_checkpoint_wrapped_module.", "").removeprefix("module."): (
            type(x).__name__
        )
        for name, x in model.named_modules()
        if isinstance(x, nn.Linear)
    }


def plan_text(auto: AutoFloat8) -> str:
    return json.dumps(encode(auto.plan))


def tensor_parallel(model: nn.Module, size: int = 2) -> nn.Module:
    mesh = init_device_mesh("cpu", (size,))
    layout = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}
    return parallelize_module(model, mesh, layout)


def shard(model: nn.Module) -> nn.Module:
    for block in model:
        fully_shard(block)
    return fully_shard(model)


def shard_linears(model: nn.Module) -> nn.Module:
    for block in model:
        fully_shard(block.up)
        fully_shard(block.down)
    return fully_shard(model)


def checkpointed(model: nn.Module) -> nn.Module:
    for name, block in model.named_children():
        setattr(model, name, checkpoint_wrapper(block))
    return model


def fsdp_then_auto() -> tuple[nn.Module, AutoFloat8]:
    auto = auto_of(shard(stack()))
    return auto, auto


def auto_then_fsdp() -> tuple[nn.Module, AutoFloat8]:
    model = stack()
    auto = auto_of(model)
    for block in model:
        fully_shard(block)
    return fully_shard(auto), auto


def fsdp_of_single_linears() -> tuple[nn.Module, AutoFloat8]:
    auto = auto_of(shard_linears(stack()))
    return auto, auto


def checkpointed_fsdp() -> tuple[nn.Module, AutoFloat8]:
    auto = auto_of(shard(checkpointed(stack())))
    return auto, auto


def tp_then_auto() -> tuple[nn.Module, AutoFloat8]:
    auto = auto_of(tensor_parallel(stack()))
    return auto, auto


def auto_in_ddp() -> tuple[nn.Module, AutoFloat8]:
    auto = auto_of(stack())
    return DistributedDataParallel(auto), auto


def auto_around_ddp() -> tuple[nn.Module, AutoFloat8]:
    auto = auto_of(DistributedDataParallel(stack()))
    return auto, auto


def ddp_of_auto_module() -> tuple[nn.Module, AutoFloat8]:
    outer = DistributedDataParallel(stack(), find_unused_parameters=True)
    return outer, auto_of(outer.module)


def sharded_by_hand(build: Callable[..., object]) -> nn.Module:
    match build.__name__:
        case "tp_then_auto":
            return tensor_parallel(by_hand())
        case "auto_in_ddp" | "auto_around_ddp" | "ddp_of_auto_module":
            return DistributedDataParallel(by_hand())
        case "fsdp_of_single_linears":
            return shard_linears(by_hand())
        case "checkpointed_fsdp":
            return shard(checkpointed(by_hand()))
        case _:
            return shard(by_hand())


def tuned_and_by_hand(build: Callable[[], tuple[nn.Module, AutoFloat8]]) -> object:
    same_batch = build is tp_then_auto
    outer, auto = build()
    train(outer, same_batch=same_batch)
    other = sharded_by_hand(build)
    train(other, same_batch=same_batch)
    pairs = zip(whole(outer), whole(other), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    warm = types(auto.module)
    train(outer, 2, same_batch=same_batch)
    return equal, warm, types(auto.module), plan_text(auto)


@pytest.mark.parametrize(
    "build",
    [
        fsdp_then_auto,
        auto_then_fsdp,
        fsdp_of_single_linears,
        checkpointed_fsdp,
        tp_then_auto,
        auto_in_ddp,
        auto_around_ddp,
        ddp_of_auto_module,
    ],
)
def test_tuned_steps_equal_those_converted_by_hand_before_sharding(
    build: Callable[[], tuple[nn.Module, AutoFloat8]], ranks: Ranks
) -> None:
    answers = ranks(2, tuned_and_by_hand, build)
    assert set(answers) == {0, 1}
    assert answers[0] == answers[1]
    equal, warm, frozen, _ = answers[0]
    prefix = "FSDP" if build is fsdp_of_single_linears else ""
    assert equal is True
    assert set(warm.values()) == {f"{prefix}Float8Linear"}
    # On half of 64 columns, up and down have one signature, hence one verdict.
    down = "Float8Linear" if build is tp_then_auto else f"{prefix}Linear"
    up = f"{prefix}Float8Linear"
    assert frozen == {"0.up": up, "0.down": down, "1.up": up, "1.down": down}


def mesh_of_two_by_two() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def parallel_and_checkpointed(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    layout = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}
    return checkpointed(parallelize_module(model, mesh["tp"], layout))


def shard_over(model: nn.Module, mesh: DeviceMesh) -> None:
    for block in model:
        fully_shard(block, mesh=mesh["dp"])


def tuned_in_the_usual_order() -> object:
    mesh = mesh_of_two_by_two()
    model = parallel_and_checkpointed(stack(), mesh)
    auto = auto_of(model)
    shard_over(model, mesh)
    outer = fully_shard(auto, mesh=mesh["dp"])
    train(outer, same_batch=True)
    other = parallel_and_checkpointed(by_hand(), mesh)
    shard_over(other, mesh)
    train(fully_shard(other, mesh=mesh["dp"]), same_batch=True)
    pairs = zip(whole(outer), whole(other), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    train(outer, same_batch=True)
    return equal, types(auto.module), plan_text(auto)


def test_all_of_it_in_the_usual_order_on_a_mesh_of_two_dimensions(ranks: Ranks) -> None:
    """parallelize_module, checkpoint_wrapper, AutoFloat8, fully_shard."""
    answers = ranks(4, tuned_in_the_usual_order)
    assert set(answers) == {0, 1, 2, 3}
    assert all(answer == answers[0] for answer in answers.values())
    equal, frozen, _ = answers[0]
    assert equal is True
    names = ("0.up", "0.down", "1.up", "1.down")
    assert frozen == dict.fromkeys(names, "Float8Linear")


def compile_blocks(model: nn.Module) -> None:
    for block in model:
        block.compile(backend="eager")


def blocks_compiled_at_the_freeze(shard_or_wrap: Callable[..., nn.Module]) -> object:
    model = stack()
    outer = shard_or_wrap(model)
    auto = auto_of(model, compile=compile_blocks)
    train(outer)
    auto.freeze()
    frozen = [x.clone() for x in whole(outer)]
    train(outer)
    other = by_hand(lambda fqn: fqn.endswith("up"))
    with torch.no_grad():
        for parameter, value in zip(other.parameters(), frozen, strict=True):
            parameter.copy_(value)
    outer_other = shard_or_wrap(other)
    train(outer_other)
    pairs = zip(whole(outer), whole(outer_other), strict=True)
    compiled = torch._dynamo.utils.counters["stats"]["calls_captured"]
    return all(torch.equal(a, b) for a, b in pairs), compiled > 0


@pytest.mark.parametrize("shard_or_wrap", [shard, DistributedDataParallel])
def test_blocks_are_compiled_at_the_freeze_of_a_parallel_model(
    shard_or_wrap: Callable[..., nn.Module], ranks: Ranks
) -> None:
    answers = ranks(2, blocks_compiled_at_the_freeze, shard_or_wrap)
    assert answers == {0: (True, True), 1: (True, True)}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wk = nn.Linear(1024, 512, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wk(x)


def tune_eighth(*, sharded: bool) -> object:
    model = nn.Sequential(Attention())
    if sharded:
        mesh = mesh_of_two_by_two()
        parallelize_module(model, mesh["tp"], {"*.wk": ColwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    else:
        mesh = init_device_mesh("cpu", (4,))
        parallelize_module(model, mesh, {"*.wk": ColwiseParallel()})
    clock = one_way(faster=True)
    auto = auto_of(model, clock=clock, warmup_steps=1)
    for _ in range(2):
        auto(torch.ones(16, 1024)).square().mean().backward()
    return [x.shape.n for x, _ in clock.timed], str(auto.plan)


def test_tensor_parallel_layers_are_timed_at_their_local_shape(ranks: Ranks) -> None:
    for timed, table in ranks(4, tune_eighth_plain).values():
        assert set(timed) == {128}
        assert "128 of 512" in table


def tune_eighth_plain() -> object:
    return tune_eighth(sharded=False)


def tune_eighth_sharded() -> object:
    return tune_eighth(sharded=True)


def test_fsdp_on_top_is_undone_before_timing(ranks: Ranks) -> None:
    for timed, table in ranks(4, tune_eighth_sharded).values():
        assert set(timed) == {256}
        assert "256 of 512" in table


def tp_and_fsdp_with_real_clock() -> object:
    """A collective hidden in the timing would hang, since ranks time unequally often."""
    mesh = mesh_of_two_by_two()
    layout = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}
    model = parallelize_module(stack(), mesh["tp"], layout)
    shard_over(model, mesh)
    fully_shard(model, mesh=mesh["dp"])
    auto = AutoFloat8(model, recipe="bf16", warmup_steps=1)
    for _ in range(3):
        auto(torch.ones(4, 8, 32)).square().mean().backward()
    shapes = {
        (x.shape.k, x.shape.n) for d in auto.plan.decisions for x, _ in d.signatures
    }
    return plan_text(auto), sorted(shapes)


def test_real_timing_of_a_model_with_both_kinds_of_sharding(ranks: Ranks) -> None:
    answers = ranks(4, tp_and_fsdp_with_real_clock)
    assert len(answers) == 4
    assert len({plan for plan, _ in answers.values()}) == 1
    assert answers[0][1] == [(32, 32)]


def disagree(case: str, cache: str | None) -> object:
    rank = dist.get_rank()
    if case == "half faster":
        clock = one_way(faster=rank % 2 == 0)
    elif case == "one slow":
        # The slow rank finds it faster: its times are those of the step.
        factor = 10.0 if rank == 1 else 1.0
        faster = rank == 1
        clock = scripted(
            lambda _, v: factor * (1.0 if (v == "reference") == faster else 0.5)
        )
    elif case == "out of memory":
        clock = one_way(faster=True)
        if rank == 1:
            clock = scripted(out_of_memory)
    else:
        clock = one_way(faster=True)
    if case == "one cache":  # the same relative path is another file on each host
        host = Path(str(cache)).parent / f"host{rank}"
        host.mkdir(exist_ok=True)
        os.chdir(host)
        cache = "cache.json"
    auto = auto_of(stack(), clock=clock, warmup_steps=1, cache=cache)
    model = DistributedDataParallel(auto)
    frozen_at_once = auto.frozen
    train(model, 3)
    return plan_text(auto), auto.plan.converted_fqns, frozen_at_once, bool(clock.timed)


def out_of_memory(signature: Signature, variant: str) -> float:
    if signature.shape.n == 64:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return 1.0 if variant == "reference" else 0.5


@pytest.mark.parametrize(
    ("case", "converted"),
    [
        ("half faster", []),
        ("one slow", ["0.up", "0.down", "1.up", "1.down"]),
        ("out of memory", ["0.down", "1.down"]),
    ],
)
def test_ranks_that_disagree_end_with_one_plan(
    case: str, converted: list[str], ranks: Ranks
) -> None:
    answers = ranks(2, disagree, case, None)
    assert len(answers) == 2
    assert answers[0][:2] == answers[1][:2]
    # Equal totals go to the first rank, so "half faster" is what rank 0 found.
    expected = (
        ["0.up", "0.down", "1.up", "1.down"] if case == "half faster" else converted
    )
    assert answers[0][1] == expected


def log_lines() -> list[str]:
    import logging  # noqa: PLC0415 - in the rank's process

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("fp8tune").addHandler(handler)
    logging.getLogger("fp8tune").setLevel(logging.INFO)
    return lines


def share_of_four() -> object:
    """One rank is slow, and finds what it times of them faster."""
    slow = dist.get_rank() == 2

    def times(signature: Signature, variant: str) -> float:
        faster = slow or signature.shape.n > signature.shape.k
        factor = 10.0 if slow else 1.0
        return factor * (1.0 if (variant == "reference") == faster else 0.5)

    widths = (16, 32, 48, 64, 80)
    pairs = zip(widths, (*widths[1:], 16), strict=True)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairs))
    clock, lines = scripted(times), log_lines()
    auto = auto_of(model, clock=clock, warmup_steps=1)
    for _ in range(2):
        auto(torch.ones(8, 16)).square().mean().backward()
    return plan_text(auto), sorted({x.shape.k for x, _ in clock.timed}), lines


def test_four_ranks_time_each_signature_twice_and_the_slow_one_counts(
    ranks: Ranks,
) -> None:
    answers = ranks(4, share_of_four)
    plans, timed, _ = zip(*answers.values(), strict=True)
    assert any("this rank times 3 of 5 signatures" in x for x in answers[0][2])
    assert len(set(plans)) == 1
    assert all(len(x) == 3 for x in timed)
    assert all(sum(k in x for x in timed) >= 2 for k in (16, 32, 48, 64, 80))
    decisions = json.loads(plans[0])["decisions"]
    slowest = {x["k"] for x in decisions if x["reference_ms"] in (5.0, 10.0)}
    assert slowest == set(answers[2][1])


def test_a_cache_that_only_the_first_rank_sees_is_a_hit_for_all(
    ranks: Ranks, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache.json")
    first = ranks(2, disagree, "one cache", cache)
    second = ranks(2, disagree, "one cache", cache)
    assert [(first[i][2], first[i][3]) for i in (0, 1)] == [(False, True)] * 2
    assert [(second[i][2], second[i][3]) for i in (0, 1)] == [(True, False)] * 2
    assert first[0][0] == second[1][0]
    assert (tmp_path / "host0" / "cache.json").exists()
    assert not (tmp_path / "host1" / "cache.json").exists()


def fail(how: str, cache: str) -> object:
    auto = auto_of(stack(), warmup_steps=1, cache=cache)
    auto(torch.ones(16, 32)).square().mean().backward()
    if dist.get_rank() == 1:
        if how == "killed":
            os._exit(9)
        raise RuntimeError("this rank is lost")
    started = time.monotonic()
    try:
        auto.freeze()
    except RuntimeError as error:
        return type(error).__name__, time.monotonic() - started
    return "frozen", 0.0


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_rank_that_fails_lets_the_others_raise(
    how: str, ranks: Ranks, tmp_path: Path
) -> None:
    cache = tmp_path / "cache.json"
    dying = int(how == "killed")
    answers = ranks(3, fail, how, str(cache), seconds=5, dying=dying)
    for rank in (0, 2):
        outcome, seconds = answers[rank]
        assert outcome != "frozen"
        assert seconds < 20
    assert not cache.exists()


def different_layers(case: str) -> object:
    model = stack()
    if dist.get_rank() == 1:
        if case == "one more":
            model.append(nn.Linear(32, 32))
        else:
            model[1].up = nn.Linear(32, 128, bias=False)
    auto_of(model)
    return "built"


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("one more", "ranks 0 and 1 share layers, but '2' is on one only"),
        ("other width", "1.up.n is 64 on rank 0 and 128 on rank 1"),
    ],
)
def test_a_different_layer_list_is_named_on_every_rank(
    case: str, named: str, ranks: Ranks
) -> None:
    answers = ranks(3, different_layers, case)
    assert len(answers) == 3
    for answer in answers.values():
        assert answer.startswith("RankMismatchError")
        assert named in answer


def different_settings() -> object:
    auto_of(stack(), warmup_steps=2 + dist.get_rank())
    return "built"


def test_different_settings_are_named_on_every_rank(ranks: Ranks) -> None:
    for answer in ranks(2, different_settings).values():
        assert "warmup_steps is '2' on rank 0 and '3' on rank 1" in answer


class Stage(nn.Module):
    """Part of a model under the names of the whole."""

    def __init__(self, first: int) -> None:
        super().__init__()
        blocks = {str(i): Block() for i in range(first, first + 2)}
        self.layers = nn.ModuleDict(blocks)
        self.head = nn.Linear(32, 16 * (1 + first)) if first else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers.values():
            x = block(x)
        return self.head(x)


def pipeline_stage() -> object:
    rank = dist.get_rank()
    clock = one_way(faster=rank == 1)
    if rank == 1:
        clock = scripted(lambda _, v: 10 * (1.0 if v == "reference" else 0.5))
    auto = auto_of(Stage(2 * rank), clock=clock)
    x = torch.ones(16, 32, requires_grad=True)
    for _ in range(2):
        auto(x).square().mean().backward()
    plan = auto.freeze()
    return {d.fqn: str(d.verdict) for d in plan.decisions}


def test_pipeline_stages_agree_on_what_they_share(ranks: Ranks) -> None:
    first, second = (ranks(2, pipeline_stage)[i] for i in (0, 1))
    assert set(first) == {f"layers.{i}.{x}" for i in (0, 1) for x in ("up", "down")}
    assert {"layers.2.up", "layers.3.down", "head"} < set(second)
    # The second stage is the slower, so what it found counts for the shared signatures.
    assert set(first.values()) == {"converted"}
    assert set(second.values()) == {"converted"}


def run_schedule(
    kind: type[PipelineScheduleSingle], auto: AutoFloat8, steps: int
) -> None:
    """Training steps of two stages, each on four microbatches of four rows."""
    rank = dist.get_rank()
    stage = PipelineStage(auto, rank, 2, torch.device("cpu"))
    schedule = kind(stage, 4, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(auto.parameters(), lr=1e-2)
    for _ in range(steps):
        if rank == 0:
            schedule.step(torch.ones(16, 32))
        else:
            schedule.step(target=torch.zeros(16, 48))
        optimizer.step()
        optimizer.zero_grad()


def schedule_frozen_between_steps(kind: type[PipelineScheduleSingle]) -> object:
    auto = auto_of(Stage(2 * dist.get_rank()), warmup_steps=1000)
    run_schedule(kind, auto, steps=2)
    before = auto.frozen
    auto.freeze()
    run_schedule(kind, auto, steps=1)
    plan = auto.plan
    rows = {x.shape.m for d in plan.decisions for x, _ in d.signatures}
    return before, rows, {d.fqn: str(d.verdict) for d in plan.decisions}


@pytest.mark.parametrize("kind", [ScheduleGPipe, Schedule1F1B])
def test_a_pipeline_schedule_frozen_between_steps(
    kind: type[PipelineScheduleSingle], ranks: Ranks
) -> None:
    answers = ranks(2, schedule_frozen_between_steps, kind)
    verdicts: dict[str, str] = {}
    for before, rows, decided in answers.values():
        assert before is False
        assert rows == {4}
        verdicts |= decided
    up = {f"layers.{i}.up": "converted" for i in range(4)}
    down = {f"layers.{i}.down": "reference" for i in range(4)}
    assert verdicts == {**up, **down, "head": "converted"}


def schedule_with_a_group_per_stage(kind: type[PipelineScheduleSingle]) -> object:
    ranks_of_stage, _ = dist.new_subgroups(1)
    auto = auto_of(Stage(2 * dist.get_rank()), process_group=ranks_of_stage)
    run_schedule(kind, auto, steps=4)
    return auto.frozen


@pytest.mark.parametrize("kind", [ScheduleGPipe, Schedule1F1B])
def test_a_pipeline_schedule_whose_stages_freeze_by_themselves(
    kind: type[PipelineScheduleSingle], ranks: Ranks
) -> None:
    assert ranks(2, schedule_with_a_group_per_stage, kind) == {0: True, 1: True}


def schedule_that_waits_for_itself() -> object:
    auto = auto_of(Stage(2 * dist.get_rank()), warmup_steps=1)
    run_schedule(ScheduleGPipe, auto, steps=2)
    return "frozen"


def test_a_freeze_inside_a_pipeline_schedule_times_out(ranks: Ranks) -> None:
    """Without a group per stage: the first waits for the second, and that for it."""
    for answer in ranks(2, schedule_that_waits_for_itself, seconds=5).values():
        assert "Error" in answer


def accumulate(*, unused: bool) -> object:
    auto = auto_of(stack(), warmup_steps=2)
    if unused:
        auto.module.add_module("idle", nn.Identity())
    model = DistributedDataParallel(auto, find_unused_parameters=unused)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(3):
        with model.no_sync():
            model(torch.randn(8, 32)).square().mean().backward()
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return plan_text(auto), [x.tolist() for x in whole(auto)]


def accumulate_used() -> object:
    return accumulate(unused=False)


def accumulate_unused() -> object:
    return accumulate(unused=True)


@pytest.mark.parametrize("run", [accumulate_used, accumulate_unused])
def test_ddp_with_gradient_accumulation(
    run: Callable[[], object], ranks: Ranks
) -> None:
    answers = ranks(2, run)
    assert len(answers) == 2
    assert answers[0] == answers[1]


def save_and_load(folder: str) -> object:
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415 - in the rank's process

    auto = auto_of(shard(stack()), warmup_steps=1)
    train(auto, 3)
    state = auto.state_dict()
    dcp.save(state, checkpoint_id=folder)
    bare = stack()
    loaded = bare.state_dict()
    dcp.load(loaded, checkpoint_id=folder)
    bare.load_state_dict(loaded)
    pairs = zip(whole(auto), whole(bare), strict=True)
    return list(state) == list(loaded), all(torch.equal(a, b) for a, b in pairs)


def test_a_sharded_checkpoint_loads_into_the_bare_model(
    ranks: Ranks, tmp_path: Path
) -> None:
    answers = ranks(2, save_and_load, str(tmp_path / "checkpoint"))
    assert answers == {0: (True, True), 1: (True, True)}


def count_records() -> object:
    lines = log_lines()
    auto = auto_of(stack(), warmup_steps=1)
    train(auto, 2)
    return lines


def test_only_the_first_rank_logs_and_it_tells_the_spread(ranks: Ranks) -> None:
    answers = ranks(2, count_records)
    assert answers[1] == []
    assert any("slowest 0.500 ms on rank" in line for line in answers[0])
    assert any("converted 2 of 4 Linears" in line for line in answers[0])
