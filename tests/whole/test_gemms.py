"""Each GEMM by itself: what is timed, what the plan says, and what it then computes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.config import CastConfig, ScalingType

from fp8tune import AutoFloat8, ConfigError, Plan, TuneConfig, get_recipe
from fp8tune.decision.gemms import base_of
from fp8tune.decision.records import REFERENCE
from fp8tune.plan.export import export_lines
from fp8tune.recipes import register_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from fp8tune.decision.records import Signature

EVERY_SIZE = TuneConfig(static_filter="divisible")
BEST = "rowwise:output+grad_input"

# Milliseconds in which only the gradient of the weight loses.
LOSING = {
    REFERENCE: 3.0,
    "rowwise": 3.4,
    "rowwise:output": 2.6,
    "rowwise:grad_input": 2.6,
    "rowwise:grad_weight": 4.2,
    BEST: 2.2,
}


def script(times: Mapping[str, float]) -> Callable[[Signature, str], float]:
    return lambda _, variant: times[variant]


def chain() -> nn.Sequential:
    """The input of all but the first Linear takes a gradient."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 64))


def tuned(clock: Any, module: nn.Module | None = None, **options: Any) -> AutoFloat8:
    options = {"config": EVERY_SIZE, "warmup_steps": 1, "recipe": "rowwise"} | options
    auto = AutoFloat8(module or chain(), clock=clock, **options)
    auto(torch.randn(16, 32)).square().sum().backward()
    auto.zero_grad()
    auto.freeze()
    return auto


def in_high_precision(cast: CastConfig) -> CastConfig:
    return CastConfig(ScalingType.DISABLED, target_dtype=cast.target_dtype)


def by_hand(module: nn.Module, fqn: str) -> nn.Module:
    """torchao's own conversion, with the casts for grad_weight off."""
    config = Float8LinearConfig.from_recipe_name("rowwise")
    config = replace(
        config,
        pad_inner_dim=True,
        emulate=True,
        cast_config_input_for_grad_weight=in_high_precision(config.cast_config_input),
        cast_config_grad_output_for_grad_weight=in_high_precision(
            config.cast_config_grad_output
        ),
    )
    return convert_to_float8_training(
        module, config=config, module_filter_fn=lambda _, name: name == fqn
    )


def results(module: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(16, 32, requires_grad=True)
    output = module(x)
    wanted = [x, *module.parameters()]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), wanted)]


def test_the_gemms_that_gain_become_one_more_candidate(scripted_clock) -> None:
    auto = tuned(scripted_clock(script(LOSING)))
    assert auto.plan is not None
    decision = auto.plan["2"]
    assert decision.recipe == BEST
    assert decision.speedup == pytest.approx(3.0 / 2.2)
    assert [x.recipe for x in decision.variants] == ["rowwise", BEST]
    assert f"{BEST}: faster" in str(auto.plan)
    assert "not rowwise: slower" in str(auto.plan)
    assert f"to rowwise:output (1) and {BEST} (1)" in auto.plan.summary()


def test_what_it_computes_is_torchaos_with_that_config_bit_by_bit(
    scripted_clock,
) -> None:
    auto = tuned(scripted_clock(script(LOSING)))
    # The first layer's input takes no gradient in training, so it is left out here.
    get_recipe("rowwise:output", "cpu").revert(auto.module[0])
    theirs = by_hand(chain(), "2")
    theirs.load_state_dict(auto.state_dict())
    pairs = list(zip(results(auto.module), results(theirs), strict=True))
    assert all(torch.equal(ours, other) for ours, other in pairs)
    # The gradient of that weight is the plain one; the output's is not.
    plain = chain()
    plain.load_state_dict(auto.state_dict())
    assert not torch.equal(pairs[0][0], results(plain)[0])


def test_a_whole_that_is_clearly_faster_is_not_taken_apart(scripted_clock) -> None:
    clock = scripted_clock(script(LOSING | {"rowwise": 2.0}))
    auto = tuned(clock)
    assert auto.plan is not None
    assert {x.recipe for x in auto.plan.decisions} == {"rowwise"}
    assert {variant for _, variant in clock.timed} == {REFERENCE, "rowwise"}


@pytest.mark.parametrize(("whole", "apart"), [(5.9, True), (6.0, False)])
def test_half_as_fast_is_hopeless(scripted_clock, whole: float, apart: bool) -> None:
    clock = scripted_clock(script(LOSING | {"rowwise": whole}))
    tuned(clock)
    assert (BEST in {variant for _, variant in clock.timed}) is apart


