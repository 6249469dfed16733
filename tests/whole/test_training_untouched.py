"""Tuned steps equal the steps of the same model converted by hand, bit by bit."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from transformers import LlamaConfig, LlamaForCausalLM

from fp8tune import AutoFloat8, StaticFilter, TuneConfig, get_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Real timing, but everything is kept, so that the tuned model stays the converted one.
KEEP_ALL = TuneConfig(
    min_speedup=1e-9,
    max_samples=8,
    static_filter=StaticFilter.DIVISIBLE,
    include_output_layer=True,
)


class LowRank(nn.Module):
    """A frozen Linear with a trained low-rank update, as in LoRA."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 16, bias=False)
        self.up = nn.Linear(16, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def llama(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
        attn_implementation="eager",
        **options,
    )
    return LlamaForCausalLM(config).train()


def tied() -> LlamaForCausalLM:
    return llama(tie_word_embeddings=True)


def reentrant() -> LlamaForCausalLM:
    model = llama(use_cache=False)
    model.activation_checkpointing_enable({"use_reentrant": True})
    return model


def non_reentrant() -> LlamaForCausalLM:
    model = llama(use_cache=False)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def low_rank() -> LlamaForCausalLM:
    model = llama().requires_grad_(requires_grad=False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
        layer.mlp.up_proj = LowRank(layer.mlp.up_proj)
    return model


def called_twice() -> LlamaForCausalLM:
    model = llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


class Outcome(NamedTuple):
    parameters: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    optimizer: list[torch.Tensor]
    random_state: torch.Tensor


def train(model: nn.Module, *, accumulate: int = 1, autocast: bool = False) -> Outcome:
    torch.manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        for tokens in torch.randint(0, 128, (accumulate, 2, 16)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        optimizer.step()
    return outcome(model, optimizer)


def outcome(model: nn.Module, optimizer: torch.optim.Optimizer) -> Outcome:
    named = dict(model.named_parameters())
    grads = {name: p.grad for name, p in named.items() if p.grad is not None}
    moments = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return Outcome(named, grads, moments, torch.get_rng_state())


def tensors(found: Outcome) -> Iterator[torch.Tensor]:
    yield from found.parameters.values()
    yield from found.gradients.values()
    yield from found.optimizer
    yield found.random_state


def assert_bit_equal(tuned: Outcome, by_hand: Outcome) -> None:
    assert list(tuned.parameters) == list(by_hand.parameters)
    assert list(tuned.gradients) == list(by_hand.gradients)
    for a, b in zip(tensors(tuned), tensors(by_hand), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def convert_by_hand(model: nn.Module, fqns: list[str], recipe: str) -> nn.Module:
    if recipe == "bf16":
        for fqn in fqns:
            get_recipe("bf16", "cpu").convert(model.get_submodule(fqn))
        return model
    config = replace(
        Float8LinearConfig.from_recipe_name(recipe), pad_inner_dim=True, emulate=True
    )
    return convert_to_float8_training(
        model, config=config, module_filter_fn=lambda _, fqn: fqn in fqns
    )


@pytest.mark.parametrize("recipe", ["bf16", "rowwise"])
@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param(llama, {}, id="plain"),
        pytest.param(llama, {"accumulate": 2}, id="gradient accumulation"),
        pytest.param(llama, {"autocast": True}, id="bf16 autocast"),
        pytest.param(reentrant, {}, id="reentrant checkpointing"),
        pytest.param(non_reentrant, {}, id="non-reentrant checkpointing"),
        pytest.param(tied, {}, id="tied weights"),
        pytest.param(low_rank, {}, id="frozen base with low-rank updates"),
        pytest.param(called_twice, {}, id="a Linear called twice"),
    ],
)
def test_three_tuned_steps_equal_three_steps_converted_by_hand(
    build: Callable[[], nn.Module], options: dict[str, object], recipe: str
) -> None:
    bare = build()
    model = copy.deepcopy(bare)
    auto = AutoFloat8(model, recipe=recipe, warmup_steps=2, config=KEEP_ALL)
    tuned = train(auto, **options)
    assert auto.frozen
    assert auto.plan.converted_fqns
    by_hand = convert_by_hand(bare, auto.plan.converted_fqns, recipe)
    assert_bit_equal(tuned, train(by_hand, **options))


def test_a_scaled_loss_is_left_alone() -> None:
    def step(model: nn.Module) -> Outcome:
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for tokens in torch.randint(0, 128, (3, 2, 16)):
            optimizer.zero_grad()
            scaler.scale(model(input_ids=tokens, labels=tokens).loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return outcome(model, optimizer)

    bare = llama()
    auto = AutoFloat8(
        copy.deepcopy(bare), recipe="bf16", warmup_steps=2, config=KEEP_ALL
    )
    tuned = step(auto)
    assert_bit_equal(
        tuned, step(convert_by_hand(bare, auto.plan.converted_fqns, "bf16"))
    )


def test_recomputed_layers_are_timed_with_two_forwards() -> None:
    for build in (reentrant, non_reentrant):
        auto = AutoFloat8(build(), recipe="bf16", warmup_steps=2, config=KEEP_ALL)
        train(auto)
        ((signature, calls),) = auto.plan["model.layers.1.mlp.up_proj"].signatures
        assert signature.recompute
        assert signature.grad_input
        assert signature.grad_weight
        assert calls == 2
        ((head, _),) = auto.plan["lm_head"].signatures
        assert not head.recompute


def test_frozen_layers_are_timed_without_the_gemms_that_training_skips() -> None:
    auto = AutoFloat8(low_rank(), recipe="bf16", warmup_steps=2, config=KEEP_ALL)
    train(auto)
    first = auto.plan["model.layers.0.self_attn.q_proj.base"].signatures[0][0]
    second = auto.plan["model.layers.1.self_attn.q_proj.base"].signatures[0][0]
    assert not first.grad_input
    assert not first.grad_weight
    assert second.grad_input
    assert not second.grad_weight


def test_a_linear_called_twice_counts_both_calls() -> None:
    auto = AutoFloat8(called_twice(), recipe="bf16", warmup_steps=2, config=KEEP_ALL)
    train(auto)
    ((_, once),) = auto.plan["model.layers.0.self_attn.q_proj"].signatures
    ((_, twice),) = auto.plan["model.layers.0.mlp.up_proj"].signatures
    assert (once, twice) == (2, 4)
