"""After the freeze the model is what torchao would have made of it by hand."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from fp8tune import AutoFloat8, StaticFilter, TuneConfig
from fp8tune.model.kept import Kept
from tests.helpers import graph_texts, hooks_of

if TYPE_CHECKING:
    from fp8tune.decision.records import Signature

DIVISIBLE = TuneConfig(static_filter=StaticFilter.DIVISIBLE)


def wide_is_faster(signature: Signature, variant: str) -> float:
    wide = signature.shape.n >= 64
    return 1.0 if (variant == "reference") == wide else 0.5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(32, 24))


def step(model: nn.Module, x: torch.Tensor | None = None) -> None:
    x = torch.randn(16, 32) if x is None else x
    model(x).square().mean().backward()


@pytest.fixture
def frozen(scripted_clock: type) -> AutoFloat8:
    auto = AutoFloat8(
        blocks(), warmup_steps=1, config=DIVISIBLE, clock=scripted_clock(wide_is_faster)
    )
    step(auto)
    step(auto)
    assert auto.frozen
    return auto


def by_hand(fqns: list[str]) -> nn.Module:
    config = replace(
        Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True, emulate=True
    )
    return convert_to_float8_training(
        blocks(), config=config, module_filter_fn=lambda _, fqn: fqn in fqns
    )


def test_kept_layers_are_float8_and_the_others_plain(frozen: AutoFloat8) -> None:
    assert frozen.plan.converted_fqns == ["0.up", "1.up"]
    types = {name: type(m) for name, m in frozen.module.named_modules()}
    assert types["0.up"] is types["1.up"]
    assert issubclass(types["0.up"], Float8Linear)
    assert types["0.down"] is types["1.down"] is types["2"] is nn.Linear


def test_no_hook_is_left(frozen: AutoFloat8) -> None:
    assert hooks_of(frozen.module) == hooks_of(frozen) == {}


def test_reverted_layers_have_no_attribute_of_float8(frozen: AutoFloat8) -> None:
    assert vars(frozen.module[0].down).keys() == vars(nn.Linear(1, 1)).keys()


def test_state_dict_has_the_keys_of_the_bare_model(frozen: AutoFloat8) -> None:
    bare = blocks()
    assert list(frozen.state_dict()) == list(bare.state_dict())
    names = [name for name, _ in bare.named_parameters()]
    assert [name for name, _ in frozen.named_parameters()] == names
    modules = [name for name, _ in bare.named_modules()]
    assert [name for name, _ in frozen.named_modules()] == modules


def test_no_captured_tensor_is_alive(
    scripted_clock: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[weakref.ref[torch.Tensor]] = []
    put = Kept.put

    def watched(self: Kept, shape: object, tensor: torch.Tensor) -> None:
        put(self, shape, tensor)
        captured.append(weakref.ref(tensor))

    monkeypatch.setattr(Kept, "put", watched)
    clock = scripted_clock(wide_is_faster)
    auto = AutoFloat8(blocks(), warmup_steps=1, config=DIVISIBLE, clock=clock)
    step(auto)
    assert captured
    assert all(ref() is not None for ref in captured)
    auto.freeze()
    gc.collect()
    assert all(ref() is None for ref in captured)


def living_tensors() -> list[torch.Tensor]:
    # By type, since isinstance would trip deprecation warnings of torch's own objects.
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


def test_operands_of_real_timing_are_freed() -> None:
    auto = AutoFloat8(
        blocks(), recipe="bf16", warmup_steps=1, config=TuneConfig(max_samples=8)
    )
    step(auto)
    gc.collect()
    before = {id(x) for x in living_tensors()}
    auto.freeze()
    gc.collect()
    assert [x for x in living_tensors() if id(x) not in before] == []


def texts_of(model: nn.Module) -> list[str]:
    def run(backend: object) -> None:
        torch.compile(model, fullgraph=True, backend=backend)(torch.ones(16, 32))

    return graph_texts(run)


def test_dynamo_graph_equals_that_of_the_model_converted_by_hand(
    frozen: AutoFloat8,
) -> None:
    expected = texts_of(by_hand(frozen.plan.converted_fqns))
    assert texts_of(frozen.module) == expected
    assert len(expected) == 1


def test_the_frozen_wrapper_compiles_without_a_break(frozen: AutoFloat8) -> None:
    (text,) = texts_of(frozen)
    assert "matmul_with_hp_or_float8_args" in text


def test_training_goes_on_equal_to_the_model_converted_by_hand(
    frozen: AutoFloat8,
) -> None:
    other = by_hand(frozen.plan.converted_fqns)
    other.load_state_dict(frozen.state_dict())
    frozen.zero_grad()
    x = torch.randn(17, 32)
    step(frozen, x)
    step(other, x)
    for a, b in zip(frozen.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_frozen_model_can_be_copied_and_saved(
    frozen: AutoFloat8, tmp_path: object
) -> None:
    twin = copy.deepcopy(frozen)
    assert twin.module is not frozen.module
    x = torch.randn(16, 32)
    assert torch.equal(twin(x), frozen(x))
    torch.save(frozen.state_dict(), tmp_path / "model.pt")
    bare = blocks()
    bare.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(bare[0].up.weight, frozen.module[0].up.weight)
