"""Float8 all-gather toggled in place equals torchao's own route, bit by bit."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
)
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from fp8tune.recipes.all_gather import (
    missing_places,
    precompute_scales,
    sharded_weights,
)
from fp8tune.recipes.registry import resolve_recipes
from tests.helpers import sharded, two_blocks

if TYPE_CHECKING:
    from tests.conftest import Ranks

pytestmark = pytest.mark.dist

CONFIG = Float8LinearConfig(emulate=True, pad_inner_dim=True)


class Training:
    """A model in training, and all that it ends with."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
        self.generator = torch.Generator().manual_seed(7)
        self.losses: list[float] = []
        self.clips = len({x.device_mesh for x in model.parameters()}) == 1

    def run(self, steps: int, micro_batches: int = 2) -> None:
        for _ in range(steps):
            for _ in range(micro_batches):
                x = torch.randn(8, 32, generator=self.generator)
                dtype = next(self.model.parameters()).dtype
                loss = self.model(x.to(dtype)).float().square().mean()
                loss.backward()
                self.losses.append(loss.item())
            if self.clips:  # which takes parameters of one mesh
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            modules = self.model.modules()
            precompute_scales(x for x in modules if isinstance(x, nn.Linear))

    def all(self) -> dict[str, Any]:
        states = [self.optimizer.state[x] for x in self.model.parameters()]
        return {
            "losses": self.losses,
            "weights": [x.full_tensor() for x in self.model.parameters()],
            "exp_avg": [x["exp_avg"].full_tensor() for x in states],
        }


def same(one: dict[str, Any], other: dict[str, Any]) -> dict[str, bool]:
    return {
        name: all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b))
            for a, b in zip(one[name], other[name], strict=True)
        )
        for name in one
    }


def filter_of(names: tuple[str, ...]) -> Any:
    return lambda _, fqn: fqn.endswith(names)


def of_torchao(
    names: tuple[str, ...],
    layout: str,
    dtype: torch.dtype = torch.bfloat16,
    **kwargs: Any,
) -> nn.Module:
    config = dataclasses.replace(CONFIG, enable_fsdp_float8_all_gather=True)
    converted = convert_to_float8_training(
        two_blocks(dtype), config=config, module_filter_fn=filter_of(names)
    )
    return sharded(converted, layout, **kwargs)


def toggle(model: nn.Module, names: tuple[str, ...], *, on: bool) -> None:
    """Convert and gather these in float8, or nothing any more."""
    recipe = next(iter(resolve_recipes(CONFIG, torch.device("cpu"))))
    weights = sharded_weights(model)
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Linear) and fqn.endswith(names):
            if on:
                recipe.convert(module)
                assert weights[id(module)].why_not() is None
                weights[id(module)].turn_on()
            else:
                weights[id(module)].turn_off()
                recipe.revert(module)


def compare(
    layout: str,
    names: tuple[str, ...],
    dtype: torch.dtype = torch.bfloat16,
    **kwargs: Any,
) -> dict[str, bool]:
    theirs = Training(of_torchao(names, layout, dtype, **kwargs))
    theirs.run(3)
    ours = Training(sharded(two_blocks(dtype), layout, **kwargs))
    toggle(ours.model, names, on=True)
    ours.run(3)
    return same(theirs.all(), ours.all())


ALL = ("up", "down", "2")


def in_layouts(
    cases: tuple[tuple[str, tuple[str, ...]], ...],
) -> dict[Any, dict[str, bool]]:
    return {case: compare(*case) for case in cases}


def every_way() -> object:
    """FSDP2 on two ranks, in all the ways that a training loop may have it."""
    found: dict[str, object] = {
        "missing": missing_places(sharded(two_blocks(), "fsdp"))
    }
    found["plain"] = in_layouts((("fsdp", ALL), ("fsdp", ("up",))))
    keeps = compare("fsdp", ALL, reshard_after_forward=False)
    found["keeps gathered"] = keeps
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32
    )
    found["mixed precision"] = compare("fsdp", ALL, torch.float32, mp_policy=policy)
    found["off and on"] = off_and_on()
    found["refused"] = refused()
    return found