def test_where_no_gemm_gains_nothing_is_offered(scripted_clock) -> None:
    slow = dict.fromkeys(LOSING, 4.0) | {REFERENCE: 3.0}
    auto = tuned(scripted_clock(script(slow)))
    assert auto.plan is not None
    assert [x.recipe for x in auto.plan["2"].variants] == ["rowwise"]
    assert auto.plan["2"].recipe is None


def test_where_every_gemm_gains_a_little_nothing_is_offered(scripted_clock) -> None:
    little = dict.fromkeys(LOSING, 2.99) | {REFERENCE: 3.0, "rowwise": 3.0}
    auto = tuned(scripted_clock(script(little)))
    assert auto.plan is not None
    assert [x.recipe for x in auto.plan["2"].variants] == ["rowwise"]


def test_a_part_is_no_better_than_it_is_timed(scripted_clock) -> None:
    auto = tuned(scripted_clock(script(LOSING | {BEST: 3.1})))
    assert auto.plan is not None
    assert auto.plan["2"].recipe is None
    reasons = {x.recipe: str(x.reason) for x in auto.plan["2"].variants}
    assert reasons == {"rowwise": "slower", BEST: "slower"}


def test_a_later_run_gets_the_part_from_the_cache(
    scripted_clock, silent_clock, tmp_path: Path
) -> None:
    for cache in (tmp_path / "cache.json", (tmp_path / "store").as_uri()):
        first = tuned(scripted_clock(script(LOSING)), cache=cache).plan
        second = tuned(silent_clock, cache=cache).plan
        assert first is not None
        assert second is not None
        assert first["2"].recipe == second["2"].recipe == BEST
        assert first.decisions == second.decisions


def test_the_plan_file_converts_another_model(scripted_clock, tmp_path: Path) -> None:
    auto = tuned(scripted_clock(script(LOSING)))
    assert auto.plan is not None
    auto.plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    other = chain()
    plan.apply(other)
    pairs = zip(results(auto.module), results(other), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    plan.revert(other)
    assert [type(x) for x in other] == [type(x) for x in chain()]
    resumed = AutoFloat8(chain(), plan=plan)
    assert repr(resumed.module[2]) == repr(auto.module[2])


def test_a_config_of_ones_own_is_taken_apart_too(scripted_clock) -> None:
    times = {name.replace("rowwise", "custom"): ms for name, ms in LOSING.items()}
    config = Float8LinearConfig.from_recipe_name("rowwise")
    auto = tuned(scripted_clock(script(times)), recipe=config)
    assert auto.plan is not None
    assert auto.plan["2"].recipe == "custom:output+grad_input"
    other = chain()
    auto.plan.apply(other, config)
    assert repr(other[2]) == repr(auto.module[2])


def test_a_part_may_be_asked_for_by_name(scripted_clock) -> None:
    auto = tuned(scripted_clock(script(LOSING)), recipe=BEST)
    assert auto.plan is not None
    assert auto.plan.recipe == auto.plan["0"].recipe == auto.plan["2"].recipe == BEST
    other = chain()
    auto.plan.apply(other)
    assert repr(other[2]) == repr(auto.module[2])


def test_a_recipe_that_has_the_weights_gradient_plain_has_two_gemms() -> None:
    recipe = get_recipe("rowwise_with_gw_hp:grad_input+output", "cpu")
    assert recipe.name == "rowwise_with_gw_hp"
    with pytest.raises(ConfigError, match=r"converts output\+grad_input; choose"):
        get_recipe("rowwise_with_gw_hp:grad_weight", "cpu")
    with pytest.raises(
        ConfigError, match="cannot convert only output: it converts all"
    ):
        get_recipe("bf16:output", "cpu")


@pytest.mark.usefixtures("own_registry")
def test_no_recipe_can_be_called_like_a_part() -> None:
    with pytest.raises(ConfigError, match="behind a colon are the GEMMs of one"):
        register_recipe("mine:output", lambda _: get_recipe("bf16", "cpu"))
    assert base_of("mine:own") == "mine:own"


@pytest.mark.parametrize("target", ["torchao", "accelerate"])
def test_exports_say_which_gemms(scripted_clock, target: str) -> None:
    auto = tuned(scripted_clock(script(LOSING)), recipe=BEST)
    assert auto.plan is not None
    text = "\n".join(export_lines(auto.plan, target))
    namespace: dict[str, Any] = {}
    head = text.partition("convert_to_float8_training(model")[0].partition("recipe =")[
        0
    ]
    if target == "accelerate":
        head = "\n".join(x for x in head.splitlines() if "accelerate" not in x)
    exec(head, namespace)  # noqa: S102
    expected = replace(get_recipe(BEST, "cpu").config, emulate=False)
    assert namespace["config"] == expected
