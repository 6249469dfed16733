"""Trial plans in real training steps: compilation, gradients, phases, ranks."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, Reason, TuneConfig, get_recipe
from fp8tune.dynamo import CompiledPlans, _on_compilation
from fp8tune.passes import at_end_of_backward
from fp8tune.recipes import BFloat16Linear

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fp8tune.records import Signature


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Times are scripted, and tiny GEMMs only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(32, 32, bias=False)
        self.w1 = nn.Linear(32, 64, bias=False)
        self.w2 = nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.wq(x)
        return x + self.w2(torch.relu(self.w1(x)))


class Stack(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.layers:
            x = block(x)
        return x


def stack(blocks: int = 3) -> Stack:
    torch.manual_seed(0)
    return Stack(blocks)


def all_faster(signature: Signature, variant: str) -> float:
    return 1.0 if variant == "reference" else 0.5


def all_slower(signature: Signature, variant: str) -> float:
    return 0.5 if variant == "reference" else 1.0


def without(bad: str) -> Callable[[set[str]], float]:
    """Every role gains 10 ms of 100, but this one costs 20."""
    return lambda names: 100.0 - sum(-20 if x.endswith(bad) else 10 for x in names)


def compile_blocks(model: nn.Module) -> None:
    for block in model.layers:
        block.compile(backend="eager", fullgraph=True)


def step(model: nn.Module) -> None:
    model(torch.arange(16).view(2, 8)).square().mean().backward()
    model.zero_grad()


def train(auto: AutoFloat8, most: int = 300) -> int:
    for number in range(most):
        if auto.phase == "frozen":
            return number
        step(auto)
    raise AssertionError(f"not frozen after {most} steps")


def auto_of(
    clock: object, compile: object = compile_blocks, **options: object
) -> AutoFloat8:
    torch._dynamo.reset()
    return AutoFloat8(
        stack(options.pop("blocks", 3)),
        recipe="bf16",
        warmup_steps=1,
        compile=compile,
        clock=clock,
        config=TuneConfig(**options),
    )


def test_the_trial_overrules_what_layers_measured_alone(scripted_clock: type) -> None:
    """Scripted clocks: alone everything is faster, in the step wq is not."""
    auto = auto_of(scripted_clock(all_faster, without("wq")))
    train(auto)
    decision = auto.plan["layers.2.wq"]
    assert decision.reason is Reason.SLOWER_IN_TRAINING
    assert {type(x.wq) for x in auto.module.layers} == {nn.Linear}
    assert {type(x.w1) for x in auto.module.layers} == {BFloat16Linear}
    assert "layers.{}.w1, layers.{}.w2" in str(auto.plan)


def test_a_layer_that_loses_alone_can_win_in_the_step(scripted_clock: type) -> None:
    auto = auto_of(scripted_clock(all_slower, without("wq")))
    train(auto)
    assert auto.plan["layers.0.w1"].reason is Reason.FASTER_IN_TRAINING
    assert auto.plan["layers.0.w1"].recipe == "bf16"
    assert auto.plan["layers.0.wq"].reason is Reason.SLOWER


def test_what_makes_no_difference_in_the_step_is_left_and_called_unclear(
    scripted_clock: type,
) -> None:
    auto = auto_of(
        scripted_clock(
            all_faster,
            lambda names: 100.0 - sum(10 for x in names if not x.endswith("wq")),
        )
    )
    train(auto)
    decision = auto.plan["layers.1.wq"]
    assert decision.reason is Reason.UNCLEAR_IN_TRAINING
    assert decision.recipe is None
    assert "as long without converting it" in decision.reason.sentence


def test_nothing_converted_wins_where_every_plan_is_slower(
    scripted_clock: type,
) -> None:
    auto = auto_of(scripted_clock(all_faster, lambda names: 100.0 + len(names)))
    train(auto)
    assert auto.plan.float8_fqns == []


class Count:
    """Counts Dynamo's compilations while it is open."""

    def __enter__(self) -> Count:
        self.codes: list[weakref.ref] = []
        note = lambda code, compiled: self.codes.append(weakref.ref(compiled)) and None  # noqa: E731
        self._hook = _on_compilation(note)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(x() is not None for x in self.codes)


@pytest.mark.parametrize(
    "compile",
    [
        compile_blocks,
        {"backend": "eager", "fullgraph": True},
        lambda m: torch.compile(m, backend="eager", fullgraph=True),
    ],
    ids=["blocks", "whole", "returned"],
)
def test_each_plan_is_compiled_once_and_none_after_the_freeze(
    scripted_clock: type, compile: object
) -> None:
    auto = auto_of(scripted_clock(all_faster, without("wq")), compile, timing="eager")
    limit = torch._dynamo.config.recompile_limit
    with Count() as count:
        train(auto)
        plans = len(auto.plan.trials)
        assert plans >= 5
        assert len(count.codes) == plans
        for _ in range(3):
            step(auto)
        assert len(count.codes) == plans
        # The losers' code is gone, and the user may compile as often as before.
        assert count.alive == 1
    assert torch._dynamo.config.recompile_limit == limit + plans - 1


def test_the_frozen_model_can_still_be_recompiled(scripted_clock: type) -> None:
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    train(auto)
    auto.eval()
    with torch.no_grad():
        auto(torch.arange(16).view(2, 8))
    auto.train()
    step(auto)


