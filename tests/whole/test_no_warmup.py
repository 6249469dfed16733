"""warmup_steps=0: the first step of training already runs compiled, by the plan."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile

from fp8tune import AutoFloat8, CompiledTooEarlyError, Reason, TuneConfig
from fp8tune.bench.blocks import Block
from fp8tune.bench.workloads import find_workloads, scaled_down
from fp8tune.recipes import BFloat16Linear, change_class, restore_class
from tests.conftest import ScriptedClock
from tests.helpers import all_faster, hooks_of, widening

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Ranks

NO_TRIAL = TuneConfig(trial_steps=0)
EAGER_BACKEND = {"backend": "eager"}


class Model(nn.Module):
    """Counts the forwards that run eagerly and on real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)
        self.eager = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and not isinstance(x, FakeTensor):
            self.eager += 1
        return x + self.down(torch.relu(self.up(x)))


class LooksAtValues(Model):
    """Its course depends on what it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else -y


def auto_of(model: nn.Module | None = None, **options: Any) -> AutoFloat8:
    given = {
        "recipe": "bf16",
        "warmup_steps": 0,
        "clock": ScriptedClock(widening),
        "config": NO_TRIAL,
    }
    return AutoFloat8(model or Model(), **(given | options))


def step(called: Any, rows: int = 8) -> None:
    called(torch.ones(rows, 16)).sum().backward()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("through", ["auto", "model"])
def test_the_first_step_runs_compiled(through: str) -> None:
    model = Model()
    auto = auto_of(model, compile=EAGER_BACKEND)
    assert not auto.frozen
    step(auto if through == "auto" else model)
    assert auto.phase == "frozen"
    assert auto.plan.converted_fqns == ["up"]
    step(auto if through == "auto" else model)
    assert model.eager == 0
    assert all(x.grad is not None for x in model.parameters())


@pytest.mark.parametrize("what", ["its own forward", "hooks of its own"])
def test_a_model_that_holds_what_others_put_on_it_runs_dry(what: str) -> None:
    model = Model()
    auto = auto_of(model, compile=EAGER_BACKEND)
    if what == "hooks of its own":  # as Transformers keeps those of checkpointing
        model._require_grads_hooks = []
    else:  # as accelerate keeps what it replaces; it is set on the model
        auto._original_forward = auto.forward
    step(auto)
    assert auto.frozen
    assert model.eager == 0


@pytest.mark.parametrize("make", [threading.Lock, torch.Generator])
def test_what_has_no_copies_is_shared_with_the_dry_run(make: Any) -> None:
    model = Model()
    model.up.own = [make()]
    auto = auto_of(model, compile=EAGER_BACKEND)
    step(auto)
    assert auto.frozen
    assert model.eager == 0


class Drawing(Model):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.source = torch.Generator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.rand(x.shape, generator=self.source)


def test_a_generator_of_the_models_own_is_not_drawn_from() -> None:
    once, tuned = Drawing(), Drawing()
    step(once)
    step(auto_of(tuned))
    assert tuned.eager == 1
    assert torch.equal(once.source.get_state(), tuned.source.get_state())


@pytest.mark.parametrize("check_nan", [True, False])
def test_anomalies_are_looked_for_in_real_steps_only(check_nan: bool) -> None:
    model = Model()
    auto = auto_of(model, compile=EAGER_BACKEND)
    with torch.autograd.set_detect_anomaly(mode=True, check_nan=check_nan):
        step(auto)
        assert torch.is_anomaly_enabled()
        assert torch.is_anomaly_check_nan_enabled() == check_nan
    assert auto.frozen
    assert model.eager == 0


@pytest.mark.parametrize("script", [all_faster, widening])
def test_the_plan_is_that_of_a_warmup(script: Any) -> None:
    plans = []
    for steps in (0, 3):
        auto = auto_of(warmup_steps=steps, clock=ScriptedClock(script))
        for _ in range(4):
            step(auto)
        plans.append(auto.plan)
    at_once, warmed_up = plans
    for a, b in zip(at_once.decisions, warmed_up.decisions, strict=True):
        assert (a.fqn, a.verdict, a.reason) == (b.fqn, b.verdict, b.reason)
        assert [x for x, _ in a.signatures] == [x for x, _ in b.signatures]


class SingleLinear(nn.Linear):
    """A Linear in float64 that computes in float32: faster on any CPU if it is large."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input.float(), self.weight.float()).double()


