"""Dynamo's limits and cache while several plans are tried, and what is left of it."""

import gc
import threading

import pytest
import torch
from torch._dynamo import convert_frame

from fp8tune.compiling.dynamo import CompiledPlans, compile_without_limit

LIMITS = ("recompile_limit", "accumulated_recompile_limit")


def limits():
    return [getattr(torch._dynamo.config, x) for x in LIMITS]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    gc.collect()  # trials of other tests in a cycle of references raise the limits
    # What earlier trials of this process compiled has raised them for good.
    with torch._dynamo.config.patch(dict(zip(LIMITS, (8, 256), strict=True))):
        before = limits()
        yield
        assert limits() == before
    torch._dynamo.reset()


class Compilations:
    """A function that Dynamo compiles anew for each length of a word.

    Attributes:
        count: how often.
    """

    def __init__(self):
        # Dynamo's cache hangs on the code object, so each gets one of its own.
        space = {}
        exec("def scale(x, word):\n    return x * len(word)", space)  # noqa: S102
        self._scale = torch.compile(
            space["scale"], backend=self._backend, dynamic=False
        )
        self.count = 0

    def _backend(self, graph, inputs):
        del inputs
        self.count += 1
        return graph.forward

    def __call__(self, word):
        return self._scale(torch.ones(2), word)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_the_limits_are_back_when_the_last_of_several_trials_ends(order):
    before = limits()
    trials = [CompiledPlans() for _ in range(3)]
    raised = limits()
    assert all(now > was for now, was in zip(raised, before, strict=True))
    for number in order[:-1]:
        trials[number].close()
        assert limits() == raised
    trials[order[-1]].close()
    assert limits() == before


def test_two_hundred_abandoned_trials_leave_the_limits_as_they_were():
    before = limits()
    for _ in range(200):
        CompiledPlans()
    gc.collect()
    assert limits() == before


def test_a_trial_that_is_collected_while_dynamo_compiles_disturbs_nothing():
    CompiledPlans().close()
    before = len(convert_frame._bytecode_hooks)
    trials = [CompiledPlans()]

    def collect(code, compiled):
        trials.clear()
        gc.collect()

    hooks = (collect, lambda *_: None)  # of which the second comes after it
    handles = [convert_frame.register_bytecode_hook(x) for x in hooks]
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager")
    assert compiled(torch.zeros(3)).sum() == 3
    for handle in handles:
        handle.remove()
    assert trials == []
    CompiledPlans().close()
    assert len(convert_frame._bytecode_hooks) == before


def test_a_trial_may_end_while_a_benchmark_compiles_without_limit():
    before = limits()
    trial = CompiledPlans()
    with compile_without_limit():
        trial.close()
        assert limits() > before
    assert limits() == before


def test_a_trial_that_is_closed_twice_counts_once():
    first, second = CompiledPlans(), CompiledPlans()
    raised = limits()
    first.close()
    first.close()
    del first
    gc.collect()
    assert limits() == raised
    second.close()


def test_a_limit_that_the_user_sets_meanwhile_stays():
    before = torch._dynamo.config.recompile_limit
    trial = CompiledPlans()
    torch._dynamo.config.recompile_limit = 77
    trial.close()
    left = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = before
    assert left == 77


def test_code_of_losing_plans_counts_no_more():
    model, trial = Compilations(), CompiledPlans()
    trial.begin_call()
    for number in range(1, 13):
        trial.activate(number)
        model("x" * number)
    trial.end_call()
    trial.keep_only(3)
    trial.close()
    assert model.count == 12
    model("xxx")
    assert model.count == 12
    # As many as before the trial, less the one that is kept.
    for number in range(20, 20 + torch._dynamo.config.recompile_limit - 1):
        model("x" * number)
    assert model.count == 12 + torch._dynamo.config.recompile_limit - 1


def test_what_the_user_compiles_beside_the_model_stays():
    model, loss, trial = Compilations(), Compilations(), CompiledPlans()
    trial.activate("loses")
    trial.begin_call()
    model("x")
    trial.end_call()
    loss("x")
    trial.keep_only("wins")
    trial.close()
    loss("x")
    assert loss.count == 1
    model("x")
    assert model.count == 2


def test_what_another_thread_compiles_stays():
    other, trial = Compilations(), CompiledPlans()
    trial.activate("loses")
    trial.begin_call()
    thread = threading.Thread(target=other, args=("x",))
    thread.start()
    thread.join()
    trial.end_call()
    trial.keep_only("wins")
    trial.close()
    other("x")
    assert other.count == 1


def test_one_trial_lets_go_of_nothing_of_another_models_trial():
    mine, yours = Compilations(), Compilations()
    first, second = CompiledPlans(), CompiledPlans()
    for trial, model in ((first, mine), (second, yours)):
        trial.activate("a")
        trial.begin_call()
        model("x")
        trial.end_call()
    first.keep_only("b")
    first.close()
    yours("x")
    assert yours.count == 1
    second.close()
