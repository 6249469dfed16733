"""mxfp8, emulated: what it takes, what it leaves behind, and where it is refused."""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch
from torch import nn

from fp8tune import (
    AutoFloat8,
    ConfigError,
    Reason,
    TuneConfig,
    get_recipe,
)
from fp8tune.decision.records import REFERENCE
from fp8tune.recipes import mx, prototypes
from tests.helpers import TORCHAO_0_17

if TORCHAO_0_17:
    pytest.skip("MXFP8Linear came with torchao 0.18", allow_module_level=True)

MXFP8Linear = importlib.import_module(
    "torchao.prototype.moe_training.mxfp8_linear"
).MXFP8Linear
EVERY_SIZE = TuneConfig(static_filter="divisible")
MODES = ["mxfp8_rceil", "mxfp8_floor", "mxfp8_rceil_wgrad_hp"]
every_mode = pytest.mark.parametrize("name", MODES)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.odd = nn.Linear(96, 48)
        self.odder = nn.Linear(48, 64)

    def forward(self, x):
        return self.odder(self.odd(self.up(x).relu()))


def gradients(module, x):
    x = x.clone().requires_grad_()
    output = module(x)
    wanted = [x, *module.parameters()]
    grads = torch.autograd.grad(output.float().square().sum(), wanted)
    return [output.detach(), *grads]


@every_mode
def test_converted_trained_for_3_steps_and_reverted(scripted_clock, name):
    torch.manual_seed(0)
    model, bare = Model(), Model()
    keys = list(bare.state_dict())
    clock = scripted_clock(lambda _, x: 2.0 if x == REFERENCE else 1.0)
    auto = AutoFloat8(model, name, warmup_steps=2, clock=clock, config=EVERY_SIZE)
    optimizer = torch.optim.SGD(auto.parameters(), lr=0.1)
    x = torch.randn(32, 64)
    losses = []
    for _ in range(3):
        loss = (auto(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert auto.frozen
    assert isinstance(model.up, MXFP8Linear)
    assert losses[2] < losses[0]
    assert list(auto.state_dict()) == keys
    get_recipe(name, "cpu").revert(model.up)
    assert type(model.up) is nn.Linear
    assert list(model.state_dict()) == keys
    assert vars(model.up).keys() == vars(bare.up).keys()
    bare.load_state_dict(auto.state_dict())
    assert torch.equal(bare(x), model(x))


@every_mode
def test_k_and_n_must_be_multiples_of_32(scripted_clock, name):
    auto = AutoFloat8(Model(), name, config=EVERY_SIZE)
    auto(torch.randn(4, 64)).sum().backward()
    auto.freeze()
    assert auto.plan["odd"].reason is Reason.NOT_DIVISIBLE_BY_32
    assert auto.plan["odder"].reason is Reason.NOT_DIVISIBLE_BY_32
    assert "no multiple of 32" in auto.plan["odd"].reason.sentence
    assert auto.plan["up"].reason is not Reason.NOT_DIVISIBLE_BY_32


@pytest.mark.parametrize(
    ("k", "n", "takes"),
    [(32, 32, True), (31, 32, False), (32, 33, False), (48, 64, False)],
)
def test_divisibility_is_looked_at_on_both_sides(k, n, takes):
    linear = nn.Linear(k, n, device="meta")
    reason = get_recipe("mxfp8_rceil", "cpu").supports(linear)
    assert reason is (None if takes else Reason.NOT_DIVISIBLE_BY_32)


def test_other_dtypes_are_refused():
    linear = nn.Linear(32, 32, device="meta", dtype=torch.float16)
    reason = get_recipe("mxfp8_rceil", "cpu").supports(linear)
    assert reason is Reason.UNSUPPORTED_DTYPE


@every_mode
@pytest.mark.parametrize("shape", [(32, 64), (17, 64), (2, 5, 64), (64,)])
def test_any_number_of_rows_gives_nearly_the_exact_gradients(name, shape):
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 96), torch.randn(shape)
    expected = gradients(linear, x)
    get_recipe(name, "cpu").convert(linear)
    for found, exact in zip(gradients(linear, x), expected, strict=True):
        assert found.shape == exact.shape
        assert (found - exact).norm() < 0.1 * exact.norm()
        assert not torch.equal(found, exact) or found.dim() == 1


def test_on_full_blocks_it_is_torchaos_own_layer():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 96), torch.randn(64, 64)
    recipe = get_recipe("mxfp8_rceil", "cpu")
    theirs = MXFP8Linear(64, 96, kernel_preference=emulated())
    theirs.load_state_dict(linear.state_dict())
    recipe.convert(linear)
    pairs = zip(gradients(linear, x), gradients(theirs, x), strict=True)
    assert all(torch.equal(ours, other) for ours, other in pairs)


