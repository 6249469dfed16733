"""AutoFloat8 in a training loop: phases, what counts as a step, what is passed through."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fp8tune import AutoFloat8, PhaseError, Reason, TuneConfig
from fp8tune.model.passes import in_backward
from fp8tune.recipes import BFloat16Linear
from tests.helpers import all_faster, all_slower

if TYPE_CHECKING:
    from fp8tune.decision.records import Signature


def step(model: nn.Module, rows: int = 8) -> None:
    model(torch.randn(rows, 32)).square().mean().backward()


@pytest.fixture
def clock(scripted_clock: type) -> object:
    return scripted_clock(all_faster)


@pytest.fixture
def auto(clock: object) -> AutoFloat8:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    return AutoFloat8(model, recipe="bf16", warmup_steps=2, clock=clock)


def test_candidates_run_converted_from_the_first_step(auto: AutoFloat8) -> None:
    assert auto.phase == "warmup"
    assert type(auto.module[0]) is BFloat16Linear
    assert auto.plan is None
    assert "0 of 2 warmup steps" in auto.report()


def test_the_freeze_comes_at_the_forward_after_the_last_warmup_step(
    auto: AutoFloat8,
) -> None:
    step(auto)
    step(auto)
    assert not auto.frozen
    step(auto)
    assert auto.frozen
    assert auto.report() == str(auto.plan)


def test_calling_the_model_itself_is_the_same(auto: AutoFloat8) -> None:
    for _ in range(3):
        step(auto.module)
    assert auto.frozen


def test_evaluation_counts_for_nothing(auto: AutoFloat8) -> None:
    step(auto)
    auto.eval()
    assert not auto.module.training
    for _ in range(5):
        auto(torch.randn(16, 32))  # with gradients that nobody asks for
    auto.train()
    with torch.no_grad():
        for _ in range(5):
            auto(torch.randn(64, 32))
    step(auto)
    assert not auto.frozen
    auto.freeze()
    assert {x.shape.m for x, _ in auto.plan["0"].signatures} == {8}


def test_training_in_eval_mode_is_training(auto: AutoFloat8) -> None:
    auto.eval()
    for _ in range(3):
        step(auto)
    assert auto.frozen
    assert auto.plan.converted_fqns == ["0", "2"]


def test_forwards_before_one_backward_are_one_step(auto: AutoFloat8) -> None:
    for _ in range(2):
        (auto(torch.randn(8, 32)).sum() + auto(torch.randn(8, 32)).sum()).backward()
        assert not auto.frozen
    step(auto)
    ((_, calls),) = auto.plan["0"].signatures
    assert calls == 4


def test_no_freeze_while_a_backward_is_outstanding(auto: AutoFloat8) -> None:
    """As in a 1F1B pipeline, whose next forward comes before the last backward."""
    pending = auto(torch.randn(8, 32)).sum()
    for _ in range(4):
        following = auto(torch.randn(8, 32)).sum()
        pending.backward()
        pending = following
    assert not auto.frozen
    with pytest.raises(PhaseError, match="1 forward passes wait for their backward"):
        auto.freeze()
    pending.backward()
    step(auto)
    assert auto.frozen


def test_an_abandoned_forward_does_not_hold_up_the_freeze(auto: AutoFloat8) -> None:
    auto(torch.randn(8, 32))
    step(auto)
    step(auto)
    step(auto)
    assert auto.frozen


def test_forwards_without_backward_are_warned_about_once(
    auto: AutoFloat8, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(30):
        auto(torch.randn(8, 32))
    (warning,) = caplog.records
    assert "10 forwards with gradients in a row, but none of their" in warning.message
    assert "to be run under torch.no_grad()" in warning.message


def test_outputs_that_are_kept_are_named_as_the_cause(
    auto: AutoFloat8, caplog: pytest.LogCaptureFixture
) -> None:
    outputs = [auto(torch.randn(8, 32)) for _ in range(30)]
    (warning,) = caplog.records
    assert "9 of their results are kept and wait for a backward" in warning.message
    del outputs


def test_freeze_before_any_step_keeps_high_precision(
    auto: AutoFloat8, caplog: pytest.LogCaptureFixture
) -> None:
    plan = auto.freeze()
    assert {x.reason for x in plan.decisions} == {Reason.NEVER_CALLED}
    assert type(auto.module[0]) is nn.Linear
    assert "converted 0 of 2 Linears" in caplog.text
    assert auto.freeze() is plan


def test_zero_converted_is_a_warning(
    scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    clock = scripted_clock(all_slower)
    auto = AutoFloat8(nn.Linear(32, 32), recipe="bf16", warmup_steps=1, clock=clock)
    step(auto)
    auto.freeze()
    assert [x.levelname for x in caplog.records] == ["WARNING"]
    assert type(auto.module) is nn.Linear


def test_a_debug_model_trains_on_after_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 9))
    auto = AutoFloat8(model, recipe="rowwise")
    assert auto.frozen
    (warning,) = caplog.records
    assert re.search("1 small kn, 1 not divisible by 16", warning.message)
    step(auto)
    assert auto.plan.converted_fqns == []
    assert not model._forward_pre_hooks


def test_a_debug_model_is_compiled_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(32, 9))
    AutoFloat8(model, recipe="rowwise", compile={"backend": "eager"})
    assert model._compiled_call_impl is not None


def test_a_name_that_matches_nothing_is_warned_about(
    clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.ModuleDict({"head": nn.Linear(32, 32)})
    auto = AutoFloat8(
        model,
        recipe="bf16",
        filter_fqns=["output", "head", "auto_filter_small_kn"],
        clock=clock,
    )
    assert "'output', which is in the name of no Linear" in caplog.text
    assert "'head', which" not in caplog.text
    assert auto.plan["head"].reason is Reason.FILTERED_BY_NAME


def test_reference_runs_everything_in_high_precision_inside(auto: AutoFloat8) -> None:
    for _ in range(3):
        step(auto)
    with auto.reference():
        assert type(auto.module[0]) is type(auto.module[2]) is nn.Linear
    assert type(auto.module[0]) is type(auto.module[2]) is BFloat16Linear
    with pytest.raises(ZeroDivisionError, match="division"), auto.reference():
        _ = 1 / 0
    assert type(auto.module[0]) is BFloat16Linear


def test_attributes_of_the_model_stay_reachable(clock: object) -> None:
    model = nn.Linear(32, 32)
    model.config = SimpleNamespace(vocab=7)
    auto = AutoFloat8(model, recipe="bf16", clock=clock)
    assert auto.config.vocab == 7
    assert auto.module is model
    with pytest.raises(AttributeError, match="has no attribute 'confg'"):
        _ = auto.confg


def test_checkpoints_move_between_wrapped_and_bare(auto: AutoFloat8) -> None:
    bare = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    auto.load_state_dict(bare.state_dict())
    outer = nn.ModuleDict({"inner": auto})
    assert list(outer.state_dict()) == [f"inner.{name}" for name in bare.state_dict()]
    bare.load_state_dict(auto.state_dict())
    outer.load_state_dict({f"inner.{k}": v for k, v in bare.state_dict().items()})
    assert torch.equal(auto.module[0].weight, bare[0].weight)


def test_hooks_on_state_dict_that_are_set_on_the_wrapper_run(auto: AutoFloat8) -> None:
    seen: list[str] = []
    auto.register_state_dict_pre_hook(lambda *_: seen.append("before saving"))
    auto.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    auto.register_load_state_dict_pre_hook(lambda *_: seen.append("before loading"))
    auto.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    auto.load_state_dict(auto.module.state_dict())
    assert seen == ["before saving", "saved", "before loading", "loaded"]


def test_moving_and_casting_the_wrapper_moves_the_model(auto: AutoFloat8) -> None:
    auto.to(torch.float64)
    assert auto.module[0].weight.dtype is torch.float64
    assert next(auto.parameters()) is auto.module[0].weight


@pytest.mark.parametrize(
    ("compile", "whole"),
    [
        (True, True),
        ({"backend": "eager"}, True),
        (lambda m: m[0].compile(backend="eager"), False),
    ],
    ids=["True", "options", "callable"],
)
def test_compile_is_applied_at_the_freeze(
    clock: object, compile: object, *, whole: bool
) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    auto = AutoFloat8(model, recipe="bf16", compile=compile, clock=clock)
    step(auto)
    compiled = model if whole else model[0]
    before = compiled._compiled_call_impl
    step(auto)
    assert compiled._compiled_call_impl is before
    auto.freeze()
    assert compiled._compiled_call_impl not in (None, before)


def test_a_callable_may_return_the_compiled_model(clock: object) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    auto = AutoFloat8(
        model,
        recipe="bf16",
        compile=lambda m: torch.compile(m, backend="eager"),
        clock=clock,
    )
    step(auto)
    auto.freeze()
    step(auto)
    assert auto.module is model
    assert list(auto.state_dict()) == ["0.weight", "0.bias"]


def test_one_signature_is_measured_once_for_many_layers(scripted_clock: type) -> None:
    clock = scripted_clock(all_faster)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(20)])
    auto = AutoFloat8(model, recipe="bf16", warmup_steps=1, clock=clock)
    auto(torch.randn(8, 32, requires_grad=True)).sum().backward()
    auto.freeze()
    assert len(clock.warmed) == 2
    assert len(auto.plan.converted_fqns) == 20


def test_a_layer_without_memory_to_time_it_stays_in_high_precision(
    scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    def script(signature: Signature, variant: str) -> float:
        if signature.shape.n == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return all_faster(signature, variant)

    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    auto = AutoFloat8(
        model, recipe="bf16", warmup_steps=1, clock=scripted_clock(script)
    )
    step(auto)
    auto.freeze()
    assert auto.plan["0"].reason is Reason.OUT_OF_MEMORY
    assert auto.plan.converted_fqns == ["1"]


def test_past_the_memory_budget_random_numbers_are_timed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    config = TuneConfig(capture_bytes=100, max_samples=8)
    auto = AutoFloat8(nn.Linear(32, 32), recipe="bf16", warmup_steps=1, config=config)
    state = torch.get_rng_state()
    x = torch.ones(8, 32)
    auto(x).sum().backward()
    auto.freeze()
    assert "on random numbers" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)


def test_empty_batches_are_not_timed(auto: AutoFloat8) -> None:
    step(auto, rows=0)
    step(auto, rows=8)
    auto.freeze()
    assert [x.shape.m for x, _ in auto.plan["0"].signatures] == [8]


def test_a_ragged_last_batch_is_weighed_by_its_calls(
    scripted_clock: type,
) -> None:
    def script(signature: Signature, variant: str) -> float:
        fast = all_faster if signature.shape.m == 64 else all_slower
        return fast(signature, variant)

    auto = AutoFloat8(
        nn.Linear(32, 32), recipe="bf16", warmup_steps=3, clock=scripted_clock(script)
    )
    for rows in (64, 64, 17):
        step(auto, rows)
    auto.freeze()
    decision = auto.plan[""]
    assert [(x.shape.m, calls) for x, calls in decision.signatures] == [
        (17, 1),
        (64, 2),
    ]
    # Two calls of 1.0 -> 0.5 ms and one of 0.5 -> 1.0 ms: 2.5 / 2.0.
    assert decision.speedup == pytest.approx(1.25)


def test_backward_is_told_from_forward() -> None:
    """Fails loudly when torch moves what in_backward asks."""
    seen: list[bool] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append(in_backward())
        return x.sin()

    x = torch.ones(1, requires_grad=True)
    checkpoint(run, x, use_reentrant=False).sum().backward()
    assert seen == [False, True]


def test_reference_may_be_nested_and_freeze_inside(auto: AutoFloat8) -> None:
    step(auto)
    with auto.reference():
        with auto.reference():
            assert type(auto.module[0]) is nn.Linear
        assert type(auto.module[0]) is nn.Linear
        plan = auto.freeze()
        assert type(auto.module[0]) is nn.Linear
    assert plan.converted_fqns == ["0", "2"]
    assert type(auto.module[0]) is type(auto.module[2]) is BFloat16Linear


@pytest.mark.parametrize("trial_steps", [0, 60])
def test_compiling_that_raises_is_tried_again(
    scripted_clock: type, trial_steps: int
) -> None:
    tries: list[int] = []

    def compile_at_last(module: nn.Module) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("no compiler here")

    clock = scripted_clock(all_faster, lambda names: 10.0 - len(names))
    auto = AutoFloat8(
        nn.Sequential(nn.Linear(32, 32)),
        recipe="bf16",
        warmup_steps=1,
        compile=compile_at_last,
        clock=clock,
        config=TuneConfig(trial_steps=trial_steps),
    )
    step(auto)
    with pytest.raises(RuntimeError, match="no compiler here"):
        step(auto)
    assert auto.phase == "warmup"
    assert type(auto.module[0]) is BFloat16Linear
    timed = clock.timed.total()
    step(auto)
    assert auto.phase == ("trial" if trial_steps else "frozen")
    assert clock.timed.total() == timed  # what was decided is not timed again


class Encoder(nn.Module):
    """Trained by a method that is not forward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
        self.last = nn.Linear(32, 32)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.block(x))


