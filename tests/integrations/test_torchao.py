"""A plan with torchao itself, also before there are weights, and in a resumed run."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchao.float8 import convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from fp8tune import (
    AutoFloat8,
    ConfigError,
    ExportError,
    Plan,
    PlanMismatchError,
    RankMismatchError,
    Recipe,
    TuneConfig,
    get_recipe,
)
from fp8tune.integrations import float8_config, resumed
from tests.helpers import graph_texts, widening

if TYPE_CHECKING:
    from collections.abc import Callable


EVERY_SIZE = TuneConfig(static_filter="divisible")


class Block(nn.Module):
    """A gated MLP behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.gate = nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(32, 16))


def texts_of(model: nn.Module) -> list[str]:
    return graph_texts(
        lambda backend: step(torch.compile(model, fullgraph=True, backend=backend))
    )


def state_of(plan: Plan) -> dict[str, object]:
    """The tuning state of a checkpoint whose run was frozen."""
    return {"phase": "frozen", "plan": plan.to_dict()}


def step(model: nn.Module) -> torch.Tensor:
    loss = model(torch.linspace(-1, 1, 512).reshape(16, 32)).square().mean()
    loss.backward()
    return loss.detach()


@pytest.fixture
def plan(scripted_clock: type) -> Plan:
    clock = scripted_clock(widening)
    auto = AutoFloat8(build(), "rowwise", config=EVERY_SIZE, clock=clock)
    step(auto)
    return auto.freeze()


def converted(model: nn.Module) -> list[str]:
    return [x for x, y in model.named_modules() if isinstance(y, Float8Linear)]


def by_torchao(model: nn.Module, plan: Plan) -> nn.Module:
    return convert_to_float8_training(
        model, config=float8_config(plan), module_filter_fn=plan.module_filter_fn
    )


def test_torchao_and_apply_give_the_same_dynamo_graphs(plan: Plan) -> None:
    one, other = build(), build()
    plan.apply(one)
    by_torchao(other, plan)
    assert converted(one) == converted(other) == plan.converted_fqns
    assert plan.converted_fqns == ["0.up", "0.gate", "1.up", "1.gate"]
    expected = texts_of(one)
    assert texts_of(other) == expected
    assert len(expected) == 1
    assert texts_of(build()) != expected


def test_and_the_same_losses(plan: Plan) -> None:
    one, other = build(), build()
    plan.apply(one)
    by_torchao(other, plan)
    assert torch.equal(step(one), step(other))
    assert torch.equal(one[0].up.weight.grad, other[0].up.weight.grad)


