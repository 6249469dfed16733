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

from fp8tune import AutoFloat8, PhaseError, Reason, TuneConfig, get_recipe
from fp8tune.compiling.dynamo import CompiledPlans, _on_compilation
from fp8tune.model.passes import at_end_of_backward
from fp8tune.recipes import BFloat16Linear
from tests.helpers import all_faster, all_slower

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_nothing_converted_wins_where_every_plan_is_slower(
    scripted_clock: type,
) -> None:
    auto = auto_of(scripted_clock(all_faster, lambda names: 100.0 + len(names)))
    train(auto)
    assert auto.plan.converted_fqns == []


def recompile_limit() -> int:
    """Dynamo's limit once no trial of another test raises it, in a cycle of references."""
    gc.collect()
    return torch._dynamo.config.recompile_limit


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
    limit = recompile_limit()
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
    assert torch._dynamo.config.recompile_limit == limit


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
    assert len(auto.plan.converted_fqns) == 128


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
    auto(tokens).square().mean().backward()
    auto.zero_grad(set_to_none=to_none)
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
    assert (mixed == 0) == to_none


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


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_an_early_freeze_keeps_what_layers_measured_alone(
    scripted_clock: type, steps: int
) -> None:
    """Nothing was compared yet, so nothing is called slower."""
    auto = auto_of(scripted_clock(all_faster, lambda names: 100.0), timing="eager")
    for _ in range(steps):
        step(auto)
    plan = auto.freeze()
    assert auto.phase == "frozen"
    assert len(plan.converted_fqns) == 9
    assert {x.reason for x in plan.decisions} == {Reason.FASTER}
    assert auto.module.layers[0]._compiled_call_impl is not None


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_a_small_budget_keeps_what_layers_measured_alone(
    scripted_clock: type, steps: int
) -> None:
    """A measured 2x is not turned into nothing by a trial that had no time."""
    clock = scripted_clock(all_faster, lambda names: 100.0 - len(names))
    auto = auto_of(clock, timing="eager", trial_steps=steps)
    train(auto)
    assert len(auto.plan.converted_fqns) == 9


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
    assert plan.converted_fqns


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
    limit = recompile_limit()
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    for _ in range(2):
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
    plans.begin_call()
    for flag in (True, False):
        plans.activate(flag)
        compiled(torch.ones(2), flag)
    plans.end_call()
    assert plans.count == 2
    with Count() as count:
        plans.keep_only(True)
        compiled(torch.ones(2), True)
        assert count.codes == []
        compiled(torch.ones(2), False)
        assert len(count.codes) == 1
    plans.close()