def emulated():
    return mx._torchao().KernelPreference.EMULATED


def test_layouts_and_dtypes_of_real_models_work():
    linear = nn.Linear(64, 96)
    get_recipe("mxfp8_rceil", "cpu").convert(linear)
    transposed = torch.randn(64, 32).t()
    assert linear(transposed).shape == (32, 96)
    mixed = linear(torch.randn(32, 64, dtype=torch.bfloat16))
    assert mixed.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(torch.randn(32, 64))
    assert output.dtype is torch.bfloat16
    output.sum().backward()
    assert linear.weight.grad.dtype is torch.float32


def test_it_compiles_into_one_graph():
    linear, x = nn.Linear(64, 96), torch.randn(17, 64)
    get_recipe("mxfp8_rceil", "cpu").convert(linear)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), linear(x))


def test_the_two_modes_are_two_recipes():
    rceil, floor = (get_recipe(f"mxfp8_{x}", "cpu") for x in ("rceil", "floor"))
    assert rceil.settings != floor.settings
    assert rceil.emulated
    assert floor.emulated
    torch.manual_seed(0)
    one, x = nn.Linear(64, 96), torch.randn(32, 64)
    other = copy.deepcopy(one)
    rceil.convert(one)
    floor.convert(other)
    assert not torch.equal(one(x), other(x))


def test_a_torchao_without_the_class_is_refused_by_name(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    mx._torchao.cache_clear()
    monkeypatch.setattr(prototypes.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"mxfp8 needs .* torchao 0.18; torchao 0"):
        get_recipe("mxfp8_rceil", "cpu")
    assert get_recipe("rowwise", "cpu").name == "rowwise"


def cast_blocks(values: torch.Tensor, *, up: bool) -> torch.Tensor:
    """Each 32 values of a row to float8 and back, in float64 and one block at a time.

    A block's scale is a power of two: the smallest that loses no value beyond 448 (up), or
    that which brings the largest value into e4m3's highest binade (OCP MX 1.0).
    """
    found = values.double().clone()
    for row in found:
        for block in row.split(32):
            largest = block.abs().max().item()
            exponent = (
                math.ceil(math.log2(largest / 448.0))
                if up
                else math.floor(math.log2(largest)) - 8
            )
            scaled = (block / 2.0**exponent).clamp(-448, 448)
            block.copy_(scaled.float().to(torch.float8_e4m3fn).double() * 2.0**exponent)
    return found


def in_decibels(exact: torch.Tensor, found: torch.Tensor) -> float:
    noise = (found.detach().double() - exact).square().sum().item()
    return 10 * math.log10(exact.square().sum().item() / noise)


@every_mode
def test_sqnr_is_that_of_an_independent_computation(name):
    torch.manual_seed(0)
    x, weight, grad = torch.randn(64, 96), torch.randn(128, 96), torch.randn(64, 128)
    linear = nn.Linear(96, 128, bias=False).bfloat16()
    linear.weight.data.copy_(weight)
    get_recipe(name, "cpu").convert(linear)
    given = x.bfloat16().requires_grad_()
    output = linear(given)
    output.backward(grad.bfloat16())
    x, weight, grad = (y.bfloat16().double() for y in (x, weight, grad))

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        up = "rceil" in name
        return cast_blocks(left, up=up) @ cast_blocks(right.t(), up=up).t()

    pairs = [
        (output, x @ weight.t(), product(x, weight.t())),
        (given.grad, grad @ weight, product(grad, weight)),
    ]
    if "wgrad_hp" not in name:
        pairs.append((linear.weight.grad, grad.t() @ x, product(grad.t(), x)))
    for found, exact, independent in pairs:
        # The results themselves are rounded to bfloat16.
        expected = in_decibels(exact, independent.bfloat16())
        assert in_decibels(exact, found) == pytest.approx(expected, abs=0.1)
        assert expected > 25
    if "wgrad_hp" in name:
        plain = (grad.bfloat16().t() @ x.bfloat16()).double()
        assert torch.equal(linear.weight.grad.double(), plain)
