"""Copies and pickles, whatever the phase, have weights of their own and nothing of ours."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel

from fp8tune import AutoFloat8, ModelError, PhaseError, TuneConfig
from fp8tune.recipes import BFloat16Linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp8tune.decision.records import Signature

PHASES = ["warmup", "replayed", "trial", "frozen"]


def all_faster(signature: Signature, variant: str) -> float:
    return 1.0 if variant == "reference" else 0.5


def compile_blocks(model: nn.Module) -> None:
    for block in model.children():
        block.compile(backend="eager")


def bare() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


def step(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.ones(8, 32)).square().mean().backward()


Tuned = "Callable[[str], AutoFloat8]"


@pytest.fixture
def tuned(scripted_clock: type, tmp_path: object) -> Tuned:
    def build(phase: str, compile: object = False) -> AutoFloat8:
        options = {
            "recipe": "bf16",
            "warmup_steps": 1,
            "clock": scripted_clock(all_faster, lambda _: 1.0),
            "config": TuneConfig(trial_steps=200 if phase == "trial" else 0),
            "cache": tmp_path / "cache.json",
            "compile": compile,
        }
        auto = AutoFloat8(bare(), **options)
        for _ in range(0 if phase == "warmup" else 3):
            step(auto)
        if phase == "replayed":
            auto = AutoFloat8(bare(), **options)
        assert auto.phase == phase
        return auto

    return build


def pickled(thing: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(thing))  # noqa: S301 - made here


def saved(thing: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, pickled, saved, AveragedModel]


@pytest.mark.parametrize("make", COPIES, ids=lambda x: x.__name__)
@pytest.mark.parametrize("what", ["wrapper", "model"])
@pytest.mark.parametrize("compile", [False, compile_blocks], ids=["eager", "blocks"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_copy_computes_with_its_own_weights(
    tuned: Tuned,
    make: Callable[[nn.Module], nn.Module],
    what: str,
    compile: object,
    phase: str,
) -> None:
    auto = tuned(phase, compile)
    twin = make(auto if what == "wrapper" else auto.module)
    x = torch.randn(4, 32)
    before = twin(x)
    with torch.no_grad():
        for weight in auto.parameters():
            weight.zero_()
    assert torch.equal(twin(x), before)
    twin(x).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    kept = [None if p.grad is None else p.grad.clone() for p in auto.parameters()]
    twin(x).sum().backward()
    now = [p.grad for p in auto.parameters()]
    assert all(a is b or torch.equal(a, b) for a, b in zip(kept, now, strict=True))


@pytest.mark.parametrize("what", ["wrapper", "model"])
@pytest.mark.parametrize("phase", PHASES)
def test_so_does_a_copy_of_a_model_that_is_compiled_as_a_whole(
    tuned: Tuned, what: str, phase: str
) -> None:
    torch._dynamo.reset()
    compiled = {"backend": "eager"}
    test_a_copy_computes_with_its_own_weights(
        tuned, copy.deepcopy, what, compiled, phase
    )


def own_names(module: nn.Module) -> set[str]:
    return set(vars(module)) - set(vars(nn.Linear(1, 1))) - {"_compiled_call_impl"}


@pytest.mark.parametrize("make", COPIES[:3], ids=lambda x: x.__name__)
@pytest.mark.parametrize("phase", ["warmup", "replayed", "trial"])
def test_a_copy_of_what_is_being_tuned_is_the_bare_model(
    tuned: Tuned, make: Callable[[nn.Module], nn.Module], phase: str
) -> None:
    auto = tuned(phase)
    twin = make(auto.module)
    assert type(twin[0]) is type(twin[2]) is nn.Linear
    assert own_names(twin[0]) == set()
    assert "forward" not in vars(twin)
    for child in twin.modules():
        assert not [x for x in vars(child) if "_hooks" in x and vars(child)[x]]
    x = torch.randn(4, 32)
    assert torch.equal(twin(x), bare()(x))


def test_hooks_and_attributes_of_the_users_are_copied(tuned: Tuned) -> None:
    auto = tuned("warmup")
    seen: list[str] = []
    auto.module[0].register_forward_hook(lambda *_: seen.append("forward"))
    auto.module[0].note = "mine"
    auto.module._require_grads_hooks = []  # as a model of Transformers has them
    numbers = dict.fromkeys(auto.module[0]._forward_hooks, "mine")
    auto.module[0].user_hooks = numbers
    twin = copy.deepcopy(auto.module)
    twin(torch.ones(1, 32))
    assert seen == ["forward"]
    assert twin[0].note == "mine"
    assert twin._require_grads_hooks == []
    assert twin[0].user_hooks == numbers


def test_a_model_that_holds_its_wrapper_can_be_copied(tuned: Tuned) -> None:
    auto = tuned("warmup")
    auto.kept = auto.forward  # on the model, as accelerate keeps the forward
    twin = copy.deepcopy(auto.module)
    assert twin.kept.__self__ is not auto
    x = torch.randn(4, 32)
    assert torch.equal(twin.kept(x), bare()(x))
    assert len(list(twin.kept.__self__.parameters())) == 4


def test_tuning_goes_on_after_a_copy(tuned: Tuned) -> None:
    auto = tuned("warmup")
    copy.deepcopy(auto)
    step(auto)
    step(auto)
    assert auto.frozen
    assert auto.plan.converted_fqns == ["0", "2"]
    assert own_names(auto.module[0]) == set()


def test_a_layer_can_be_copied_alone(tuned: Tuned) -> None:
    auto = tuned("warmup")
    assert type(copy.deepcopy(auto.module[0])) is nn.Linear
    assert type(auto.module[0]) is BFloat16Linear


def test_a_copied_wrapper_says_what_it_is(
    tuned: Tuned, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    auto = tuned("warmup")
    twin = copy.deepcopy(auto)
    assert "has no plan and is not tuned" in caplog.text
    assert twin.phase == "abandoned"
    assert twin.plan is None
    assert auto.phase == "warmup"
    with pytest.raises(PhaseError, match=r"AutoFloat8\(auto.module\)"):
        twin.freeze()


@pytest.mark.parametrize("make", COPIES[:3], ids=lambda x: x.__name__)
def test_a_copy_of_the_frozen_wrapper_has_the_plan(
    tuned: Tuned, make: Callable[[nn.Module], nn.Module]
) -> None:
    auto = tuned("frozen")
    twin = make(auto)
    assert twin.plan == auto.plan
    assert twin.frozen
    assert twin.freeze() == auto.plan
    assert type(twin.module[0]) is BFloat16Linear
    with twin.reference():
        assert type(twin.module[0]) is nn.Linear
        assert type(auto.module[0]) is BFloat16Linear


@pytest.mark.parametrize("phase", PHASES[:3])
def test_replicas_of_data_parallel_are_refused(tuned: Tuned, phase: str) -> None:
    """nn.DataParallel asks every module for one, before each forward, on GPUs only."""
    auto = tuned(phase)
    for module in (auto, auto.module, auto.module[0]):
        with pytest.raises(ModelError, match="use DistributedDataParallel"):
            module._replicate_for_data_parallel()


def test_the_frozen_bare_model_can_be_replicated(tuned: Tuned) -> None:
    auto = tuned("frozen")
    replica = auto.module[0]._replicate_for_data_parallel()
    replica.weight = torch.zeros(32, 32)
    replica.bias = torch.zeros(32)
    assert replica(torch.ones(1, 32)).abs().max() == 0


class WithOwnCopy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)

    def __deepcopy__(self, memo: dict) -> WithOwnCopy:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made


@pytest.mark.parametrize("trial_steps", [0, 200])
def test_a_deepcopy_of_the_users_own_is_right_too(
    scripted_clock: type, trial_steps: int
) -> None:
    clock = scripted_clock(all_faster, lambda _: 1.0)
    config = TuneConfig(trial_steps=trial_steps)
    options = {"recipe": "bf16", "warmup_steps": 1, "clock": clock, "config": config}
    auto = AutoFloat8(WithOwnCopy(), **options)
    for _ in range(3 if trial_steps else 1):
        step(auto)
    twin = copy.deepcopy(auto.module)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert twin(torch.ones(1, 32)).abs().max() == 0
    again = copy.deepcopy(twin)
    assert again(torch.ones(1, 32)).abs().max() == 0
    step(twin)
    assert auto.phase == ("trial" if trial_steps else "warmup")


def test_a_copy_parametrized_after_the_freeze_is_not_lost_without_a_word(
    tuned: Tuned, caplog: pytest.LogCaptureFixture
) -> None:
    twin = copy.deepcopy(tuned("frozen"))
    with twin.reference(), twin.reference():
        step(twin)
    assert twin.plan.converted_fqns == ["0", "2"]
    weight_norm(twin[0])
    step(twin)
    for _ in range(2):
        with twin.reference():
            step(twin)
        step(twin)
    assert twin.plan.converted_fqns == ["2"]
    assert type(twin[2]) is BFloat16Linear
    assert caplog.text.count("1 Linears were replaced or changed") == 1