def test_a_trial_whose_steps_never_end_gives_up_and_says_so(
    scripted_clock: type,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients were reset before and never are again: one endless accumulation."""
    monkeypatch.setattr("fp8tune.trial.steps._MOST_FORWARDS", 20)
    auto = auto_of(scripted_clock(all_faster, lambda names: 100.0), timing="eager")
    for _ in range(4):
        step(auto)
    for _ in range(30):
        auto(torch.arange(16).view(2, 8)).square().mean().backward()
    assert auto.frozen
    assert len(auto.plan.converted_fqns) == 9
    assert any("makes no progress" in x for x in caplog.messages)


@pytest.mark.parametrize("stray", [10, 40])
def test_one_stray_zero_grad_does_not_keep_the_trial_from_ending(
    scripted_clock: type, stray: int
) -> None:
    """Cleared between forward and backward, and once more elsewhere."""
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    optimizer = torch.optim.SGD(auto.parameters(), lr=0.001)
    for number in range(200):
        loss = auto(torch.arange(16).view(2, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number == stray:
            optimizer.zero_grad()
    assert auto.frozen


def test_a_layer_frozen_in_mid_trial_does_not_keep_it_from_ending(
    scripted_clock: type,
) -> None:
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    for number in range(200):
        auto(torch.arange(16).view(2, 8)).square().mean().backward()
        if number == 10:
            auto.module.embed.weight.requires_grad_(False)
        for parameter in auto.parameters():
            if parameter.requires_grad:
                parameter.grad = None
    assert auto.frozen


def test_the_trials_of_two_models_overlap(scripted_clock: type) -> None:
    first = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    limit = recompile_limit()
    second = AutoFloat8(
        stack(2),
        recipe="bf16",
        warmup_steps=1,
        compile=compile_blocks,
        clock=scripted_clock(all_faster, without("w1")),
        config=TuneConfig(timing="eager"),
    )
    for _ in range(200):
        step(first)
        step(second)
    assert first.frozen
    assert second.frozen
    assert first.plan["layers.0.wq"].verdict == "reference"
    assert second.plan["layers.0.w1"].verdict == "reference"
    assert torch._dynamo.config.recompile_limit < limit + 50


def test_before_the_trial_the_log_says_what_it_may_take(
    scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    for _ in range(3):
        step(auto)
    line = next(x for x in caplog.messages if x.startswith("trying about"))
    assert "at most 400 of them and 600 s, compiling included" in line


def evaluate(auto: AutoFloat8) -> bytes:
    """The outputs of an evaluation, which differ with the layers that are converted."""
    auto.eval()
    with torch.no_grad():
        first, second = (auto(torch.arange(16).view(2, 8)) for _ in range(2))
    auto.train()
    assert torch.equal(first, second)
    return first.numpy().tobytes()


@pytest.mark.parametrize(
    "compile", [compile_blocks, {"backend": "eager"}], ids=["blocks", "whole"]
)
def test_an_evaluation_in_mid_trial_runs_and_compiles_the_leader_only(
    scripted_clock: type, compile: object
) -> None:
    """Evaluated after every step, whatever plan that step ran."""
    auto = auto_of(scripted_clock(all_faster, without("wq")), compile, timing="eager")
    leaders: list[bytes] = []
    active: set[tuple[type, ...]] = set()
    while not auto.frozen:
        step(auto)
        if auto.phase == "trial":
            before = [type(x) for x in auto.module.modules()]
            with Count() as count:
                leader = evaluate(auto)
            assert [type(x) for x in auto.module.modules()] == before
            # Nothing is compiled unless another plan leads.
            assert len(count.codes) == (leader not in leaders)
            leaders.append(leader)
            active.add(tuple(type(x) for x in auto.module.layers[0].children()))
    assert len(active) >= 4
    # At first the per-layer plan led, then another, and in the end the one that was kept.
    assert leaders[0] != leaders[-1] == evaluate(auto)
    assert len(set(leaders)) == 3


def test_layers_stay_what_they_are_between_forward_and_backward(
    scripted_clock: type,
) -> None:
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    while auto.phase != "trial":
        step(auto)
    outputs: set[bytes] = set()
    for _ in range(12):
        loss = auto(torch.arange(16).view(2, 8))
        assert evaluate(auto) == loss.detach().numpy().tobytes()
        outputs.add(evaluate(auto))
        loss.square().mean().backward()
        auto.zero_grad()
    assert len(outputs) >= 2


class Batch:
    """What pytree does not know; the tensors of a batch are made from it in the model."""

    def __init__(self, rows: int) -> None:
        self.rows = rows


class Generating(nn.Module):
    """Makes its own input, so that nothing tells the size of a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w1, self.w2 = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.w2(self.w1(torch.ones(batch.rows, 32)).relu())


def w2_loses(names: set[str]) -> float:
    """Of a step of 100 ms w1 saves 1.5 and w2 costs 1."""
    return 100 - 1.5 * ("w1" in names) + ("w2" in names)


def generating(
    clock: object, rows: Callable[[int], int], caplog: pytest.LogCaptureFixture
) -> tuple[AutoFloat8, list[str]]:
    """A frozen model that was trained on so many rows in each step, and the warnings."""
    torch._dynamo.reset()
    auto = AutoFloat8(
        Generating(),
        recipe="bf16",
        warmup_steps=3,
        compile={"backend": "eager"},
        clock=clock,
        config=TuneConfig(
            timing="eager", static_filter="divisible", include_output_layer=True
        ),
    )
    for number in range(300):
        if not auto.frozen:
            auto(Batch(rows(number))).square().mean().backward()
            auto.zero_grad()
    assert auto.frozen
    return auto, [x for x in caplog.messages if "plans cannot be compared" in x]


def test_where_the_size_of_steps_cannot_be_told_the_per_layer_plan_stays(
    scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    """In the steps w2 seems to lose, since nobody knows which of them were long."""
    clock = scripted_clock(all_faster, w2_loses)
    auto, said = generating(clock, lambda number: 30 + 7 * number % 21, caplog)
    assert len(said) == 1
    assert "what layers measured alone is kept" in said[0]
    assert auto.plan.converted_fqns == ["w1", "w2"]
    assert {x.reason for x in auto.plan.decisions} == {Reason.FASTER}
    assert auto.plan.trials == ()


def test_steps_of_one_size_are_compared_without_knowing_it(
    scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    clock = scripted_clock(all_faster, w2_loses)
    auto, said = generating(clock, lambda number: 32, caplog)
    assert said == []
    assert auto.plan.converted_fqns == ["w1"]


def test_a_batch_in_an_object_tells_its_size(
    scripted_clock: type,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where pytree does not look into it."""

    def with_rows(batch: Batch, rows: int) -> None:
        batch.rows, batch.tokens = rows, torch.ones(rows)

    monkeypatch.setattr(Batch, "__init__", with_rows)
    clock = scripted_clock(all_faster, w2_loses)
    auto, said = generating(clock, lambda number: 30 + 7 * number % 21, caplog)
    assert said == []
    assert auto.plan.trials != ()


def test_a_freeze_between_forward_and_backward_of_a_trial_is_refused(
    scripted_clock: type,
) -> None:
    """Between forward and backward the layers must stay what the forward saved."""
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    for _ in range(6):
        step(auto)
    assert auto.phase == "trial"
    loss = auto(torch.arange(16).view(2, 8)).square().mean()
    before = [type(x) for x in auto.module.modules()]
    with pytest.raises(PhaseError, match="1 forward passes wait for their backward"):
        auto.freeze()
    assert auto.phase == "trial"
    assert [type(x) for x in auto.module.modules()] == before
    loss.backward()
    auto.zero_grad()
    auto.freeze()
    assert auto.phase == "frozen"


def test_a_parameter_that_is_never_used_ends_no_step(scripted_clock: type) -> None:
    """Its gradient is None all the time, also between two micro-batches."""
    auto = auto_of(scripted_clock(all_faster, without("wq")), timing="eager")
    auto.module.unused = nn.Parameter(torch.ones(3))
    tokens = torch.arange(16).view(2, 8)
    ran: set[tuple[type, ...]] = set()
    while not auto.frozen:
        step_of: set[tuple[type, ...]] = set()
        for _ in range(2):
            auto(tokens).square().mean().backward()
            step_of.add(tuple(type(x) for x in auto.module.layers[0].children()))
        assert len(step_of) == 1
        ran |= step_of
        auto.zero_grad()
    assert len(ran) >= 4
