"""What recipes cost in accuracy and memory, and decisions that depend on it."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, ConfigError, Objective, Reason, TuneConfig
from fp8tune.config import TuneConfig as Config
from fp8tune.decision.decide import decide
from fp8tune.decision.records import (
    REFERENCE,
    Accuracy,
    Layer,
    Measurement,
    Shape,
    Signature,
)
from fp8tune.model.candidates import Sample
from fp8tune.recipes import get_recipe
from fp8tune.report.messages import measurement_line
from fp8tune.report.recipes import LOW_SQNR_DB
from fp8tune.timing import accuracy
from fp8tune.timing.accuracy import SQNR_LIMIT_DB, _full_precision
from fp8tune.timing.measure import measure, measure_all
from tests.helpers import TORCHAO_0_17, needs_mxfp8

NAMES = ["rowwise", "tensorwise", "rowwise_with_gw_hp", "bf16"]
NAMES += [] if TORCHAO_0_17 else ["mxfp8_rceil"]


def faster(_, variant):
    return 2.0 if variant == REFERENCE else 1.0


def sample(dtype="float32", m=48, k=64, n=96, scale=1.0, **changes):
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    signature = Signature(
        Shape(m, k, n, dtype, dtype, None, False),
        **{"grad_input": True, "grad_weight": True, "grad_bias": False, **changes},
    )
    linear = nn.Linear(k, n, bias=False).to(kind)
    # Of several dimensions, as activations are.
    x = (torch.randn(3, m // 3, k) * scale).to(kind)
    return Sample(signature, linear, x, (torch.randn(3, m // 3, n) / m).to(kind))


def accuracies(taken, clock, names=NAMES, config=TuneConfig()):  # noqa: B008
    recipes = [get_recipe(name, "cpu") for name in names]
    found = measure_all(lambda: taken, recipes, clock(faster), config)
    assert [x.detail for x in found] == [""] * len(found)
    return {x.recipe: x.accuracy for x in found}


def exact_sqnr_db(taken, recipe):
    """By another route: autograd through a converted layer, against float64."""
    linear = nn.Linear(taken.signature.shape.k, taken.signature.shape.n, bias=False)
    linear.weight = nn.Parameter(taken.linear.weight.detach().clone())
    get_recipe(recipe, "cpu").convert(linear)
    x = taken.input.clone().requires_grad_()
    output = linear(x)
    output.backward(taken.grad_output.to(output.dtype))
    x64 = taken.input.double().requires_grad_()
    w64 = taken.linear.weight.detach().double().requires_grad_()
    y64 = x64 @ w64.T
    y64.backward(taken.grad_output.double())
    return [
        10 * math.log10(exact.square().sum() / (found.double() - exact).square().sum())
        for found, exact in (
            (output.detach(), y64.detach()),
            (x.grad, x64.grad),
            (linear.weight.grad, w64.grad),
        )
    ]


@pytest.mark.parametrize("cells", [None, 300], ids=["at once", "block by block"])
@pytest.mark.parametrize(
    "recipe", [*NAMES, pytest.param("mxfp8_floor", marks=needs_mxfp8)]
)
def test_sqnr_is_that_of_float64(working_clock, monkeypatch, recipe, cells):
    if cells:
        monkeypatch.setattr(accuracy, "_LEAST_BYTES", 4 * cells)
    taken = sample()
    config = TuneConfig(capture_bytes=0)
    found = accuracies(taken, working_clock, [recipe], config)[recipe]
    ours = [found.output_db, found.grad_input_db, found.grad_weight_db]
    # What is computed in float32 itself is as exact as the yardstick.
    theirs = [min(x, 120) for x in exact_sqnr_db(taken, recipe)]
    assert [min(x, 120) for x in ours] == pytest.approx(theirs, abs=0.1)
    assert found.worst_db == min(ours)


def test_sqnr_of_a_bfloat16_model_counts_the_rounding_of_its_results(working_clock):
    taken = sample("bfloat16")
    found = accuracies(taken, working_clock, ["rowwise"])["rowwise"]
    ours = [found.output_db, found.grad_input_db, found.grad_weight_db]
    assert ours == pytest.approx(exact_sqnr_db(taken, "rowwise"), abs=0.1)


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_the_users_choice_of_a_faster_float32_does_not_count(working_clock, precision):
    expected = accuracies(sample(), working_clock, ["bf16"])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = accuracies(sample(), working_clock, ["bf16"])
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert found["bf16"].worst_db == pytest.approx(expected["bf16"].worst_db, abs=0.1)


def test_only_what_training_computes_has_an_sqnr(working_clock):
    taken = sample(grad_input=False)
    found = accuracies(taken, working_clock, ["rowwise"])["rowwise"]
    assert found.grad_input_db is None
    assert found.worst_db == min(found.output_db, found.grad_weight_db)


def test_a_recipe_that_changes_nothing_has_the_highest_sqnr(working_clock):
    class Same:
        name = "same"

        def convert(self, linear):
            pass

    taken = sample()
    found = measure(taken, Same(), working_clock(faster), TuneConfig())
    assert found.accuracy.worst_db > 100
    assert found.accuracy.underflow is None
    zeros = Sample(taken.signature, taken.linear, taken.input * 0, taken.grad_output)
    found = measure(zeros, Same(), working_clock(faster), TuneConfig())
    assert found.accuracy.output_db == SQNR_LIMIT_DB


def test_a_result_that_is_not_a_number_has_the_lowest_sqnr(working_clock):
    class Broken:
        name = "broken"

        def convert(self, linear):
            linear.register_forward_hook(lambda *x: x[2] * math.nan)

    found = measure(sample(), Broken(), working_clock(faster), TuneConfig())
    assert found.accuracy.worst_db == -SQNR_LIMIT_DB


def test_nothing_is_known_of_products_whose_operands_are_not_finite(working_clock):
    taken = sample()
    taken.input[0, 0, 0] = math.inf
    found = accuracies(taken, working_clock, ["rowwise"])["rowwise"]
    assert (found.output_db, found.grad_weight_db) == (None, None)
    assert found.grad_input_db > 20
    assert found.underflow is None


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_gradients_that_overflow_in_high_precision_are_compared_at_a_smaller_scale(
    working_clock, scale
):
    taken = sample("float16")
    taken.grad_output.mul_(48).clamp_(-1, 1).mul_(min(scale, 2.0**15))
    found = accuracies(taken, working_clock, ["rowwise"])["rowwise"]
    ours = [found.output_db, found.grad_input_db, found.grad_weight_db]
    assert min(ours) > 25


@pytest.mark.parametrize("scale", [1e-30, 1e34])
def test_gradients_whose_squares_float32_cannot_hold(working_clock, scale):
    expected = accuracies(sample(), working_clock, ["bf16"])["bf16"]
    taken = sample()
    taken.grad_output.mul_(scale)
    found = accuracies(taken, working_clock, ["bf16"])["bf16"]
    assert found.grad_weight_db == pytest.approx(expected.grad_weight_db, abs=0.5)
    assert found.grad_input_db == pytest.approx(expected.grad_input_db, abs=0.5)


def test_what_was_never_finite_is_unknown_and_not_held_against_a_recipe(working_clock):
    taken = replace(sample(), grad_output=None, finite=False)
    found = measure(
        taken, get_recipe("rowwise", "cpu"), working_clock(faster), Config()
    )
    assert found.accuracy.worst_db is None
    layer = Layer("a", 64, 96, "float32", True, None, ((taken.signature, 1),))
    config = TuneConfig(min_sqnr_db=20)
    (decision,) = decide([layer], [found], ["rowwise"], config)
    assert decision.reason is Reason.FASTER
    assert decision.sqnr_db is None
    assert "SQNR unknown, no finite numbers" in measurement_line(found, config)


def test_values_below_the_smallest_are_counted(working_clock):
    taken = sample()
    # The scale maps 1.0 to 448; 1e-7 becomes 4.5e-5, far below e4m3's smallest, 2e-3.
    taken.input.fill_(1e-7)
    taken.input[..., ::4] = 1.0
    taken.linear.weight.data.fill_(1.0)
    taken.grad_output.fill_(1.0)
    found = accuracies(taken, working_clock, ["tensorwise", "rowwise"])
    # The input is cast for two of the three GEMMs.
    input, weight, grad = 48 * 64, 96 * 64, 48 * 96
    share = 2 * 0.75 * input / (2 * (input + weight + grad))
    assert found["tensorwise"].underflow == pytest.approx(share)
    # For grad_weight each column has a scale of its own.
    assert found["rowwise"].underflow == pytest.approx(share / 2)
    assert found["rowwise"].saturation == 0


@needs_mxfp8
def test_values_beyond_the_largest_are_counted(working_clock):
    taken = sample()
    # 500 lies above e4m3's largest value, 448, and below the next power of two.
    for tensor in (taken.input, taken.linear.weight.data, taken.grad_output):
        tensor.fill_(256.0)
    taken.input[..., 0] = 500.0
    found = accuracies(taken, working_clock, ["mxfp8_floor", "mxfp8_rceil"])
    input, weight, grad = 48 * 64, 96 * 64, 48 * 96
    share = 2 * 48 / (2 * (input + weight + grad))
    # grad_weight pads M from 48 to 64 with zeros, which count for nothing.
    assert found["mxfp8_floor"].saturation == pytest.approx(share)
    assert found["mxfp8_rceil"].saturation == 0


def test_a_scripted_clock_computes_nothing(scripted_clock):
    with torch.device("meta"):
        taken = sample(m=3 * 2**20, k=2**20, n=2**20)
    found = measure(taken, get_recipe("bf16", "cpu"), scripted_clock(faster), Config())
    assert found.failure is None
    assert found.accuracy is None


def test_measuring_accuracy_leaves_the_tensors_alone(working_clock):
    taken = sample()
    tensors = [taken.input, taken.linear.weight, taken.grad_output]
    before = [x.detach().clone() for x in tensors]
    accuracies(taken, working_clock)
    assert all(map(torch.equal, tensors, before))
    assert taken.linear.weight.grad is None


# One outlier, in a token that the loss does not look at: everything else that tensorwise
# casts with it becomes zero, while rowwise keeps it apart.


def tuned_with_outlier(clock, recipe, **config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 64, bias=False))
    options = TuneConfig(static_filter="divisible", **config)
    auto = AutoFloat8(model, recipe, clock=clock, config=options)
    x = torch.randn(64, 512) * 0.01
    x[0, 0] = 1e4
    auto(x)[1:].square().sum().backward()
    auto.freeze()
    return auto.plan["0"]


def tensorwise_first(_, variant):
    return {"tensorwise": 1.0, "rowwise": 1.5}.get(variant, 2.0)


def test_an_outlier_costs_tensorwise_its_accuracy(working_clock):
    decision = tuned_with_outlier(
        working_clock(tensorwise_first), ["rowwise", "tensorwise"]
    )
    rowwise, tensorwise = decision.variants
    assert rowwise.sqnr_db > 20
    assert tensorwise.sqnr_db < rowwise.sqnr_db - 15
    assert tensorwise.underflow > 0.1 > rowwise.underflow
    assert decision.recipe == "tensorwise"


def test_min_sqnr_db_picks_rowwise_although_tensorwise_is_faster(working_clock):
    clock = working_clock(tensorwise_first)
    names = ["rowwise", "tensorwise"]
    decision = tuned_with_outlier(clock, names, min_sqnr_db=20)
    assert decision.recipe == "rowwise"
    assert decision.variants[1].reason is Reason.ACCURACY
    assert "min_sqnr_db is 20" in decision.variants[1].detail


def test_where_no_recipe_is_accurate_enough_accuracy_is_the_reason(working_clock):
    clock = working_clock(tensorwise_first)
    decision = tuned_with_outlier(clock, ["tensorwise"], min_sqnr_db=20)
    assert decision.recipe is None
    assert decision.reason is Reason.ACCURACY


def test_a_low_sqnr_is_warned_of(working_clock, caplog):
    tuned_with_outlier(working_clock(tensorwise_first), ["tensorwise"])
    (line,) = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert "0: tensorwise has an SQNR of" in line
    caplog.clear()
    tuned_with_outlier(working_clock(tensorwise_first), ["rowwise"])
    assert not any("SQNR of" in x for x in caplog.messages)


# Decisions from records.

SEEN = sample().signature


def measured(recipe, gain=2.0, *, sqnr=30.0, memory=None, signature=SEEN, spread=0.0):
    """32 pairs whose speedup is the gain, give or take the spread."""
    times = [1.0 / gain * (1 + spread * (-1) ** i) for i in range(32)]
    accuracy = None if sqnr is None else Accuracy(sqnr, sqnr + 1, sqnr + 2, 0.0, 0.0)
    return Measurement(
        signature,
        recipe,
        (1.0,) * 32,
        tuple(times),
        accuracy=accuracy,
        reference_bytes=memory and 1000,
        candidate_bytes=memory,
    )


def decided(*measurements, **config):
    calls = tuple((x, 1) for x in dict.fromkeys(x.signature for x in measurements))
    layer = Layer("wq", 64, 96, "float32", True, None, calls)
    names = list(dict.fromkeys(x.recipe for x in measurements))
    (decision,) = decide([layer], measurements, names, TuneConfig(**config))
    return decision


def reasons(decision):
    return [x.reason for x in decision.variants]


def test_the_faster_recipe_wins_even_if_it_is_less_accurate():
    decision = decided(measured("a", 1.5, sqnr=40), measured("b", 1.6, sqnr=20))
    assert decision.recipe == "b"
    assert reasons(decision) == [Reason.NOT_THE_FASTEST, Reason.FASTER]


def test_without_a_clear_difference_the_more_accurate_wins():
    noisy = {"spread": 0.1}
    decision = decided(
        measured("a", 1.50, sqnr=30, **noisy), measured("b", 1.49, sqnr=31)
    )
    assert decision.recipe == "b"
    assert reasons(decision) == [Reason.LESS_ACCURATE, Reason.FASTER]
    assert decision.sqnr_db == 31


def test_without_accuracies_the_faster_median_wins():
    noisy = {"spread": 0.1, "sqnr": None}
    decision = decided(measured("a", 1.49, **noisy), measured("b", 1.53, sqnr=None))
    assert decision.recipe == "b"
    assert reasons(decision) == [Reason.NOT_THE_FASTEST, Reason.FASTER]


@pytest.mark.parametrize(("wanted", "recipe"), [(30.0, "a"), (30.001, None)])
def test_min_sqnr_db_may_be_reached_but_not_missed(wanted, recipe):
    assert decided(measured("a", sqnr=30.0), min_sqnr_db=wanted).recipe == recipe


def test_an_unknown_accuracy_is_not_enough():
    decision = decided(measured("a", sqnr=None), min_sqnr_db=1)
    assert decision.reason is Reason.ACCURACY
    assert decision.detail == "its accuracy is not known, and min_sqnr_db is 1"


def test_the_worst_signature_counts():
    other = sample(m=96).signature
    pair = [measured("a", sqnr=30), measured("a", sqnr=10, signature=other)]
    assert decided(*pair).sqnr_db == 10
    assert decided(*pair, min_sqnr_db=20).reason is Reason.ACCURACY


@pytest.mark.parametrize(("sqnr", "warned"), [(14.99, 1), (15.0, 1), (15.01, 0)])
def test_15_db_and_under_are_warned_of(sqnr, warned):
    from fp8tune.report.recipes import accuracy_lines  # noqa: PLC0415

    assert LOW_SQNR_DB == 15
    assert len(accuracy_lines([("wq", decided(measured("a", sqnr=sqnr)))])) == warned
    slower = decided(measured("a", 0.5, sqnr=sqnr))
    assert accuracy_lines([("wq", slower)]) == []


MEMORY = {"objective": "memory"}


def test_memory_is_saved_where_time_is_not():
    assert decided(measured("a", 1.0, memory=800)).recipe is None
    decision = decided(measured("a", 1.0, memory=800), **MEMORY)
    assert (decision.recipe, decision.reason) == ("a", Reason.LESS_MEMORY)
    assert (decision.reference_bytes, decision.candidate_bytes) == (1000, 800)


@pytest.mark.parametrize("memory", [1000, 1001])
def test_as_much_memory_is_no_gain(memory):
    decision = decided(measured("a", 2.0, memory=memory), **MEMORY)
    assert decision.reason is Reason.MORE_MEMORY


def test_the_recipe_of_least_memory_wins():
    decision = decided(
        measured("a", 3.0, memory=900), measured("b", 1.2, memory=800), **MEMORY
    )
    assert decision.recipe == "b"
    assert reasons(decision) == [Reason.MORE_MEMORY, Reason.LESS_MEMORY]


def test_memory_is_not_saved_at_any_price():
    slow = measured("a", 0.9, memory=800)
    assert decided(slow, **MEMORY).reason is Reason.SLOWER
    assert decided(slow, **MEMORY, min_speedup=0.8).recipe == "a"


def test_on_a_cpu_no_memory_is_known():
    decision = decided(measured("a"), **MEMORY)
    assert decision.reason is Reason.NOT_MEASURED
    assert decision.detail == "peak memory is measured on GPUs only"


def test_the_objectives_are_these():
    assert list(Objective) == ["time", "memory"]
    with pytest.raises(ConfigError, match="choose one of 'time', 'memory'"):
        TuneConfig(objective="speed")


def test_the_table_tells_accuracy_and_memory(working_clock):
    auto = AutoFloat8(
        nn.Sequential(nn.Linear(64, 64)),
        ["bf16", "rowwise"],
        clock=working_clock(lambda _, x: {"bf16": 1.0, "rowwise": 3.0}.get(x, 2.0)),
        config=TuneConfig(static_filter="divisible"),
    )
    auto(torch.randn(8, 64)).sum().backward()
    lines = [" ".join(x.split()) for x in str(auto.freeze()).splitlines()]
    assert lines[0].endswith("speedup SQNR dB peak MiB verdict")
    sqnr = auto.plan["0"].sqnr_db
    assert lines[2].endswith(f"[2.00, 2.00] {sqnr:.1f} - bf16: faster")
    assert lines[3].endswith("- not rowwise: slower")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is known on GPUs")
def test_peak_memory_of_each_variant_is_measured():
    m, k, n = 4096, 1024, 1024
    linear = nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    shape = Shape(m, k, n, "bfloat16", "bfloat16", None, False)
    signature = Signature(shape, grad_input=True, grad_weight=True, grad_bias=False)
    from fp8tune.timing.clocks import clock_for  # noqa: PLC0415

    device = torch.device("cuda")
    found = measure(
        Sample(signature, linear, x, grad),
        get_recipe("rowwise", device),
        clock_for(device),
        TuneConfig(),
    )
    # The output, and the gradients of input and weight, all in bfloat16.
    least = 2 * (m * n + m * k + n * k)
    assert found.reference_bytes >= least
    assert found.candidate_bytes >= least


@pytest.mark.parametrize("general", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("own", ["none", "ieee", "tf32"])
def test_a_precision_that_was_inherited_is_inherited_afterwards(general, own):
    backends = (torch.backends, torch.backends.cuda.matmul)
    before = [x.fp32_precision for x in backends]
    try:
        torch.backends.fp32_precision = general
        torch.backends.cuda.matmul.fp32_precision = own
        with _full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.fp32_precision == general
        torch.backends.fp32_precision = "tf32"
        follows = torch.backends.cuda.matmul.fp32_precision
        assert follows == ("tf32" if own == "none" else own)
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
