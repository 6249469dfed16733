"""Converting in place, against torchao's own conversion, and the registry."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_utils import pad_tensor_for_matmul

from fp8tune.auto import AutoFloat8
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import REFERENCE
from fp8tune.errors import ConfigError, UnknownRecipeError
from fp8tune.recipes import (
    BFloat16Recipe,
    get_recipe,
    recipe_names,
    register_recipe,
    resolve_recipe,
    resolve_recipes,
)
from tests.helpers import TORCHAO_0_17

OWN_NAMES = [
    "bf16",
    "blockwise",
    "mxfp8_floor",
    "mxfp8_rceil",
    "mxfp8_rceil_wgrad_hp",
]
TORCHAO_NAMES = ["rowwise", "rowwise_with_gw_hp", "tensorwise"]
every_recipe = pytest.mark.parametrize("name", [*TORCHAO_NAMES, "bf16"])
every_torchao_recipe = pytest.mark.parametrize("name", TORCHAO_NAMES)


def torchao_config(name):
    config = Float8LinearConfig.from_recipe_name(name)
    return dataclasses.replace(config, emulate=True, pad_inner_dim=True)


def trained(linear, input):
    """The output and all gradients of one forward + backward."""
    input = input.clone().requires_grad_()
    output = linear(input)
    wanted = [input, *linear.parameters()]
    return [output, *torch.autograd.grad(output.square().sum(), wanted)]


def assert_bit_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype is theirs.dtype
        assert torch.equal(ours, theirs)


class Squared(nn.Linear):
    """What a user's own recipe converts to."""

    def forward(self, input):
        return F.linear(input, self.weight.square(), self.bias)


class SquaredRecipe:
    """A user's own recipe."""

    name = "squared"
    reference = "float32"
    settings = "Squared"
    emulated = False

    def supports(self, linear):
        return None if linear.bias is None else Reason.UNSUPPORTED_DTYPE

    def static_filter(self, linear):
        del linear

    def convert(self, linear):
        linear.__class__ = Squared

    def revert(self, linear):
        linear.__class__ = nn.Linear


def test_the_built_in_recipes_are_known():
    assert recipe_names() == [*OWN_NAMES, *TORCHAO_NAMES]


@every_recipe
def test_reverting_leaves_no_trace(name):
    recipe, linear = get_recipe(name, "cpu"), nn.Linear(32, 48)
    linear.register_forward_hook(lambda *_: None)
    linear.marked_by_user = "yes"
    before, parameters = dict(vars(linear)), list(linear.parameters())
    recipe.convert(linear)
    assert type(linear) is not nn.Linear
    recipe.revert(linear)
    assert type(linear) is nn.Linear
    assert list(vars(linear)) == list(before)
    assert all(vars(linear)[key] is value for key, value in before.items())
    assert [id(x) for x in linear.parameters()] == [id(x) for x in parameters]


@every_recipe
def test_converting_leaves_parameters_hooks_and_keys(name):
    linear, calls = nn.Linear(32, 48), []
    linear.register_forward_hook(lambda *_: calls.append("hook"))
    keys, parameters = list(linear.state_dict()), list(linear.parameters())
    get_recipe(name, "cpu").convert(linear)
    linear(torch.randn(16, 32))
    assert calls == ["hook"]
    assert list(linear.state_dict()) == keys
    assert [id(x) for x in linear.parameters()] == [id(x) for x in parameters]


@every_recipe
def test_a_reverted_linear_computes_as_before(name):
    linear, input = nn.Linear(32, 48), torch.randn(16, 32)
    before, recipe = trained(linear, input), get_recipe(name, "cpu")
    recipe.convert(linear)
    assert not torch.equal(linear(input), before[0])
    recipe.revert(linear)
    assert_bit_equal(trained(linear, input), before)


@every_torchao_recipe
def test_a_converted_linear_is_one_of_torchao(name):
    ours = nn.Linear(32, 48, device="meta")
    get_recipe(name, "cpu").convert(ours)
    theirs = nn.Linear(32, 48, device="meta")
    theirs = convert_to_float8_training(theirs, config=torchao_config(name))
    assert type(ours) is type(theirs)
    assert set(vars(ours)) == set(vars(theirs))
    added = vars(theirs).keys() - vars(nn.Linear(1, 1)).keys()
    assert added
    assert {x: vars(ours)[x] for x in added} == {x: vars(theirs)[x] for x in added}


@every_torchao_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_values_are_those_of_torchao(name, dtype, bias):
    linear = nn.Linear(32, 48, bias=bias, dtype=dtype)
    input = torch.randn(2, 8, 32, dtype=dtype)
    model = nn.Sequential(linear)
    get_recipe(name, "cpu").convert(linear)
    ours = trained(model, input)
    get_recipe(name, "cpu").revert(linear)
    convert_to_float8_training(model, config=torchao_config(name))
    assert_bit_equal(ours, trained(model, input))


def test_bf16_computes_in_bfloat16_between_float32():
    linear, input = nn.Linear(32, 48), torch.randn(16, 32)
    get_recipe("bf16", "cpu").convert(linear)
    weight, bias = linear.weight.bfloat16(), linear.bias.bfloat16()
    expected = F.linear(input.bfloat16(), weight, bias).float()
    assert torch.equal(linear(input), expected)


@every_recipe
def test_a_ragged_last_batch_trains(name):
    linear, input = nn.Linear(32, 48), torch.randn(17, 32)
    get_recipe(name, "cpu").convert(linear)
    assert all(x.isfinite().all() for x in trained(linear, input))