def off_and_on(layout: str = "fsdp", rounds: int = 4) -> dict[str, bool]:
    """On/off/on/off in mid-run against models that begin anew from the same state."""
    model = sharded(two_blocks(), layout)
    ids = [id(x) for x in model.parameters()]
    switched = Training(model)
    result: dict[str, bool] = {"parameters": True}
    for round_, on in enumerate((True, False, True, False)[:rounds]):
        if on:
            toggle(model, ALL, on=True)
        fresh = fresh_from(switched, layout, on=on)
        switched.losses.clear()
        switched.run(2)
        fresh.run(2)
        for name, equal in same(switched.all(), fresh.all()).items():
            result[f"{name} {round_}"] = equal
        if on:
            toggle(model, ALL, on=False)
    result["parameters"] = ids == [id(x) for x in model.parameters()]
    return result


def fresh_from(other: Training, layout: str, *, on: bool) -> Training:
    model = of_torchao(ALL, layout) if on else sharded(two_blocks(), layout)
    with torch.no_grad():
        for mine, theirs in zip(
            model.parameters(), other.model.parameters(), strict=True
        ):
            mine.copy_(theirs)
    fresh = Training(model)
    fresh.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
    fresh.generator.set_state(other.generator.get_state())
    return fresh


def refused() -> dict[str, str | None]:
    reasons: dict[str, str | None] = {}
    offloaded = sharded(
        two_blocks(), "fsdp", offload_policy=CPUOffloadPolicy(pin_memory=False)
    )
    uneven = fully_shard(nn.Sequential(nn.Linear(16, 17)))
    lone = fully_shard(nn.Sequential(nn.Linear(16, 16, bias=False)))
    tied = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    tied[1].weight = tied[0].weight
    for name, model in (
        ("offloaded", offloaded),
        ("uneven", uneven),
        ("tied", fully_shard(tied)),
        ("lone", lone),
        ("fits", sharded(two_blocks(), "fsdp")),
    ):
        weights = sharded_weights(model).values()
        reasons[name] = next((why for x in weights if (why := x.why_not())), None)
    return reasons


def test_two_ranks_under_fsdp2_equal_torchaos_route(ranks: Ranks) -> None:
    answers = ranks(2, every_way)
    for answer in answers.values():
        assert isinstance(answer, dict), answer
        # A place that torch moved is named here.
        assert answer["missing"] == []
        for layout in answer["plain"].values():
            assert all(layout.values()), answer["plain"]
        assert all(answer["keeps gathered"].values()), answer["keeps gathered"]
        assert all(answer["mixed precision"].values()), answer["mixed precision"]
        assert all(answer["off and on"].values()), answer["off and on"]
        assert answer["refused"] == {
            "offloaded": "it is offloaded to the CPU, where the cast would run",
            "uneven": "its 17 rows make uneven shards on 2 ranks, which torchao casts to "
            "unlike sizes; make out_features a multiple of 2",
            "tied": "several layers share it",
            "lone": "gloo gathers float8 only together with another dtype",
            "fits": None,
        }


def in_layouts_and_mid_run(cases: tuple[tuple[str, tuple[str, ...]], ...]) -> object:
    found: dict[object, object] = dict(in_layouts(cases))
    return found | {f"{x} in mid-run": off_and_on(x, 2) for x in ("tp", "hsdp")}


def test_four_ranks_with_tensor_parallelism_and_hsdp(ranks: Ranks) -> None:
    some = ("up",)
    cases = (("fsdp", some), ("tp", ALL), ("tp", some), ("hsdp", ALL))
    for answer in ranks(4, in_layouts_and_mid_run, cases).values():
        assert isinstance(answer, dict), answer
        assert len(answer) == 6
        for layout, equal in answer.items():
            assert all(equal.values()), (layout, equal)
