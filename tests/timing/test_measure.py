"""Timing one signature: when it stops, what it survives, what it leaves alone."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp8tune.config import TuneConfig
from fp8tune.decision.judge import interval_of
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import REFERENCE, Shape, Signature
from fp8tune.model.candidates import Sample
from fp8tune.recipes import get_recipe
from fp8tune.timing.cpu_clock import CpuClock
from fp8tune.timing.measure import measure, measure_all

BF16 = get_recipe("bf16", "cpu")
# Enough for one look, so that real clocks time little.
SHORT = TuneConfig(max_samples=8, max_seconds=30)


def signature(m=8, k=16, n=16, **changes):
    shape = Shape(m, k, n, "float32", "float32", None, True)
    grads = {"grad_input": True, "grad_weight": True, "grad_bias": True}
    return Signature(shape, **(grads | changes))


def sample(key=None, *, captured=True):
    key = key or signature()
    linear = nn.Linear(key.shape.k, key.shape.n)
    if not captured:
        return Sample(key, linear, None, None)
    input, grad = torch.randn(key.shape.m, key.shape.k), torch.randn(8, key.shape.n)
    return Sample(key, linear, input, grad)


def measured(clock, config=SHORT, taken=None, **options):
    return measure(taken or sample(), BF16, clock, config, **options)


def speedup(factor):
    """A script in which the candidate is so many times faster."""
    return lambda _, variant: factor if variant == REFERENCE else 1.0


def undecided():
    """A script whose pairs are twice as fast and twice as slow in turn."""
    times = iter([2.0, 1.0, 1.0, 0.5] * 10**6)
    return lambda *_: next(times)


def failing(error, times, variant="bf16"):
    """A script that raises at the first so many timings of a variant."""
    left = [times]

    def time_ms(_, asked):
        if asked == variant and left[0]:
            left[0] -= 1
            raise error
        return 1.0 if asked == variant else 2.0

    return time_ms


class Recorded(nn.Linear):
    """Counts its passes; knows the last one's dtype and what it is differentiated by."""

    forwards = backwards = 0
    differentiated = frozenset()
    dtype = None

    def forward(self, input):
        tensors = {"input": input, "weight": self.weight, "bias": self.bias}
        Recorded.forwards += 1
        Recorded.differentiated = {
            name for name, tensor in tensors.items() if tensor.requires_grad
        }
        output = super().forward(input)
        Recorded.dtype = output.dtype
        if output.requires_grad:
            output.register_hook(Recorded.went_back)
        return output

    @staticmethod
    def went_back(grad_output):
        del grad_output
        Recorded.backwards += 1


class RecordingRecipe:
    """Converts to Recorded."""

    name = "recorded"
    reference = "float32"
    settings = ""
    emulated = False

    def __init__(self):
        Recorded.forwards = Recorded.backwards = 0
        Recorded.differentiated = frozenset()

    def convert(self, linear):
        linear.__class__ = Recorded


class CountingBackend:
    """A backend of torch.compile that only counts what it gets."""

    def __init__(self):
        self.compilations = 0

    def __call__(self, graph, example_inputs):
        del example_inputs
        self.compilations += 1
        return graph.forward


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_clear_difference_stops_at_the_first_look(scripted_clock, factor):
    result = measured(scripted_clock(speedup(factor)), TuneConfig())
    assert result.ratios == [factor] * 8


def test_clear_means_clear_of_min_speedup(scripted_clock):
    script = speedup(1.25)
    exactly = measured(scripted_clock(script), TuneConfig(min_speedup=1.25))
    over = measured(scripted_clock(script), TuneConfig(min_speedup=1.26))
    under = measured(scripted_clock(script), TuneConfig(min_speedup=1.24))
    pairs = [len(x.ratios) for x in (under, exactly, over)]
    assert pairs == [8, 128, 8]


@pytest.mark.parametrize("number", [8, 9, 27, 128])
def test_no_clear_difference_stops_at_max_samples(scripted_clock, number):
    result = measured(scripted_clock(undecided()), TuneConfig(max_samples=number))
    assert len(result.reference_ms) == len(result.candidate_ms) == number
    assert result.failure is None