class TestMeta:
    """Models that have no weights yet."""

    @pytest.mark.parametrize("convert", [Plan.apply, lambda p, m: by_torchao(m, p)])
    def test_a_plan_is_applied_before_there_are_weights(
        self, plan: Plan, convert: Callable[[Plan, nn.Module], object]
    ) -> None:
        with torch.device("meta"):
            model = build()
        convert(plan, model)
        model.to_empty(device="cpu")
        model.load_state_dict(build().state_dict())
        expected = build()
        plan.apply(expected)
        assert converted(model) == plan.converted_fqns
        assert torch.equal(step(model), step(expected))

    def test_whether_to_emulate_is_decided_by_where_it_will_run(
        self, plan: Plan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with torch.device("meta"):
            here, there = build(), build()
        plan.apply(here)
        assert here[0].up.config.emulate
        monkeypatch.setattr(
            torch.accelerator,
            "current_accelerator",
            lambda check_available: torch.device("cuda"),
        )
        monkeypatch.setattr("fp8tune.recipes.torchao.runs_converted", lambda *_: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        plan.apply(there)
        assert not there[0].up.config.emulate


def test_only_torchao_recipes_have_a_torchao_config(plan: Plan) -> None:
    first, *rest = plan.decisions
    bf16 = [replace(x, recipe=x.recipe and "bf16") for x in plan.decisions]
    with pytest.raises(ExportError, match=r"recipe 'bf16', which torchao does not"):
        float8_config(replace(plan, decisions=tuple(bf16)))
    mixed = replace(plan, decisions=(replace(first, recipe="tensorwise"), *rest))
    with pytest.raises(
        ExportError, match=r"several recipes \(rowwise, tensorwise\), and only plan"
    ):
        float8_config(mixed)


class TestGivenPlan:
    """AutoFloat8 with the plan of an earlier run."""

    def test_it_is_frozen_at_once_and_nothing_is_timed(
        self, plan: Plan, silent_clock: object
    ) -> None:
        model = build()
        auto = AutoFloat8(model, "rowwise", plan=plan, clock=silent_clock)
        assert auto.frozen
        assert auto.phase == "frozen"
        assert auto.plan is plan
        assert converted(model) == plan.converted_fqns
        assert not model._forward_pre_hooks
        with auto.reference():
            assert converted(model) == []
        assert converted(model) == plan.converted_fqns

    def test_filters_of_this_run_change_nothing(self, plan: Plan) -> None:
        model = build()
        AutoFloat8(model, "rowwise", plan=plan, filter_fqns=["up"])
        assert converted(model) == plan.converted_fqns

    def test_it_is_compiled_at_once(self, plan: Plan) -> None:
        model = build()
        AutoFloat8(model, "rowwise", plan=plan, compile={"backend": "eager"})
        assert model._compiled_call_impl is not None

    def test_another_recipe_is_refused(self, plan: Plan) -> None:
        with pytest.raises(
            ConfigError, match=r"recipe 'rowwise', and recipe is 'bf16'; pass recipe="
        ):
            AutoFloat8(build(), "bf16", plan=plan)

    def test_another_model_is_refused(self, plan: Plan) -> None:
        model = build()[:2]
        with pytest.raises(PlanMismatchError, match="2 is only in the plan"):
            AutoFloat8(model, "rowwise", plan=plan)
        assert converted(model) == []

    def test_a_path_is_no_plan(self) -> None:
        with pytest.raises(ConfigError, match=r"plan is 'plan\.json'; it must be"):
            AutoFloat8(build(), plan="plan.json")

    def test_a_plan_survives_as_plain_data(self, plan: Plan) -> None:
        assert Plan.from_dict(plan.to_dict()) == plan


class TestOtherDevice:
    """A checkpoint's plan, measured on another GPU."""

    def moved(self, plan: Plan) -> Plan:
        return replace(plan, environment=(("device", "Imaginary 1000"),))

    def test_the_plan_is_kept(
        self, plan: Plan, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "fp8tune")
        auto = resumed(build(), state_of(self.moved(plan)), {}, retune=False)
        assert auto.frozen
        assert "measured on Imaginary 1000 and is kept on" in caplog.text

    def test_it_is_tuned_again_if_asked(
        self, plan: Plan, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "fp8tune")
        options = {"recipe": "rowwise", "config": EVERY_SIZE}
        assert not resumed(
            build(), state_of(self.moved(plan)), options, retune=True
        ).frozen
        assert "measured on Imaginary 1000; tuning again on" in caplog.text
        assert resumed(build(), state_of(plan), options, retune=True).frozen


def _with_plan_of(rank_plans: list[dict[str, object]]) -> list[str]:
    rank = torch.distributed.get_rank()
    auto = AutoFloat8(build(), "rowwise", plan=Plan.from_dict(rank_plans[rank]))
    return auto.plan.converted_fqns


@pytest.mark.dist
def test_ranks_that_are_given_different_plans_are_refused(
    plan: Plan, ranks: Callable[..., dict[int, object]]
) -> None:
    answers = ranks(2, _with_plan_of, [plan.to_dict()] * 2)
    assert answers == {0: plan.converted_fqns, 1: plan.converted_fqns}
    other = replace(
        plan,
        decisions=tuple(
            replace(x, verdict="reference", reason="slower") for x in plan.decisions
        ),
    )
    answers = ranks(2, _with_plan_of, [plan.to_dict(), other.to_dict()])
    assert all(RankMismatchError.__name__ in str(x) for x in answers.values())
    assert "0.up.reason is None on rank 0 and" in str(answers[0])


def test_auto_means_the_plans_recipes_when_resumed(plan: Plan) -> None:
    """On another device "auto" may stand for others than it did."""
    model = build()
    auto = resumed(model, state_of(plan), {"recipe": "auto"}, retune=False)
    assert auto.frozen
    assert converted(model) == plan.converted_fqns


def test_a_plan_with_two_recipes_is_resumed(plan: Plan, scripted_clock: type) -> None:
    first, *rest = plan.decisions
    both = replace(
        plan,
        recipe="rowwise, tensorwise",
        decisions=(replace(first, recipe="tensorwise"), *rest),
    )
    model = build()
    assert resumed(model, state_of(both), {}, retune=False).frozen
    assert converted(model) == plan.converted_fqns
    kinds = [
        x.config.cast_config_input.scaling_granularity
        for x in (model[0].up, model[1].up)
    ]
    assert [x.value for x in kinds] == ["tensorwise", "axiswise"]


def test_every_torchao_recipe_is_known_to_float8_config() -> None:
    for name in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
        recipe = get_recipe(name, "cpu")
        assert isinstance(recipe, Recipe)
        assert recipe.config.pad_inner_dim
