"""Copies and pickles of a model with experts, whatever the phase."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fp8tune import AutoFloat8, TuneConfig
from fp8tune.model.linears import named_gemms
from fp8tune.recipes.bf16 import BFloat16Experts
from fp8tune.recipes.mx import MXFP8Experts
from tests.conftest import ScriptedClock
from tests.helpers import all_faster, hooks_of, needs_mxfp8
from tests.whole.test_expert_recipes import Model

PHASES = ["warmup", "replayed", "trial", "frozen"]
RECIPES = ["bf16", pytest.param("mxfp8_rceil", marks=needs_mxfp8)]
every_phase = pytest.mark.parametrize("phase", PHASES)
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
T, K = 24, 64


class Home(nn.Module):
    """Experts below another module, as in any real model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = Model()

    def forward(self, x):
        return self.layer(x)


def step(called):
    called.zero_grad()
    called(rows()).square().mean().backward()


def rows():
    return torch.linspace(-1, 1, T * K).reshape(T, K)


def tuned(phase, recipe, path):
    options = {
        "recipe": recipe,
        "warmup_steps": 1,
        "clock": ScriptedClock(all_faster, lambda _: 1.0),
        "config": TuneConfig(trial_steps=200 if phase == "trial" else 0),
        "cache": path / "cache.json",
    }
    auto = AutoFloat8(Home(), **options)
    for _ in range(0 if phase == "warmup" else 3):
        step(auto)
    if phase == "replayed":
        auto = AutoFloat8(Home(), **options)
    assert auto.phase == phase
    return auto


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))  # noqa: S301 - made here


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, pickled, saved, AveragedModel]
every_copy = pytest.mark.parametrize("make", COPIES, ids=lambda x: x.__name__)


@every_copy
@pytest.mark.parametrize("what", ["wrapper", "model"])
@every_phase
@every_recipe
def test_a_copy_computes_with_its_own_weights(make, what, phase, recipe, tmp_path):
    auto = tuned(phase, recipe, tmp_path)
    twin = make(auto if what == "wrapper" else auto.module)
    before = twin(rows())
    with torch.no_grad():
        for weight in auto.parameters():
            weight.zero_()
    assert torch.equal(twin(rows()), before)
    kept = [None if x.grad is None else x.grad.clone() for x in auto.parameters()]
    step(twin)
    assert all(x.grad is not None for x in twin.parameters())
    now = [x.grad for x in auto.parameters()]
    assert all(a is b or torch.equal(a, b) for a, b in zip(kept, now, strict=True))


@pytest.mark.parametrize("make", COPIES[:3], ids=lambda x: x.__name__)
@pytest.mark.parametrize("phase", PHASES[:3])
@every_recipe
def test_a_copy_of_what_is_being_tuned_is_the_bare_model(make, phase, recipe, tmp_path):
    auto = tuned(phase, recipe, tmp_path)
    twin = make(auto.module)
    assert type(twin.layer) is Model
    assert vars(twin.layer).keys() == vars(Home().layer).keys()
    assert not hooks_of(twin)
    assert torch.equal(twin(rows()), Home()(rows()))
    if phase != "trial":  # where the plan of the moment may convert nothing
        assert type(auto.module.layer) is not Model


@pytest.mark.parametrize("make", COPIES[:3], ids=lambda x: x.__name__)
@every_recipe
def test_a_copy_of_the_frozen_wrapper_has_the_plan(make, recipe, tmp_path):
    auto = tuned("frozen", recipe, tmp_path)
    twin = make(auto)
    assert twin.plan == auto.plan
    assert torch.equal(twin(rows()), auto(rows()))
    kinds = {type(x) for _, x in named_gemms(twin.module)}
    assert kinds > {MXFP8Experts if recipe == "mxfp8_rceil" else BFloat16Experts}
    with twin.reference():
        assert type(twin.module.layer) is Model
        assert type(auto.module.layer) is not Model
        assert torch.equal(twin(rows()), Home()(rows()))
    assert torch.equal(twin(rows()), auto(rows()))


@every_phase
@every_recipe
def test_reference_runs_in_high_precision_in_each_phase(phase, recipe, tmp_path):
    auto = tuned(phase, recipe, tmp_path)
    converted = auto(rows())
    with auto.reference():
        assert torch.equal(auto(rows()), Home()(rows()))
        twin = copy.deepcopy(auto.module)
    assert torch.equal(auto(rows()), converted)
    if phase != "trial":
        assert not torch.equal(converted, Home()(rows()))
    assert torch.equal(twin(rows()), Home()(rows()))


@pytest.mark.parametrize("phase", PHASES[:3])
def test_tuning_goes_on_after_a_copy(phase, tmp_path):
    auto = tuned(phase, "bf16", tmp_path)
    copy.deepcopy(auto)
    pickled(auto.module)
    for _ in range(3):
        step(auto)
    assert auto.phase == ("trial" if phase == "trial" else "frozen")
    if auto.frozen:
        assert auto.plan.converted_fqns == ["layer.up", "layer.down", "layer.first"]


@every_phase
def test_abandoning_takes_all_away_from_the_model_and_its_copy(phase, tmp_path):
    auto = tuned(phase, "bf16", tmp_path)
    twin = copy.deepcopy(auto)
    for x in (auto, twin):
        x.abandon()
        assert type(x.module.layer) is Model
        assert torch.equal(x.module(rows()), Home()(rows()))
