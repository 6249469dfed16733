"""Blockwise float8, emulated: its numerics, what it takes, what it leaves behind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchao.prototype.blockwise_fp8_training import kernels

from fp8tune import AutoFloat8, ConfigError, Reason, TuneConfig, get_recipe
from fp8tune.recipes import blockwise, prototypes
from fp8tune.recipes.blockwise import BlockwiseLinear
from tests.helpers import all_faster

EVERY_SIZE = TuneConfig(static_filter="divisible")
LARGEST = 448.0


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    output = module(x)
    wanted = [x, *module.parameters()]
    grads = torch.autograd.grad(output.float().square().sum(), wanted)
    return [output.detach(), *grads]


def cast_blocks(values: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Each block to float8 and back, in float64 and one block at a time."""
    found = values.double().clone()
    for i in range(0, values.shape[0], height):
        for j in range(0, values.shape[1], width):
            block = found[i : i + height, j : j + width]
            scale = LARGEST / block.abs().max().clamp(min=1e-12)
            cast = (block * scale).float().to(torch.float8_e4m3fn).double()
            found[i : i + height, j : j + width] = cast / scale
    return found


def in_decibels(exact: torch.Tensor, found: torch.Tensor) -> float:
    noise = (found.detach().double() - exact.double()).square().sum()
    return 10 * math.log10(exact.double().square().sum() / noise)


def test_output_and_gradients_are_as_accurate_as_an_independent_computation() -> None:
    torch.manual_seed(0)
    x, weight, grad = (
        torch.randn(256, 128),
        torch.randn(384, 128),
        torch.randn(256, 384),
    )
    linear = nn.Linear(128, 384, bias=False)
    linear.weight.data.copy_(weight)
    get_recipe("blockwise", "cpu").convert(linear)
    given = x.clone().requires_grad_()
    output = linear(given)
    output.backward(grad)
    tiles = cast_blocks(weight, 128, 128)
    pairs = [
        (output, x @ weight.t(), cast_blocks(x, 1, 128) @ tiles.t()),
        (given.grad, grad @ weight, cast_blocks(grad, 1, 128) @ tiles),
        (
            linear.weight.grad,
            grad.t() @ x,
            cast_blocks(grad, 128, 1).t() @ cast_blocks(x, 128, 1),
        ),
    ]
    for found, exact, independent in pairs:
        expected = in_decibels(exact, independent)
        assert in_decibels(exact, found) == pytest.approx(expected, abs=0.1)
        assert expected > 25


def test_the_weights_gradient_casts_as_torchaos_reference_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 128)
    cast, inverse = kernels.torch_blockwise_scale_act_quant_rhs(x)
    theirs = cast.float() * inverse.repeat_interleave(128, 0)
    torch.testing.assert_close(blockwise._rows_cast(x.t()).t(), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(128, 256), (17, 256), (2, 5, 256), (256,)])
def test_any_number_of_rows_gives_nearly_the_exact_gradients(shape) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 128), torch.randn(shape)
    expected = gradients(linear, x)
    get_recipe("blockwise", "cpu").convert(linear)
    for found, exact in zip(gradients(linear, x), expected, strict=True):
        assert found.shape == exact.shape
        assert (found - exact).norm() < 0.1 * exact.norm()


def test_converted_trained_and_reverted(scripted_clock) -> None:
    torch.manual_seed(0)
    model, bare = nn.Sequential(nn.Linear(128, 256)), nn.Sequential(nn.Linear(128, 256))
    auto = AutoFloat8(
        model,
        "blockwise",
        warmup_steps=1,
        clock=scripted_clock(all_faster),
        config=EVERY_SIZE,
    )
    optimizer = torch.optim.SGD(auto.parameters(), lr=0.1)
    x = torch.randn(32, 128)
    losses = []
    for _ in range(4):
        loss = (auto(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert auto.frozen
    assert auto.plan["0"].recipe == "blockwise"
    assert type(model[0]) is BlockwiseLinear
    assert list(auto.state_dict()) == list(bare.state_dict())
    get_recipe("blockwise", "cpu").revert(model[0])
    assert vars(model[0]).keys() == vars(bare[0]).keys()
    bare.load_state_dict(model.state_dict())
    assert torch.equal(bare(x), model(x))


@pytest.mark.parametrize(
    ("k", "n", "takes"),
    [(128, 128, True), (127, 128, False), (128, 129, False), (192, 128, False)],
)
def test_k_and_n_must_be_multiples_of_128(k, n, takes) -> None:
    reason = get_recipe("blockwise", "cpu").supports(nn.Linear(k, n, device="meta"))
    assert reason is (None if takes else Reason.NOT_DIVISIBLE_BY_128)


def test_frozen_weights_and_inputs_take_no_gradient() -> None:
    linear = nn.Linear(128, 128, bias=False)
    get_recipe("blockwise", "cpu").convert(linear)
    linear.weight.requires_grad_(False)
    x = torch.randn(4, 128, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    assert linear.weight.grad is None


def test_it_compiles_into_one_graph() -> None:
    linear, x = nn.Linear(128, 128), torch.randn(17, 128)
    get_recipe("blockwise", "cpu").convert(linear)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), linear(x))


def test_rows_of_zeros_stay_zeros() -> None:
    linear = nn.Linear(128, 128, bias=False)
    get_recipe("blockwise", "cpu").convert(linear)
    assert torch.equal(linear(torch.zeros(3, 128)), torch.zeros(3, 128))


def test_a_torchao_without_the_casts_is_refused_by_name(monkeypatch) -> None:
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    blockwise._kernels.cache_clear()
    monkeypatch.setattr(prototypes.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="blockwise needs its blockwise casts"):
        get_recipe("blockwise", "cpu")


def test_what_the_gpu_path_uses_is_still_there() -> None:
    assert callable(blockwise._linear().fp8_blockwise_mm.apply)
