"""Wrong use ends in a sentence that says what was found and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fp8tune
from fp8tune import AutoFloat8, Fp8TuneError


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32))


def step(model: nn.Module) -> None:
    model(torch.randn(16, 32)).sum().backward()


def test_every_error_is_of_our_own_tree_and_of_a_builtin_kind() -> None:
    errors = [getattr(fp8tune, x) for x in fp8tune.__all__ if x.endswith("Error")]
    for error in errors:
        assert issubclass(error, Fp8TuneError)
        builtin = issubclass(error, ValueError | RuntimeError | ImportError)
        assert builtin or error is Fp8TuneError


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(
        fp8tune.UnknownRecipeError,
        match=r"unknown recipe 'rowise'; choose one of bf16, .*rowwise, .*tensorwise",
    ):
        AutoFloat8(linear(), recipe="rowise")


def test_something_that_is_no_recipe() -> None:
    with pytest.raises(ValueError, match=r"recipe is 8; expected a name"):
        AutoFloat8(linear(), recipe=8)


def test_a_model_without_linears() -> None:
    with pytest.raises(fp8tune.ModelError, match=r"Sequential holds no nn\.Linear"):
        AutoFloat8(nn.Sequential(nn.ReLU()))


def test_something_that_is_no_model() -> None:
    with pytest.raises(fp8tune.ModelError, match=r"it must be an nn.Module"):
        AutoFloat8(linear)


def test_a_model_on_the_meta_device() -> None:
    with pytest.raises(fp8tune.ModelError, match=r"meta device.*materialise it first"):
        AutoFloat8(nn.Linear(16, 16, device="meta"))


def test_a_model_that_is_compiled_already() -> None:
    with pytest.raises(
        fp8tune.AlreadyCompiledError, match=r"compiled already.*Pass the"
    ):
        AutoFloat8(torch.compile(linear()), recipe="bf16")
    part = nn.Sequential(linear(), nn.ReLU())
    part[0].compile()
    with pytest.raises(fp8tune.AlreadyCompiledError, match=r"0 \(Sequential\)"):
        AutoFloat8(part, recipe="bf16")


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapper", "bare model"])
def test_a_call_under_torch_compile_before_the_freeze(*, wrapped: bool) -> None:
    torch._dynamo.reset()
    auto = AutoFloat8(linear(), recipe="bf16")
    compiled = torch.compile(auto if wrapped else auto.module, backend="eager")
    with pytest.raises(fp8tune.CompiledTooEarlyError, match=r"compile=True.*freeze()"):
        compiled(torch.randn(16, 32))


def test_a_fullgraph_call_before_the_freeze_says_the_same() -> None:
    torch._dynamo.reset()
    auto = AutoFloat8(linear(), recipe="bf16")
    compiled = torch.compile(auto, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"compile=True.*freeze()"):
        compiled(torch.randn(16, 32))


@pytest.mark.parametrize("steps", [-1, 1.5, None])
def test_warmup_steps_below_zero(steps: object) -> None:
    with pytest.raises(
        ValueError, match=f"warmup_steps is {steps!r}; it must be a number of training"
    ):
        AutoFloat8(linear(), warmup_steps=steps)


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise", "rowwise_with_gw_hp"])
def test_a_float8_recipe_on_a_float16_model(recipe: str) -> None:
    with pytest.raises(
        fp8tune.ModelError,
        match=r"does not take the float16.*model\.to\(torch\.bfloat16",
    ):
        AutoFloat8(linear().half(), recipe=recipe)


def test_the_bf16_recipe_on_a_bf16_model() -> None:
    with pytest.raises(fp8tune.ModelError, match=r"model\.to\(torch\.float32\)"):
        AutoFloat8(linear().bfloat16(), recipe="bf16")


def test_names_given_as_one_string() -> None:
    with pytest.raises(fp8tune.ConfigError, match=r"list of substrings"):
        AutoFloat8(linear(), filter_fqns="output")


def test_compile_and_config_of_the_wrong_kind() -> None:
    with pytest.raises(
        fp8tune.ConfigError, match=r"compile is 'yes'; it must be a bool"
    ):
        AutoFloat8(linear(), compile="yes")
    with pytest.raises(fp8tune.ConfigError, match=r"it must be a fp8tune.TuneConfig"):
        AutoFloat8(linear(), config={"min_speedup": 1.1})


def test_a_plan_applied_to_another_model(scripted_clock: type) -> None:
    auto = AutoFloat8(
        linear(), recipe="bf16", clock=scripted_clock(lambda *_: 1.0), warmup_steps=1
    )
    step(auto)
    other = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    with pytest.raises(
        fp8tune.PlanMismatchError, match=r"0 has K, N = .*; 1 is only in"
    ):
        auto.freeze().apply(other)


def test_a_refused_model_is_left_as_it_was() -> None:
    model = linear().half()
    with pytest.raises(fp8tune.ModelError, match=r"float16"):
        AutoFloat8(model)
    assert type(model[0]) is nn.Linear
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