class Single:
    """SingleLinear against float64."""

    name, reference, settings, emulated = "single", "float64", "SingleLinear", False

    def supports(self, linear: nn.Linear) -> Reason | None:
        fits = linear.weight.dtype is torch.float64
        return None if fits else Reason.UNSUPPORTED_DTYPE

    def static_filter(self, linear: nn.Linear) -> Reason | None:
        return None

    def convert(self, linear: nn.Linear) -> None:
        change_class(linear, SingleLinear, {})

    def revert(self, linear: nn.Linear) -> None:
        restore_class(linear, SingleLinear, {})


def _real_reasons(steps: int, recipe: Any, m: int, dtype: torch.dtype) -> list[Reason]:
    (found,) = find_workloads(["llama3-70b-tp8@8192"])
    workload = replace(scaled_down(found), m=m)
    config = TuneConfig(trial_steps=0, max_samples=16)
    auto = AutoFloat8(
        Block(workload).to(dtype), recipe, warmup_steps=steps, config=config
    )
    for _ in range(steps + 1):
        x = torch.randn(1, m, workload.dim, requires_grad=True, dtype=dtype)
        auto(x).square().mean().backward()
    return [x.reason for x in auto.plan.decisions]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("recipe", "m", "dtype"),
    [("bf16", 8, torch.float32), (Single(), 256, torch.float64)],
    ids=["slower", "faster"],
)
def test_real_verdicts_are_those_of_a_warmup(
    recipe: Any, m: int, dtype: torch.dtype
) -> None:
    pairs = list(
        zip(*(_real_reasons(steps, recipe, m, dtype) for steps in (0, 3)), strict=True)
    )
    clear = {Reason.FASTER, Reason.SLOWER}
    both = [x for x in pairs if clear >= set(x)]
    assert both
    assert all(at_once is warmed_up for at_once, warmed_up in both), pairs


