"""accelerate converts the plan's layers and no others, with and without FSDP2."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    AORecipeKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear

from fp8tune import AutoFloat8, Plan, TuneConfig
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Decision, Verdict
from fp8tune.integrations.accelerate import ao_recipe_kwargs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAMES = ("first", "middle", "other", "last")


class Model(nn.Module):
    """Four Linears in a row."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Linear(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in NAMES:
            x = getattr(self, name)(x).relu()
        return x


def plan_of(*float8: str) -> Plan:
    decisions = [
        Decision(x, 32, 32, Verdict.CONVERTED, Reason.FASTER, recipe="rowwise")
        if x in float8
        else Decision(x, 32, 32, Verdict.REFERENCE, Reason.SLOWER)
        for x in NAMES
    ]
    return Plan(tuple(decisions), "rowwise", "bfloat16", True, "eager", ())


PLANS = [("first", "last"), ("middle",), ("first", "middle"), NAMES, ()]


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def converted(model: nn.Module) -> list[str]:
    return [x for x, y in model.named_modules() if isinstance(y, Float8Linear)]


def train(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    for _ in range(2):
        accelerator.backward(model(torch.ones(16, 32)).sum())
        optimizer.step()
    return accelerator.unwrap_model(model)


@pytest.mark.parametrize("float8", PLANS, ids=str)
def test_the_layers_converted_are_the_plans(float8: tuple[str, ...]) -> None:
    recipe = ao_recipe_kwargs(plan_of(*float8))
    accelerator = Accelerator(mixed_precision="fp8", cpu=True, kwargs_handlers=[recipe])
    assert converted(train(accelerator, Model())) == list(float8)


def test_without_a_plan_accelerate_leaves_out_the_first_and_the_last() -> None:
    """What would convert layers by accident, were the filter not taken."""
    config = Float8LinearConfig(emulate=True)
    recipe = AORecipeKwargs(config=config)
    accelerator = Accelerator(mixed_precision="fp8", cpu=True, kwargs_handlers=[recipe])
    assert converted(train(accelerator, Model())) == ["middle", "other"]


def test_the_config_is_the_recipes_or_the_users() -> None:
    config = ao_recipe_kwargs(plan_of("first")).config
    assert config.pad_inner_dim
    assert not config.enable_fsdp_float8_all_gather
    assert config.cast_config_input.scaling_granularity.value == "axiswise"
    own = Float8LinearConfig(enable_fsdp_float8_all_gather=True)
    assert ao_recipe_kwargs(plan_of("first"), own).config is own


def _sharding_accelerator(precision: str, *handlers: AORecipeKwargs) -> Accelerator:
    # accelerate looks here for what the launcher would have set.
    rank = str(torch.distributed.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="NO_WRAP"
    )
    accelerator = Accelerator(
        mixed_precision=precision, cpu=True, kwargs_handlers=list(handlers)
    )
    # accelerate shards on accelerators only, and takes a CPU for one if told so.
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


def _shard_and_train(float8: tuple[str, ...]) -> tuple[list[str], bool, bool]:
    accelerator = _sharding_accelerator("fp8", ao_recipe_kwargs(plan_of(*float8)))
    model = train(accelerator, Model())
    sharded = isinstance(model.first.weight, DTensor)
    return converted(model), isinstance(model, FSDPModule), sharded


def _tune_and_shard(clock: object) -> tuple[list[str], list[str], bool]:
    model = Model()
    auto = AutoFloat8(
        model,
        "rowwise",
        warmup_steps=1,
        filter_fqns=["other"],
        config=TuneConfig(static_filter="divisible"),
        clock=clock,
    )
    train(_sharding_accelerator("no"), auto)
    sharded = isinstance(model.first.weight, DTensor)
    return converted(model), auto.plan.converted_fqns, sharded


def reference_loses(signature: object, variant: str) -> float:
    return 1.0 if variant == "reference" else 0.5


@pytest.mark.dist
@pytest.mark.parametrize("float8", [("first", "last"), ("middle",)], ids=str)
def test_the_layers_converted_under_fsdp2_are_the_plans(
    float8: tuple[str, ...], ranks: Callable[..., dict[int, object]]
) -> None:
    answers = ranks(2, _shard_and_train, float8)
    assert answers == dict.fromkeys((0, 1), (list(float8), True, True))


@pytest.mark.dist
def test_tuning_around_the_model_that_fsdp2_shards(
    scripted_clock: type, ranks: Callable[..., dict[int, object]]
) -> None:
    answers = ranks(2, _tune_and_shard, scripted_clock(reference_loses))
    expected = ["first", "middle", "last"]
    assert answers == dict.fromkeys((0, 1), (expected, expected, True))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_tuning_around_the_model_before_prepare(
    scripted_clock: type, precision: str
) -> None:
    clock = scripted_clock(reference_loses)
    config = TuneConfig(static_filter="divisible")
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    model = Model()
    auto = AutoFloat8(
        model,
        "rowwise",
        warmup_steps=1,
        filter_fqns=["other"],
        config=config,
        clock=clock,
    )
    assert train(accelerator, auto) is auto
    assert converted(model) == auto.plan.converted_fqns == ["first", "middle", "last"]
    assert list(accelerator.get_state_dict(auto)) == list(Model().state_dict())
    ((signature, _),) = auto.plan["middle"].signatures
    assert (signature.shape.autocast_dtype == "bfloat16") == (precision == "bf16")