@pytest.mark.parametrize(
    ("max_seconds", "pairs"),
    # Two pairs take 4.5 ms; they are begun only if they are expected to fit.
    [(0.0224, 8), (0.0226, 10), (0.0269, 10), (0.0271, 12)],
)
def test_a_spent_budget_stops_the_timing(scripted_clock, max_seconds, pairs):
    clock = scripted_clock(undecided())
    result = measured(clock, TuneConfig(max_seconds=max_seconds))
    assert len(result.ratios) == pairs
    assert clock.now() <= max_seconds


def test_layers_that_take_longer_than_the_budget_still_get_a_verdict(scripted_clock):
    clock = scripted_clock(lambda _, variant: 300.0 if variant == "reference" else 200)
    assert len(measured(clock, TuneConfig(max_seconds=1.0)).ratios) == 8


def test_a_busy_machine_is_sampled_until_the_budget_ends(scripted_clock):
    # Candidates are hit by a lost time slice in six runs of ten.
    times = itertools.cycle([0.5, 20.0, 20.0, 0.5, 20.0, 0.5, 20.0, 20.0, 0.5, 20.0])
    clock = scripted_clock(lambda _, v: 1.0 if v == "reference" else next(times))
    result = measured(clock, TuneConfig())
    assert len(result.ratios) > 8
    assert not result.steady


def test_pairs_run_forth_and_back_then_back_and_forth(scripted_clock):
    order = []

    def time_ms(_, variant):
        order.append(variant)
        return 2.0 if variant == REFERENCE else 1.0

    measured(scripted_clock(time_ms))
    forth, back = [REFERENCE, "bf16"], ["bf16", REFERENCE]
    assert order == (forth + back + back + forth) * 2


def test_drift_falls_on_both_alike(scripted_clock):
    calls = iter(range(10**6))
    result = measured(scripted_clock(lambda *_: 100.0 + next(calls)), TuneConfig())
    slower = [ratio for ratio in result.ratios if ratio > 1]
    assert len(slower) == len(result.ratios) / 2


def test_both_variants_are_warmed_up_once(scripted_clock):
    clock, taken = scripted_clock(speedup(2.0)), sample()
    measured(clock, taken=taken)
    assert clock.warmed == {(taken.signature, x): 1 for x in (REFERENCE, "bf16")}


def test_a_measurement_says_what_it_measured(scripted_clock):
    taken = sample()
    result = measured(scripted_clock(speedup(2.0)), taken=taken)
    assert result.signature == taken.signature
    assert result.recipe == "bf16"
    assert not result.synthetic


@pytest.mark.parametrize("missing", ["input", "grad_output"])
def test_missing_tensors_make_it_synthetic(scripted_clock, missing):
    taken = dataclasses.replace(sample(), **{missing: None})
    assert measured(scripted_clock(speedup(2.0)), taken=taken).synthetic


@pytest.mark.parametrize("variant", [REFERENCE, "bf16"])
def test_a_failing_variant_is_not_measured(scripted_clock, variant):
    script = failing(RuntimeError("no kernel\nfor this"), 1, variant)
    result = measured(scripted_clock(script))
    assert result.failure is Reason.NOT_MEASURED
    assert result.detail == "RuntimeError: no kernel"
    assert result.ratios == []


def test_an_error_is_not_tried_again(scripted_clock):
    clock, taken = scripted_clock(failing(RuntimeError("no"), 1)), sample()
    measured(clock, taken=taken)
    assert clock.warmed[taken.signature, "bf16"] == 1


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_out_of_memory_is_tried_once_more_and_reported(scripted_clock, kind):
    clock, taken = scripted_clock(failing(kind("9 GB"), 2)), sample()
    result = measured(clock, taken=taken)
    assert result.failure is Reason.OUT_OF_MEMORY
    assert result.detail == f"{kind.__name__}: 9 GB"
    assert clock.warmed[taken.signature, "bf16"] == 2


def test_an_allocation_that_fails_on_cpu_is_out_of_memory(scripted_clock):
    clock = scripted_clock(lambda *_: torch.empty(2**50))
    assert measured(clock).failure is Reason.OUT_OF_MEMORY


def test_a_second_try_without_captured_tensors_is_synthetic(scripted_clock):
    clock = scripted_clock(failing(MemoryError("9 GB"), 1))
    result = measured(clock)
    assert result.failure is None
    assert result.synthetic
    assert result.ratios == [2.0] * 8