@every_torchao_recipe
def test_a_ragged_last_batch_would_train_on_float8_hardware(name):
    # Emulated GEMMs take any M; those on the meta device check it as a GPU would.
    linear = nn.Linear(32, 48, device="meta", dtype=torch.bfloat16)
    get_recipe(name, "cpu").convert(linear)
    native = dataclasses.replace(linear.config, emulate=False)
    linear = nn.Linear(32, 48, device="meta", dtype=torch.bfloat16)
    linear = convert_to_float8_training(linear, config=native)
    input = torch.randn(17, 32, device="meta", dtype=torch.bfloat16)
    assert trained(linear, input)[0].shape == (17, 48)


@every_torchao_recipe
def test_without_float8_hardware_gemms_are_emulated(name):
    linear, recipe = nn.Linear(32, 48), get_recipe(name, "cpu")
    recipe.convert(linear)
    assert recipe.emulated
    assert linear.config.emulate


def test_bf16_is_never_emulated():
    assert not get_recipe("bf16", "cpu").emulated


def test_a_config_of_the_users_own_is_used_as_it_is():
    config = Float8LinearConfig(round_scales_to_power_of_2=True, emulate=True)
    recipe, linear = resolve_recipe(config, "cpu"), nn.Linear(32, 48)
    recipe.convert(linear)
    assert linear.config == config
    assert recipe.static_filter(linear) is None


@pytest.mark.parametrize(
    ("name", "pads"), [("rowwise", 6), ("rowwise_with_gw_hp", 4), ("tensorwise", 6)]
)
def test_eager_padding_copies_each_operand_once(name, pads):
    linear = nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)
    x = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
    get_recipe(name, "cpu").convert(linear)
    with torch.profiler.profile(acc_events=True) as profile:
        linear(x).sum().backward()
    assert sum(x.name == "aten::constant_pad_nd" for x in profile.events()) == pads


def test_inductor_takes_out_padding_that_pads_nothing():
    def product(a, b):
        return pad_tensor_for_matmul(a, dims=1) @ pad_tensor_for_matmul(b, dims=0)

    compiled = torch.compile(product, fullgraph=True)
    _, (code,) = run_and_get_code(compiled, torch.ones(32, 64), torch.ones(64, 32))
    assert "extern_kernels.mm(arg0_1, arg1_1" in code
    torch._dynamo.reset()


def test_configs_with_different_settings_have_different_settings_in_words():
    configs = [Float8LinearConfig(pad_inner_dim=pad) for pad in (True, False)]
    settings = [resolve_recipe(config, "cpu").settings for config in configs]
    assert settings[0] != settings[1]


def test_a_recipe_is_taken_as_it_is():
    recipe = BFloat16Recipe()
    assert resolve_recipe(recipe, "cpu") is recipe


def test_a_float8_all_gather_is_left_to_be_switched_in_place():
    asked = Float8LinearConfig(enable_fsdp_float8_all_gather=True)
    recipe, plain = (resolve_recipe(x, "cpu") for x in (asked, Float8LinearConfig()))
    assert (recipe.gathers, plain.gathers) == (True, False)
    assert recipe.settings == plain.settings


@pytest.mark.usefixtures("own_registry")
def test_a_registered_recipe_is_used_by_its_name(scripted_clock):
    register_recipe("squared", lambda _: SquaredRecipe())
    clock = scripted_clock(lambda _, variant: 2.0 if variant == REFERENCE else 1.0)
    linear = nn.Linear(4, 4, bias=False)
    auto = AutoFloat8(linear, "squared", clock=clock, warmup_steps=1)
    auto(torch.randn(2, 4)).sum().backward()
    assert auto.freeze().converted_fqns == [""]
    assert type(linear) is Squared
    assert "squared" in recipe_names()


@pytest.mark.usefixtures("own_registry")
def test_a_factory_gets_the_device():
    devices = []
    register_recipe("squared", lambda device: devices.append(device) or SquaredRecipe())
    get_recipe("squared", "cpu")
    assert devices == [torch.device("cpu")]


def test_a_name_is_registered_once():
    with pytest.raises(ConfigError, match="'rowwise' is registered already"):
        register_recipe("rowwise", lambda _: SquaredRecipe())


@pytest.mark.parametrize("find", [get_recipe, resolve_recipe])
def test_an_unknown_name_lists_the_known(find):
    known = ", ".join([*OWN_NAMES, *TORCHAO_NAMES])
    with pytest.raises(UnknownRecipeError, match=f"'row'; choose one of {known}"):
        find("row", "cpu")


@pytest.mark.skipif(not TORCHAO_0_17, reason="torchao 0.18 has what mxfp8 needs")
@pytest.mark.parametrize("name", [x for x in OWN_NAMES if x.startswith("mxfp8")])
def test_what_torchao_is_too_old_for_is_refused_and_no_other(name):
    with pytest.raises(ConfigError, match=r"mxfp8 needs MXFP8Linear.* torchao 0\.17"):
        AutoFloat8(nn.Linear(64, 64), name)
    assert resolve_recipes("blockwise, rowwise", "cpu").names == [
        "blockwise",
        "rowwise",
    ]


@pytest.mark.parametrize("wrong", [None, 3, ["rowwise"], BFloat16Recipe, object()])
def test_what_is_no_recipe_is_refused(wrong):
    with pytest.raises(
        ConfigError, match=r"expected a name \(bf16, blockwise, mxfp8_floor, "
    ):
        resolve_recipe(wrong, "cpu")


@pytest.mark.skipif(TORCHAO_0_17, reason="the workaround came with torchao 0.18")
def test_a_recipe_installs_torchaos_workaround_for_triton():
    code = """
import torchao.float8._inductor_patch as patch
from fp8tune.recipes import get_recipe
before = patch._PATCHED
get_recipe("rowwise", "cpu")
print(before, patch._PATCHED)
"""
    run = subprocess.run(  # noqa: S603 - runs these few lines
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["False", "True"]
