"""What is called converted really runs converted: plain Linears, and those that are not."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize, prune
from torchao.float8.float8_linear import Float8Linear
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from fp8tune import AutoFloat8, ModelError, PlanMismatchError, Reason, TuneConfig
from fp8tune.recipes import BFloat16Linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8tune.decision.records import Signature

EVERY = TuneConfig(static_filter="divisible", include_output_layer=True)


def all_faster(signature: Signature, variant: str) -> float:
    return 1.0 if variant == "reference" else 0.5


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


def step(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    model.zero_grad()
    model(torch.ones(8, 32, dtype=dtype)).square().mean().backward()


@pytest.fixture
def wrap(scripted_clock: type) -> Callable[..., AutoFloat8]:
    def build(model: nn.Module, recipe: str = "bf16", **options: object) -> AutoFloat8:
        options = {"warmup_steps": 1, "config": EVERY, **options}
        clock = scripted_clock(all_faster, lambda _: 1.0)
        return AutoFloat8(model, recipe=recipe, clock=clock, **options)

    return build


def test_a_forward_of_the_layers_own_is_left_alone(wrap: Callable) -> None:
    model = mlp()
    plain = copy.deepcopy(model)
    add_hook_to_module(model[0], ModelHook())
    auto = wrap(model)
    step(auto)
    auto.freeze()
    assert auto.plan["0"].reason is Reason.OWN_FORWARD
    assert auto.plan.converted_fqns == ["2"]
    x = torch.randn(4, 32)
    assert torch.equal(model[0](x), plain[0](x))


def test_weights_that_accelerate_offloads_are_left_alone(wrap: Callable) -> None:
    model = cpu_offload(mlp(), torch.device("cpu"))
    auto = wrap(nn.Sequential(model, nn.Linear(32, 32)))
    step(auto)
    auto.freeze()
    assert [x.reason for x in auto.plan.decisions[:2]] == [Reason.OWN_FORWARD] * 2
    assert auto.plan.converted_fqns == ["1"]


def test_a_model_that_is_offloaded_as_a_whole_is_refused(wrap: Callable) -> None:
    model = cpu_offload(mlp(), torch.device("cpu"))
    with pytest.raises(ModelError, match="on the meta device"):
        wrap(model)


def test_kohya_style_lora_keeps_its_forward(wrap: Callable) -> None:
    model = mlp()
    down = nn.Linear(32, 4, bias=False)
    base = model[0].forward
    model[0].forward = lambda x: base(x) + down(x).sum()
    auto = wrap(model)
    step(auto)
    assert auto.freeze()["0"].reason is Reason.OWN_FORWARD


def test_a_quantized_base_is_left_alone(wrap: Callable) -> None:
    model = mlp().bfloat16()
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, fqn: fqn == "0")
    auto = wrap(model, "rowwise")
    step(auto, torch.bfloat16)
    auto.freeze()
    assert auto.plan["0"].reason is Reason.WEIGHT_SUBCLASS
    assert auto.plan.converted_fqns == ["2"]


@pytest.mark.parametrize("size", [0, 1024])
def test_a_weight_that_is_flat_at_rest_is_left_alone(wrap: Callable, size: int) -> None:
    """As under ZeRO-3 and FSDP1, which gather it for the call."""
    model = mlp()
    model[0].weight = nn.Parameter(torch.empty(size))
    assert wrap(model)._tuner._pipeline.screened[0].reason is Reason.WEIGHT_NOT_2D


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


@pytest.mark.parametrize("trial_steps", [0, 100])
@pytest.mark.parametrize("recipe", ["bf16", "rowwise"])
def test_a_layer_parametrized_while_tuned_goes_back_to_high_precision(
    wrap: Callable,
    caplog: pytest.LogCaptureFixture,
    recipe: str,
    trial_steps: int,
) -> None:
    auto = wrap(
        mlp(),
        recipe,
        config=TuneConfig(
            static_filter="divisible",
            include_output_layer=True,
            trial_steps=trial_steps,
        ),
    )
    step(auto)
    if trial_steps:
        step(auto)
        assert auto.phase == "trial"
    parametrize.register_parametrization(auto.module[0], "weight", Halved())
    step(auto)
    auto.freeze()
    assert auto.plan["0"].reason is Reason.PARAMETRIZED
    assert auto.plan.converted_fqns == ["2"] or trial_steps
    assert "1 Linears were replaced or changed after AutoFloat8" in caplog.text
    plain = mlp()
    parametrize.register_parametrization(plain[0], "weight", Halved())
    x = torch.randn(4, 32)
    assert torch.equal(auto.module[0](x), plain[0](x))
    parametrize.remove_parametrizations(auto.module[0], "weight")
    assert type(auto.module[0]) is nn.Linear


def test_a_forward_set_while_tuned_is_respected(wrap: Callable) -> None:
    auto = wrap(mlp())
    step(auto)
    add_hook_to_module(auto.module[0], ModelHook())
    auto.freeze()
    assert auto.plan["0"].reason is Reason.OWN_FORWARD
    assert type(auto.module[0]) is nn.Linear


def test_a_layer_replaced_while_tuned_is_no_ghost(wrap: Callable) -> None:
    auto = wrap(mlp())
    step(auto)
    old = auto.module[0]
    auto.module[0] = nn.Linear(32, 32)
    step(auto)
    assert auto.frozen
    assert auto.plan["0"].reason is Reason.REPLACED
    assert auto.plan.converted_fqns == ["2"]
    assert type(old) is type(auto.module[0]) is nn.Linear
    assert not old._forward_hooks


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x))


LORA = LoraConfig(target_modules=["q_proj"], r=16)


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise"])
def test_a_model_cast_in_the_warmup_to_a_dtype_that_the_recipe_does_not_take(
    wrap: Callable, caplog: pytest.LogCaptureFixture, recipe: str
) -> None:
    auto = wrap(mlp(), recipe)
    step(auto)
    auto.half()
    step(auto, torch.float16)
    assert auto.frozen
    assert {x.reason for x in auto.plan.decisions} == {Reason.UNSUPPORTED_DTYPE}
    assert {type(x) for x in auto.module} == {nn.Linear, nn.ReLU}
    assert (
        "2 Linears have weights of a dtype that the recipe does not take" in caplog.text
    )
    assert "were replaced or changed" not in caplog.text


def test_a_layer_pruned_after_the_freeze_is_not_lost_without_a_word(
    wrap: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """It runs converted on, until ``reference`` takes it back for good."""
    auto = wrap(mlp())
    step(auto)
    auto.freeze()
    prune.l1_unstructured(auto[0], "weight", amount=0.5)
    step(auto)
    assert type(auto[0]) is BFloat16Linear
    for _ in range(2):
        with auto.reference():
            step(auto)
    assert auto.plan.converted_fqns == ["2"]
    assert auto.plan["0"].reason is Reason.PARAMETRIZED
    assert caplog.text.count("1 Linears were replaced or changed") == 1


def test_lora_that_comes_after_the_wrapper(wrap: Callable) -> None:
    auto = wrap(Attention())
    step(auto)
    get_peft_model(auto.module, LORA)
    step(auto)
    assert auto.plan["q_proj.base_layer"].reason is Reason.REPLACED
    assert auto.plan.converted_fqns == ["o_proj"]
    assert type(auto.module.q_proj.base_layer) is nn.Linear


def test_lora_that_came_before_is_tuned(wrap: Callable) -> None:
    model = get_peft_model(Attention(), LORA)
    auto = wrap(model)
    step(auto)
    step(auto)
    (base,) = [x for x in auto.plan.decisions if x.fqn.endswith("base_layer")]
    assert {x.grad_weight for x, _ in base.signatures} == {False}
    assert any(isinstance(x, BFloat16Linear) for x in model.modules())


def test_another_class_given_while_tuned_is_an_error_that_says_so(
    wrap: Callable,
) -> None:
    class Mine(nn.Linear):
        pass

    auto = wrap(mlp())
    step(auto)
    auto.module[0].__class__ = Mine
    with pytest.raises(ModelError, match="has become a Mine"):
        auto.freeze()


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise", "mxfp8_floor"])
def test_attributes_of_the_users_come_back(wrap: Callable, recipe: str) -> None:
    names = ("config", "linear_mm_config", "kernel_preference", "wgrad_with_hp")
    model = mlp()
    for name in names:
        setattr(model[0], name, f"my {name}")
    auto = wrap(model, recipe)
    step(auto)
    auto.freeze()
    twin = copy.deepcopy(auto)
    for tuned in (auto, twin):
        with tuned.reference():
            assert [getattr(tuned.module[0], x) for x in names] == [
                f"my {name}" for name in names
            ]


def test_a_converted_layer_that_is_wrapped_again_says_so(wrap: Callable) -> None:
    auto = wrap(mlp())
    step(auto)
    auto.freeze()
    again = wrap(auto.module)
    assert {x.reason for x in again.plan.decisions} == {Reason.ALREADY_FLOAT8}


def test_a_plan_for_a_layer_with_its_own_forward_names_the_reason(
    wrap: Callable,
) -> None:
    auto = wrap(mlp())
    step(auto)
    plan = auto.freeze()
    other = mlp()
    other[0].forward = functools.partial(nn.Linear.forward, other[0])
    with pytest.raises(
        PlanMismatchError, match="a forward was set on the layer itself"
    ):
        plan.apply(other)


def test_a_class_of_torchaos_stays_what_it_is(wrap: Callable) -> None:
    auto = wrap(mlp(), "rowwise")
    step(auto)
    auto.freeze()
    assert type(auto.module[0]) is Float8Linear