class ManyValues(nn.Module):
    """Compiled it keeps one tensor for its backward, and eagerly many."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(256, 256, bias=False)
        self.down = nn.Linear(256, 256, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        h = h.tanh() * h.sigmoid() + h.sin() * h.cos()
        return x + self.down(h)


def _peak_bytes(run: Callable[[], object]) -> int:
    """The most that the allocator had given out at a time, above what it had before."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as seen:
        run()
    results = seen.profiler.kineto_results
    events = [x for x in results.events() if x.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda x: x.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("steps", [0, 1])
def test_the_first_step_has_the_memory_of_a_compiled_one(steps: int) -> None:
    model = nn.Sequential(*[ManyValues() for _ in range(4)])
    # Inductor's choice of what is kept for backward, without its kernels.
    auto = AutoFloat8(
        model,
        "bf16",
        warmup_steps=steps,
        compile={"backend": "aot_eager_decomp_partition"},
        config=TuneConfig(trial_steps=0, max_seconds=0.1, max_samples=8),
    )
    x = torch.randn(512, 256)

    def train() -> None:
        auto(x).sum().backward()
        for parameter in auto.parameters():
            parameter.grad = None

    first, _, compiled = (_peak_bytes(train) for _ in range(3))
    if steps:
        assert first > 1.5 * compiled
    else:
        assert first == compiled


def test_training_is_that_of_a_model_converted_by_hand() -> None:
    torch.manual_seed(0)
    model = Model()
    by_hand = copy.deepcopy(model)
    auto = auto_of(model)
    seed = torch.get_rng_state()
    step(auto)
    assert torch.equal(seed, torch.get_rng_state())
    auto.plan.apply(by_hand)
    step(by_hand)
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_nothing_is_left_behind() -> None:
    model = Model()
    before = set(vars(model))
    auto = auto_of(model)
    step(auto)
    assert auto.frozen
    assert set(vars(model)) == before
    assert not any(hooks_of(model).values())
    model.to(torch.float64)  # which torch refuses where a weak reference is left


@pytest.mark.parametrize("end", ["abandon", "freeze"])
def test_it_may_end_before_the_first_step(end: str) -> None:
    model = Model()
    before = set(vars(model))
    auto = auto_of(model)
    getattr(auto, end)()
    assert set(vars(model)) == before
    step(auto)
    assert model.eager == 1
    assert type(model.up) is nn.Linear


def test_copies_of_a_waiting_model_are_plain() -> None:
    auto = auto_of()
    for made in (copy.deepcopy(auto.module), pickle.loads(pickle.dumps(auto.module))):  # noqa: S301 - our own bytes
        step(made)
        assert not auto.frozen


def test_an_evaluation_before_decides_nothing() -> None:
    auto = auto_of()
    with torch.no_grad():
        auto(torch.ones(8, 16))
    assert not auto.frozen
    step(auto)
    assert auto.frozen


def test_a_trial_follows_if_there_is_one(caplog: pytest.LogCaptureFixture) -> None:
    clock = ScriptedClock(all_faster, steps=lambda roles: 10.0 - 4 * ("up" in roles))
    model = Model()
    auto = auto_of(
        model,
        clock=clock,
        compile=EAGER_BACKEND,
        config=TuneConfig(trial_steps=200),
    )
    step(auto)
    assert auto.phase == "trial"
    for _ in range(200):
        if auto.frozen:
            break
        step(auto)
    assert "up" in auto.plan.converted_fqns
    assert model.eager == 0


@pytest.mark.parametrize("compile", [False, EAGER_BACKEND])
def test_where_it_cannot_run_dry_one_step_is_eager(
    caplog: pytest.LogCaptureFixture, *, compile: Any
) -> None:
    model = LooksAtValues()
    auto = auto_of(model, compile=compile)
    step(auto)
    assert "warmup_steps=0 is not possible here: the model does not run" in caplog.text
    assert not auto.frozen
    step(auto)
    assert auto.plan.converted_fqns == ["up"]


def test_training_in_eval_mode_has_one_eager_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    auto = auto_of()
    auto.eval()
    step(auto)
    assert "the model is in eval mode" in caplog.text
    step(auto)
    assert auto.frozen


def test_layers_that_are_called_elsewhere_have_one_eager_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model()
    auto = auto_of(model)
    for _ in range(2):
        model.down(model.up(torch.ones(8, 16))).sum().backward()
    assert "outside of the model's forward" in caplog.text
    assert auto.frozen


def test_compiled_too_early() -> None:
    auto = auto_of()
    with pytest.raises(CompiledTooEarlyError, match="compile=True"):
        torch.compile(auto, backend="eager")(torch.ones(8, 16))


def _on_a_rank(kinds: list[str]) -> tuple[str, int, list[str]]:
    kind = kinds[torch.distributed.get_rank()]
    model = {"plain": Model, "values": LooksAtValues}[kind]()
    auto = auto_of(model)
    trained = nn.parallel.DistributedDataParallel(auto)
    step(trained)
    after_one = str(auto.phase)
    step(trained)
    return after_one, model.eager, auto.plan.converted_fqns


@pytest.mark.dist
def test_ranks_decide_at_once_or_none_does(ranks: Ranks) -> None:
    at_once = ranks(2, _on_a_rank, ["plain", "plain"])
    assert at_once == dict.fromkeys(range(2), ("frozen", 2, ["up"]))
    mixed = ranks(2, _on_a_rank, ["plain", "values"])
    assert mixed == dict.fromkeys(range(2), ("warmup", 2, ["up"]))


def test_a_single_linear() -> None:
    linear = nn.Linear(16, 64)
    auto = auto_of(linear)
    step(auto)
    assert auto.plan.converted_fqns == [""]
    assert type(linear) is BFloat16Linear


def test_the_start_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    auto = auto_of()
    assert "2 of 2 Linears are candidates" in caplog.text
    assert "0 of 1 warmup steps" in str(auto.report())