def test_ctrl_c_ends_the_timing(scripted_clock):
    clock = scripted_clock(failing(KeyboardInterrupt("stop"), 1))
    with pytest.raises(KeyboardInterrupt, match="stop"):
        measured(clock)


def test_a_scripted_clock_needs_no_memory(scripted_clock):
    key = signature(m=2**30, k=2**20, n=2**20)
    with torch.device("meta"):
        taken = sample(key, captured=False)
    assert measured(scripted_clock(speedup(2.0)), taken=taken).failure is None


@pytest.mark.parametrize("captured", [True, False])
def test_real_times_are_measured(captured):
    taken = sample(captured=captured)
    result = measured(CpuClock(), taken=taken)
    assert result.failure is None
    assert len(result.ratios) == 8
    assert all(0 < ms < 1000 for ms in result.reference_ms + result.candidate_ms)


@pytest.mark.parametrize("captured", [True, False])
def test_measuring_leaves_training_alone(captured):
    taken = sample(captured=captured)
    parameters = list(taken.linear.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    before = [x.detach().clone() for x in parameters]
    versions, attributes = [x._version for x in parameters], dict(vars(taken.linear))
    rng = torch.get_rng_state()
    measured(CpuClock(), taken=taken)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(map(torch.equal, parameters, before))
    assert [x._version for x in parameters] == versions
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    assert parameters[1].grad is None
    assert type(taken.linear) is nn.Linear
    assert vars(taken.linear) == attributes


def test_captured_tensors_stay_as_they_are():
    taken = sample()
    input, grad = taken.input.clone(), taken.grad_output.clone()
    measured(CpuClock(), taken=taken)
    assert torch.equal(taken.input, input)
    assert torch.equal(taken.grad_output, grad)
    assert not taken.input.requires_grad
    assert taken.input.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_measuring_needs_and_leaves_the_grad_mode(mode):
    with mode():
        before, recipe = torch.is_grad_enabled(), RecordingRecipe()
        assert measure(sample(), recipe, CpuClock(), SHORT).failure is None
        assert torch.is_grad_enabled() is before
    assert Recorded.differentiated == {"input", "weight", "bias"}


@pytest.mark.parametrize("name", [None, "bfloat16"])
def test_a_signature_is_timed_under_the_autocast_it_was_seen_under(name):
    shape = Shape(8, 16, 16, "float32", "float32", name, True)
    key = dataclasses.replace(signature(), shape=shape)
    with torch.autocast("cpu", torch.float16):
        result = measure(sample(key), RecordingRecipe(), CpuClock(), SHORT)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.float16
    assert result.failure is None
    assert Recorded.dtype is (torch.bfloat16 if name else torch.float32)


@pytest.mark.parametrize(
    "wanted", [(), ("input",), ("weight",), ("weight", "bias"), ("input", "bias")]
)
def test_only_the_gradients_of_the_signature_are_computed(wanted):
    grads = {f"grad_{x}": x in wanted for x in ("input", "weight", "bias")}
    result = measure(sample(signature(**grads)), RecordingRecipe(), CpuClock(), SHORT)
    assert result.failure is None
    assert Recorded.differentiated == set(wanted)


@pytest.mark.parametrize(("recompute", "forwards"), [(False, 1), (True, 2)])
def test_recompute_runs_forward_twice(recompute, forwards):
    measure(
        sample(signature(recompute=recompute)), RecordingRecipe(), CpuClock(), SHORT
    )
    assert Recorded.backwards > 8
    assert Recorded.forwards == forwards * Recorded.backwards


def test_a_small_signature_keeps_its_budget(scripted_clock):
    config = TuneConfig(max_seconds=0.3, max_samples=4096, confidence=1 - 1e-15)
    result = measured(scripted_clock(undecided()), config)
    spent_ms = sum(result.reference_ms + result.candidate_ms)
    # The last round began within the budget.
    assert 290 < spent_ms <= 300 + spent_ms / len(result.ratios) * 8


class WeightCasts(TorchDispatchMode):
    """Counts forwards of Linears with a bias, and casts of their weight to bfloat16."""

    def __init__(self, shape):
        super().__init__()
        self._shape = shape
        self.forwards = self.casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.addmm.default:
            self.forwards += 1
        elif func is torch.ops.aten._to_copy.default:
            self.casts += result.dtype is torch.bfloat16 and result.shape == self._shape
        return result


def test_autocast_casts_the_weight_every_time_that_is_timed():
    shape = Shape(8, 16, 48, "float32", "float32", "bfloat16", True)
    taken = sample(dataclasses.replace(signature(), shape=shape))
    with torch.autocast("cpu", torch.bfloat16), WeightCasts((48, 16)) as counted:
        assert measure(taken, RecordingRecipe(), CpuClock(), SHORT).failure is None
    assert counted.casts >= counted.forwards > 16


def test_many_signatures_compile_apart():
    backend = CountingBackend()
    # fullgraph makes Dynamo raise, not only warn, past its limit of 8.
    options = {"backend": backend, "fullgraph": True}
    keys = [signature(m=8, n=16 * i) for i in range(1, 7)]
    keys += [signature(m=8, n=16 * i, grad_input=False) for i in range(1, 7)]
    results = [
        measured(CpuClock(), taken=sample(key), compile_options=options) for key in keys
    ]
    assert [x.detail for x in results if x.failure] == []
    assert backend.compilations == 24


def test_measuring_leaves_the_users_compiled_functions_alone():
    taken, backend = sample(captured=False), CountingBackend()
    linear, input = taken.linear, torch.randn(8, 16)
    users_own = torch.compile(lambda x: linear(x) + 1, backend=backend)
    users_own(input)
    options = {"backend": "eager", "fullgraph": True}
    for m in (4, 8, 12):
        again = dataclasses.replace(taken, signature=signature(m=m))
        result = measured(CpuClock(), taken=again, compile_options=options)
        assert result.failure is None
    users_own(input)
    assert backend.compilations == 1


def test_a_candidate_that_is_twice_as_slow_is_timed_once_forth_and_back(scripted_clock):
    result = measured(scripted_clock(speedup(0.49)), TuneConfig())
    assert result.ratios == [pytest.approx(0.49)] * 2
    interval = interval_of(result.ratios, TuneConfig())
    assert interval == (0.0, pytest.approx(0.49), pytest.approx(0.98))


def test_twice_as_slow_is_not_enough_for_a_lower_threshold(scripted_clock):
    config = TuneConfig(min_speedup=0.9)
    assert len(measured(scripted_clock(speedup(0.46)), config).ratios) == 8
    assert len(measured(scripted_clock(speedup(0.44)), config).ratios) == 2


def test_one_lost_time_slice_stops_nothing(scripted_clock):
    times = itertools.chain([20.0], itertools.repeat(0.5))
    clock = scripted_clock(lambda _, v: 1.0 if v == "reference" else next(times))
    assert len(measured(clock, TuneConfig()).ratios) >= 8


class Renamed:
    """bf16 under another name."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, name):
        return getattr(BF16, name)


def test_who_is_twice_as_slow_leaves_the_others_to_be_timed(scripted_clock):
    times = {"reference": 1.0, "bf16": 0.9, "slow": 3.0}
    clock = scripted_clock(lambda _, variant: times[variant])
    recipes = [Renamed("slow"), BF16]
    slow, fast = measure_all(sample, recipes, clock, TuneConfig())
    assert (slow.recipe, len(slow.ratios)) == ("slow", 2)
    assert (fast.recipe, fast.ratios) == ("bf16", [1.0 / 0.9] * 8)


class Disturbed(CpuClock):
    """Every piece of work takes so many ms, in which its thread had a core for a share."""

    def __init__(self, reference, candidate):
        super().__init__()
        self.script = {"reference": reference, "bf16": candidate}

    def warm_up(self, work):
        pass

    def time_ms(self, work):
        self.shares = [self.script[x.variant][1] for x in work]
        return [self.script[x.variant][0] for x in work]


@pytest.mark.parametrize(
    ("reference", "candidate", "pairs"),
    [((1.0, 0.5), (9.0, 0.3), 2), ((1.0, 1.0), (3.0, 0.6), 128)],
)
def test_what_a_candidate_waited_is_not_held_against_it(reference, candidate, pairs):
    clock = Disturbed(reference, candidate)
    assert len(measured(clock, TuneConfig(max_seconds=60)).ratios) == pairs
