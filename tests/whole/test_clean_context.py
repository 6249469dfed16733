"""What surrounds the user's forward is neither timed nor disturbed by timing."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fp8tune import AutoFloat8, Reason, TuneConfig

CONFIG = TuneConfig(max_samples=8, max_seconds=0.05)


def wrap(model: nn.Module | None = None, **options: object) -> AutoFloat8:
    model = model or nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    return AutoFloat8(model, recipe="bf16", warmup_steps=1, config=CONFIG, **options)


def test_hooks_on_saved_tensors_see_the_users_alone() -> None:
    auto, packed = wrap(), []
    for _ in range(3):
        count: list[object] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x, count=count: count.append(x) or x.clone(), lambda x: x
        )
        with hooks:
            output = auto(torch.randn(8, 32))
        output.sum().backward()
        packed.append(len(count))
    assert auto.frozen
    assert len(set(packed)) == 1


def test_flops_are_those_of_the_model() -> None:
    auto, flops = wrap(), []
    for _ in range(3):
        with FlopCounterMode(display=False) as counter:
            auto(torch.randn(8, 32)).sum().backward()
        flops.append(counter.get_total_flops())
    assert auto.frozen
    assert len(set(flops)) == 1


def test_hooks_on_all_modules_see_the_users_alone() -> None:
    """FlopCounterMode sets some, which cannot see layers that autograd.grad differentiates."""
    auto, calls = wrap(), []
    for _ in range(3):
        count: list[object] = []
        seen = register_module_forward_hook(lambda *x, count=count: count.append(x[0]))
        with FlopCounterMode(display=False), seen:
            auto(torch.randn(8, 32)).sum().backward()
        calls.append(len(count))
    assert Reason.NOT_MEASURED not in {x.reason for x in auto.plan.decisions}
    assert len(set(calls)) == 1


def test_a_freeze_inside_a_checkpoint_leaves_the_backward_whole() -> None:
    inner = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    auto = wrap(inner)
    for _ in range(3):
        x = torch.randn(8, 32, requires_grad=True)
        checkpoint(auto, x, use_reentrant=False).sum().backward()
        assert x.grad is not None
    assert auto.frozen


class Doubled(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            time.sleep(0.001)
            seen.append(threading.current_thread())
        return func(*args, **(kwargs or {}))


seen: list[threading.Thread] = []


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autograd.set_detect_anomaly(True),
        lambda: torch.device("meta"),
        lambda: torch.inference_mode(False),
        lambda: torch.autocast("cpu", torch.bfloat16),
        Doubled,
    ],
    ids=["anomaly", "device", "inference", "autocast", "function mode"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_modes_are_left_as_they_were(around: object) -> None:
    auto = wrap(nn.Sequential(nn.Linear(32, 32)))
    seen.clear()
    x = torch.randn(8, 32)
    for _ in range(3):
        with around():
            anomaly = torch.is_anomaly_enabled()
            output = auto(x)
            assert torch.is_anomaly_enabled() == anomaly
        output.float().sum().backward()
    assert auto.frozen
    assert auto.plan["0"].samples >= 8
    assert set(seen) <= {threading.main_thread()}
    assert len(seen) in (0, 3)


def test_deterministic_algorithms_stay_on() -> None:
    auto = wrap()
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            auto(torch.randn(8, 32)).sum().backward()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert auto.plan["0"].samples >= 8


def test_as_many_threads_measure_as_train(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    clock = CountingClock(seen)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        auto = wrap(clock=clock)
        auto(torch.randn(8, 32)).sum().backward()
        auto.freeze()
    finally:
        torch.set_num_threads(before)
    assert seen == {1}


class CountingClock:
    def __init__(self, seen: set[int]) -> None:
        self._seen = seen

    def warm_up(self, work: object) -> None:
        self._seen.add(torch.get_num_threads())

    def time_ms(self, work: list) -> list[float]:
        return [1.0 for _ in work]

    def now(self) -> float:
        return 0.0


class EndlessClock(CountingClock):
    """Ctrl-C comes while it times, in the main thread as always."""

    def time_ms(self, work: list) -> list[float]:
        time.sleep(0.01)
        self._seen.add(len(self._seen))
        return [1.0 for _ in work]


def test_ctrl_c_ends_measuring_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    auto = wrap(clock=EndlessClock(seen))
    auto(torch.randn(8, 32)).sum().backward()

    def interrupted(*_: object) -> None:
        time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        auto.freeze()
    assert threading.active_count() == threads
    counted = len(seen)
    time.sleep(0.05)
    assert len(seen) == counted
    monkeypatch.undo()
    assert auto.freeze() is auto.plan


def test_an_error_of_the_clock_arrives() -> None:
    class Broken(CountingClock):
        def now(self) -> float:
            raise ValueError("no time")

    auto = wrap(clock=Broken(set()))
    auto(torch.randn(8, 32)).sum().backward()
    with (
        contextlib.suppress(AssertionError),
        pytest.raises(ValueError, match="no time"),
    ):
        auto.freeze()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
def test_a_trace_in_the_warmup_counts_for_nothing() -> None:
    """As TensorBoard's add_graph makes one; torch makes two and compares them."""
    auto = wrap(nn.Sequential(nn.Linear(32, 32)))
    traced = torch.jit.trace(auto.module, torch.randn(4, 32))
    x = torch.randn(4, 32)
    assert torch.equal(traced(x), auto(x))
    assert auto.tuning_state()["seen"]["calls"] == {}