@pytest.mark.parametrize("loss", [all_faster, all_slower], ids=["faster", "slower"])
@pytest.mark.parametrize(
    "compile",
    [False, {"backend": "eager"}, lambda m: m.block.compile(backend="eager")],
    ids=["eager", "whole", "block"],
)
def test_a_model_that_is_trained_by_another_method(
    scripted_clock: type,
    loss: object,
    compile: object,
    caplog: pytest.LogCaptureFixture,
) -> None:
    auto = AutoFloat8(
        Encoder(),
        recipe="bf16",
        warmup_steps=2,
        compile=compile,
        clock=scripted_clock(loss),
        config=TuneConfig(timing="eager"),
    )
    optimizer = torch.optim.SGD(auto.parameters(), lr=0.1)
    for _ in range(4):
        for _ in range(3):
            auto.encode(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert auto.phase == "frozen"
    expected = ["block.0", "last"] if loss is all_faster else []
    assert auto.plan.converted_fqns == expected
    assert {calls for x in auto.plan.decisions for _, calls in x.signatures} == {6}
    bypassed = "compiles forward alone" in caplog.text
    assert bypassed == isinstance(compile, dict)
    assert "_compiled_call_impl" not in vars(auto.module.last)


def test_a_model_in_a_checkpoint_as_a_whole(auto: AutoFloat8) -> None:
    for reentrant in (True, True, True):
        x = torch.randn(8, 32, requires_grad=True)
        checkpoint(auto, x, use_reentrant=reentrant).sum().backward()
    assert auto.frozen
    assert auto.plan.converted_fqns == ["0", "2"]
    assert {x.recompute for d in auto.plan.decisions for x, _ in d.signatures} == {True}


def test_an_auxiliary_loss_past_the_output_is_a_step(auto: AutoFloat8) -> None:
    kept: list[torch.Tensor] = []
    handle = auto.module[0].register_forward_hook(lambda *x: kept.append(x[2]))
    for _ in range(3):
        output = auto(torch.randn(8, 32))
        kept.pop().sum().backward()
    handle.remove()
    del output
    assert auto.frozen
