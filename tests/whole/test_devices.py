"""Tuning is where the tensors are: models that move, that are split, or offloaded at rest.

This machine has one device that computes. So a model is wrapped while ``running_device``
answers for a simulated GPU, and what then runs, on the CPU, is the model that has moved.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, Reason, register_recipe
from fp8tune.decision.records import Shape, Signature
from fp8tune.model import screen, sharding
from fp8tune.model.candidates import Sample
from fp8tune.recipes.bf16 import BFloat16Linear, BFloat16Recipe
from fp8tune.timing.clocks import clock_for_steps
from fp8tune.timing.operands import Operands
from fp8tune.tuner import checks, moving, pipeline
from tests.helpers import all_faster, hooks_of
from tests.simulated_gpu import SimulatedGpu

if TYPE_CHECKING:
    from collections.abc import Callable

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class Placed(BFloat16Recipe):
    """Emulated on CPUs, as float8 is."""

    name = "placed"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.emulated = device.type == "cpu"


class Place:
    """Where the weights are said to be; None is where they are."""

    def __init__(self) -> None:
        self.device: torch.device | None = None

    def __call__(self, linear: nn.Linear) -> torch.device:
        return self.device or sharding.running_device(linear)


@pytest.fixture
def at_rest(
    monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu, own_registry: None
) -> Place:
    place = Place()
    for module in (checks, moving, pipeline, screen):
        monkeypatch.setattr(module, "running_device", place)
    register_recipe("placed", Placed)
    return place


@pytest.fixture
def tune(scripted_clock: type) -> Callable[..., AutoFloat8]:
    def tune(**options: Any) -> AutoFloat8:
        clock = scripted_clock(all_faster)
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        return AutoFloat8(model, "placed", clock=clock, **options)

    return tune


def step(auto: AutoFloat8) -> None:
    auto(torch.randn(8, 32)).square().mean().backward()
    auto.zero_grad()


def devices_of(auto: AutoFloat8) -> set[torch.device]:
    return {recipe.device for _, recipe in auto.tuner.conversions}


@pytest.mark.parametrize("warmup_steps", [0, 1, 3])
def test_a_model_that_moved_after_it_was_wrapped_is_tuned_where_it_is(
    at_rest: Place,
    tune: Callable[..., AutoFloat8],
    caplog: pytest.LogCaptureFixture,
    warmup_steps: int,
) -> None:
    at_rest.device = GPU
    auto = tune(warmup_steps=warmup_steps)
    assert devices_of(auto) == ({GPU} if warmup_steps else set())
    at_rest.device = None
    with caplog.at_level(logging.INFO, "fp8tune"):
        for _ in range(warmup_steps + 1):
            step(auto)
    (said,) = [x for x in caplog.records if "it begins anew" in x.getMessage()]
    assert "the layers run on cpu by now, and tuning began on cuda:0" in said.message
    assert said.levelno == logging.INFO
    assert auto.plan.converted_fqns == ["0", "2"]
    assert devices_of(auto) == {CPU}
    assert auto.plan.emulated
    assert dict(auto.plan.environment)["device"] != "Simulated GPU"
    assert {n for x in auto.plan.decisions for _, n in x.signatures} == {
        max(1, warmup_steps)
    }


def test_the_cache_entries_are_those_of_the_device_it_moved_to(
    at_rest: Place, tune: Callable[..., AutoFloat8], tmp_path: Any
) -> None:
    cache = tmp_path / "cache.json"
    first = tune(cache=cache, warmup_steps=1)
    for _ in range(2):
        step(first)
    assert first.frozen
    at_rest.device = GPU
    auto = tune(cache=cache, warmup_steps=1)
    assert auto.phase == "warmup"
    at_rest.device = None
    step(auto)
    assert auto.phase == "replayed"
    step(auto)
    assert auto.phase == "frozen"
    assert devices_of(auto) == {CPU}


def test_layers_that_are_offloaded_at_rest_are_tuned_where_they_are_called(
    at_rest: Place,
    tune: Callable[..., AutoFloat8],
    caplog: pytest.LogCaptureFixture,
) -> None:
    at_rest.device = GPU
    auto = tune(warmup_steps=2)
    for _ in range(5):
        step(auto)
    (said,) = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert "the layers run on cpu by now, and tuning began on cuda:0" in said
    assert auto.plan.converted_fqns == ["0", "2"]
    assert devices_of(auto) == {CPU}


def test_a_model_that_moves_again_and_again_is_given_up(
    at_rest: Place,
    tune: Callable[..., AutoFloat8],
    caplog: pytest.LogCaptureFixture,
) -> None:
    auto = tune(warmup_steps=3)
    for device in (GPU, None, GPU, None):
        at_rest.device = device
        step(auto)
    assert auto.phase == "abandoned"
    last = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING][-1]
    assert "ran on another device again" in last
    assert hooks_of(auto) == {}
    assert [type(x) for x in auto.module] == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_plan_that_was_given_is_not_emulated_where_it_need_not(
    at_rest: Place, tune: Callable[..., AutoFloat8]
) -> None:
    first = tune(warmup_steps=1)
    for _ in range(2):
        step(first)
    auto = tune(plan=first.plan)
    assert devices_of(auto) == {CPU}
    at_rest.device = GPU
    auto.to(torch.float32)
    assert devices_of(auto) == {GPU}
    assert [type(x) for x in auto.module] == [BFloat16Linear, nn.ReLU, BFloat16Linear]
    at_rest.device = None
    auto.to(torch.float32)  # as a model that makes room for another
    assert devices_of(auto) == {GPU}


def test_a_layer_on_another_kind_of_device_is_left_out_with_the_reason(
    scripted_clock: type,
) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, device="meta"))
    auto = AutoFloat8(model, "bf16", clock=scripted_clock(all_faster), warmup_steps=1)
    for _ in range(2):
        model[0](torch.randn(8, 32)).square().mean().backward()
        auto.zero_grad()
    assert auto.plan["0"].reason is Reason.FASTER
    assert auto.plan["1"].reason is Reason.OTHER_DEVICE
    assert type(model[1]) is nn.Linear


def test_gpus_of_two_names_are_two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    places = dict(zip(map(id, model), (GPU, torch.device("cuda", 1), GPU), strict=True))
    monkeypatch.setattr(screen, "running_device", lambda x: places[id(x)])
    names = {0: "Simulated GPU", 1: "another GPU"}
    monkeypatch.setattr(screen, "kind_of_device", lambda x: names[x.index])
    recipes = [Placed(GPU)]
    found = screen.screen(model, recipes, static_filter="divisible")
    assert [getattr(x, "reason", None) for x in found] == [
        None,
        Reason.OTHER_DEVICE,
        None,
    ]


def test_a_step_on_several_devices_lasts_as_long_as_on_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = SimulatedGpu(devices=2)
    gpu.install(monkeypatch)
    devices = [GPU, torch.device("cuda", 1), GPU]
    clock = clock_for_steps(devices)
    for kernel, device in ((1000.0, devices[0]), (3000.0, devices[1])):
        start = clock.mark()
        gpu.work([kernel], device=device)()
        taken = clock.elapsed_ms(start, clock.mark(), None)
        assert taken == pytest.approx(kernel / 1e3, rel=0.05)


def test_what_was_kept_elsewhere_is_timed_where_the_layer_ran() -> None:
    """On the meta device, which stands in for a second one."""
    shape = Shape(8, 16, 32, "float32", "float32", None, False)
    signature = Signature(shape, True, True, False)
    kept = torch.randn(8, 16), torch.randn(8, 32)
    linear, there = nn.Linear(16, 32, bias=False), torch.device("meta")
    operands = Operands(Sample(signature, linear, *kept, device=there))
    output = torch.empty(8, 32, device=there)
    found = operands.input, operands.weight, operands.grad_output(output)
    assert {x.device for x in found} == {there}
    assert operands.input.requires_grad
