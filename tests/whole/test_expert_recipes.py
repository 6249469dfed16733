"""Recipes that take Linears and experts convert both, by the one path."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fp8tune import AutoFloat8, Plan, Reason, TuneConfig, plan_ahead
from fp8tune.decision.records import REFERENCE
from fp8tune.model.linears import named_gemms
from fp8tune.recipes import get_recipe
from fp8tune.recipes.mx import MXFP8Experts
from tests.conftest import ScriptedClock, WorkingClock
from tests.helpers import all_faster, needs_mxfp8

pytestmark = needs_mxfp8

E, K, N, T = 4, 64, 96, 24
EVERY_SIZE = TuneConfig(static_filter="divisible")


class Model(nn.Module):
    """A Linear, and experts that get its rows in a fixed order."""

    def __init__(self, offs=(3, 3, 20, T)):
        super().__init__()
        self.first = nn.Linear(K, K)
        self.up = nn.Parameter(torch.randn(E, N, K) / 8)
        self.down = nn.Parameter(torch.randn(E, K, N) / 8)
        self.offs = torch.tensor(offs, dtype=torch.int32)

    def forward(self, x):
        x = self.first(x)
        hidden = F.silu(F.grouped_mm(x, self.up.mT, offs=self.offs))
        return F.grouped_mm(hidden, self.down.mT, offs=self.offs)


def model(**arguments):
    torch.manual_seed(0)
    return Model(**arguments).bfloat16()


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, K, generator=generator).bfloat16()


def not_down(signature, variant):
    """Milliseconds: all gain but the experts' N -> K."""
    loses = signature.shape.experts and signature.shape.n < signature.shape.k
    return 1.0 if variant == REFERENCE else (2.0 if loses else 0.5)


def tuned(module, recipe, clock=None, **options):
    auto = AutoFloat8(
        module,
        recipe,
        warmup_steps=1,
        clock=clock or ScriptedClock(not_down),
        config=EVERY_SIZE,
        **options,
    )
    for i in range(2):
        auto(rows(i)).square().mean().backward()
        auto.zero_grad()
    assert auto.frozen
    return auto


def train(called, steps=3):
    """Losses of some steps of SGD, and the gradients of the last."""
    optimizer = torch.optim.SGD(called.parameters(), lr=0.1)
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        loss = called(rows(i)).float().square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, [x.grad for x in called.parameters()]


@pytest.mark.parametrize("name", ["mxfp8_rceil", "mxfp8_floor", "mxfp8_rceil_wgrad_hp"])
def test_linears_and_experts_are_converted_by_one_recipe(name):
    auto = tuned(model(), name, clock=WorkingClock(not_down))
    assert auto.plan.converted_fqns == ["up", "first"]
    assert auto.plan["down"].reason is Reason.SLOWER
    assert all(20 < auto.plan[x].sqnr_db < 35 for x in ("first", "up"))
    by_hand = model()
    recipe, gemms = get_recipe(name, "cpu"), dict(named_gemms(by_hand))
    for fqn in ("first", "up"):
        recipe.convert(gemms[fqn])
    found, expected = train(auto), train(by_hand)
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


ROUTINGS = {
    "unaligned": (3, 10, 11, T),
    "empty experts": (0, 0, T, T),
    "all rows in one expert": (0, 0, 0, T),
    "rows that belong to nobody": (3, 10, 11, T - 5),
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_any_routing_is_timed_with_its_accuracy(routing):
    module = model(offs=ROUTINGS[routing])
    auto = AutoFloat8(
        module,
        "mxfp8_rceil",
        warmup_steps=1,
        clock=WorkingClock(all_faster),
        config=EVERY_SIZE,
    )
    last = ROUTINGS[routing][-1]
    for i in range(2):
        auto(rows(i))[:last].square().mean().backward()
        auto.zero_grad()
    assert auto.plan.converted_fqns == ["up", "down", "first"]
    assert all(20 < auto.plan[x].sqnr_db < 35 for x in ("first", "up", "down"))


def test_each_gemm_gets_the_best_of_several_recipes():
    def milliseconds(signature, variant):
        best = "mxfp8_floor" if signature.shape.experts else "rowwise"
        return 1.0 if variant == REFERENCE else (0.5 if variant == best else 0.8)

    clock = ScriptedClock(milliseconds)
    auto = tuned(model(), ["rowwise", "mxfp8_rceil", "mxfp8_floor"], clock)
    found = {x: auto.plan[x].recipe for x in ("first", "up", "down")}
    assert found == {"first": "rowwise", "up": "mxfp8_floor", "down": "mxfp8_floor"}


def test_rowwise_says_that_a_cpu_has_no_such_gemms():
    auto = tuned(model(), "rowwise")
    assert auto.plan.converted_fqns == ["first"]
    assert auto.plan["up"].reason is Reason.NOT_FOR_EXPERTS
    assert "none on this device" in auto.plan["up"].reason.sentence


def test_what_fills_no_blocks_says_so():
    class Odd(Model):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(E, N + 16, K) / 8)
            self.down = nn.Parameter(torch.randn(E, K, N + 16) / 8)

    auto = tuned(Odd().bfloat16(), "mxfp8_rceil")
    assert auto.plan["up"].reason is Reason.NOT_DIVISIBLE_BY_32


def test_gemms_of_experts_are_not_taken_apart():
    """A Linear that loses as a whole is timed GEMM by GEMM, which experts cannot be."""
    seen = set()

    def milliseconds(signature, variant):
        seen.add((signature.shape.experts, variant))
        return 1.0 if variant == REFERENCE else 1.2

    tuned(model(), ["mxfp8_rceil", "rowwise"], ScriptedClock(milliseconds))
    assert (E, "mxfp8_rceil") in seen
    assert not any(":" in variant for experts, variant in seen if experts)
    assert any(":" in variant for experts, variant in seen if not experts)


def test_a_plan_is_saved_applied_and_taken_back(tmp_path):
    auto = tuned(model(), "mxfp8_rceil")
    auto.plan.save(tmp_path / "plan.json")
    other, plan = model(), Plan.load(tmp_path / "plan.json")
    plan.apply(other)
    assert torch.equal(other(rows()), auto(rows()))
    assert type(dict(named_gemms(other))["up"]) is MXFP8Experts
    assert torch.equal(copy.deepcopy(other)(rows()), auto(rows()))
    plan.revert(other)
    assert torch.equal(other(rows()), model()(rows()))
    assert type(other) is Model


def test_inside_of_reference_all_run_in_high_precision():
    auto = tuned(model(), "mxfp8_rceil")
    with auto.reference():
        assert torch.equal(auto(rows()), model()(rows()))
    assert not torch.equal(auto(rows()), model()(rows()))


def test_the_frozen_model_compiles_into_one_graph():
    auto = tuned(model(), "mxfp8_rceil")
    eager = auto(rows())
    torch._dynamo.reset()
    compiled = torch.compile(auto.module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(rows()), eager)


def test_a_plan_ahead_has_them():
    plan = plan_ahead(
        model,
        rows(),
        recipe="mxfp8_rceil",
        device="cpu",
        clock=ScriptedClock(not_down),
        config=EVERY_SIZE,
    )
    assert plan.converted_fqns == ["up", "first"]


def test_decided_before_the_first_step():
    auto = AutoFloat8(
        model(),
        "mxfp8_rceil",
        warmup_steps=0,
        clock=ScriptedClock(not_down),
        config=EVERY_SIZE,
    )
    auto(rows()).square().mean().backward()
    assert auto.plan.converted_fqns == ["up", "first"]