def test_64_blocks_stay_under_the_recompile_limit_with_fullgraph(
    scripted_clock: type,
) -> None:
    auto = auto_of(scripted_clock(all_faster, without("w2")), blocks=64, timing="eager")
    train(auto)
    assert len(auto.plan.float8_fqns) == 128


def test_gradients_are_those_of_the_plan_that_was_active(scripted_clock: type) -> None:
    auto = auto_of(scripted_clock(all_faster, without("w1")), timing="eager")
    other = copy.deepcopy(stack())
    compile_blocks(other)
    recipe = get_recipe("bf16", "cpu")
    tokens = torch.arange(16).view(2, 8)
    seen: set[tuple[bool, ...]] = set()
    for _ in range(60):
        auto.zero_grad()
        other.zero_grad()
        auto(tokens).square().mean().backward()
        for mine, theirs in zip(auto.module.modules(), other.modules(), strict=True):
            converted = type(theirs) is BFloat16Linear
            if converted != (type(mine) is BFloat16Linear):
                (recipe.revert if converted else recipe.convert)(theirs)
        seen.add(
            tuple(type(x) is BFloat16Linear for x in auto.module.layers[0].children())
        )
        other(tokens).square().mean().backward()
        for a, b in zip(auto.parameters(), other.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    assert len(seen) >= 5


def test_the_same_role_never_differs_between_blocks(scripted_clock: type) -> None:
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    for _ in range(60):
        step(auto)
        patterns = {tuple(type(x) for x in b.children()) for b in auto.module.layers}
        assert len(patterns) == 1


@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_of_gradient_accumulation_runs_one_plan(
    scripted_clock: type, *, to_none: bool
) -> None:
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    tokens = torch.arange(16).view(2, 8)
    step(auto)
    mixed = 0
    for _ in range(120):
        patterns = set()
        for _ in range(3):
            auto(tokens).square().mean().backward()
            patterns.add(type(auto.module.layers[0].wq))
        mixed += len(patterns) > 1
        auto.zero_grad(set_to_none=to_none)
    assert auto.frozen
    # Where gradients never become None, accumulation cannot be told from steps.
    assert (mixed <= 1) == to_none


def test_evaluation_during_the_trial_is_passed_through(scripted_clock: type) -> None:
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    for _ in range(5):
        step(auto)
    assert auto.phase == "trial"
    assert "trying" in auto.report()
    before = [type(x) for x in auto.module.modules()]
    with torch.no_grad():
        for _ in range(5):
            auto(torch.arange(16).view(2, 8))
    assert [type(x) for x in auto.module.modules()] == before


def test_freeze_during_the_trial_takes_the_best_so_far(scripted_clock: type) -> None:
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    for _ in range(4):
        step(auto)
    plan = auto.freeze()
    assert auto.phase == "frozen"
    assert plan.float8_fqns == []
    assert auto.module.layers[0]._compiled_call_impl is not None


def test_without_compile_there_is_no_trial_unless_asked_for(
    scripted_clock: type,
) -> None:
    off = auto_of(scripted_clock(all_faster), compile=False)
    assert train(off) == 2
    on = auto_of(
        scripted_clock(all_faster, without("wq")), compile=False, trial_steps=200
    )
    assert train(on) > 20
    assert "forward" not in vars(on.module)


def test_no_trial_where_none_is_wanted(scripted_clock: type) -> None:
    auto = auto_of(scripted_clock(all_faster), trial_steps=0, timing="eager")
    assert train(auto) == 2
    assert auto.plan.trials == ()


def test_an_explicit_loop_runs_the_whole_trial(scripted_clock: type) -> None:
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    plan = auto.trial(lambda: step(auto))
    assert auto.phase == "frozen"
    assert plan.float8_fqns


def test_the_last_line_says_what_the_trial_cost(
    scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    train(auto)
    last = caplog.messages[-1]
    assert "training steps in" in last
    assert "were lost to slower plans" in last


def test_a_trial_that_is_given_up_leaves_nothing(scripted_clock: type) -> None:
    limit = torch._dynamo.config.recompile_limit
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    for _ in range(5):
        step(auto)
    assert auto.phase == "trial"
    assert torch._dynamo.config.recompile_limit > limit
    with Count() as count:
        step(auto)
        assert count.codes
        del auto
        torch._dynamo.reset()
        assert count.alive == 0
    assert torch._dynamo.config.recompile_limit == limit


def test_the_end_of_backward_is_after_every_gradient() -> None:
    """Fails loudly when torch moves what at_end_of_backward asks."""
    weight = torch.ones(1, requires_grad=True)
    seen: list[bool] = []
    output = weight.sin()
    output.register_hook(
        lambda _: (
            at_end_of_backward(lambda: seen.append(weight.grad is not None)) and None
        )
    )
    output.backward()
    assert seen == [True]


def test_dynamo_still_tells_and_forgets_compilations() -> None:
    """Fails loudly when torch moves what CompiledPlans asks."""

    def double(x: torch.Tensor, flag: object) -> torch.Tensor:
        return x * 2 if flag else x * 3

    plans = CompiledPlans()
    compiled = torch.compile(double, backend="eager", dynamic=False)
    for flag in (True, False):
        plans.activate(flag)
        compiled(torch.ones(2), flag)
    assert plans.count == 2
    with Count() as count:
        plans.keep_only(True)
        compiled(torch.ones(2), True)
        assert count.codes == []
        compiled(torch.ones(2), False)
        assert len(count.codes) == 1
    plans.close()
