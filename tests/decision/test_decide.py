"""Measurements -> decisions."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from fp8tune.config import TuneConfig
from fp8tune.decision.decide import decide
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Layer, Measurement, Verdict
from tests.helpers import signature

CONFIG = TuneConfig()


ONE_SHAPE = ((signature(1024, 512, 256), 3),)


def layer(fqn="wq", calls=ONE_SHAPE, reason=None):
    return Layer(fqn, 512, 256, "bfloat16", True, reason, calls)


def measured(ratios, key=None, candidate_ms=1.0):
    reference_ms = tuple(ratio * candidate_ms for ratio in ratios)
    times = (reference_ms, (candidate_ms,) * len(ratios))
    return Measurement(key or signature(1024, 512, 256), "rowwise", *times)


def failed(reason, detail, key=None):
    return Measurement(
        key or signature(1024, 512, 256), "rowwise", failure=reason, detail=detail
    )


def decide_all(layers, measurements, config=CONFIG):
    return decide(layers, measurements, ["rowwise"], config)


def decide_one(*measurements, config=CONFIG):
    calls = tuple((x.signature, 1) for x in measurements)
    (decision,) = decide_all([layer(calls=calls)], measurements, config)
    return decision


def test_a_layer_that_is_clearly_faster_is_converted():
    decision = decide_one(measured([1.5, 1.4, 1.6] * 4))
    assert decision.verdict is Verdict.CONVERTED
    assert decision.reason is Reason.FASTER
    assert decision.recipe == "rowwise"


def test_a_layer_that_is_clearly_slower_stays():
    decision = decide_one(measured([0.5, 0.4, 0.6] * 4))
    assert decision.verdict is Verdict.REFERENCE
    assert decision.reason is Reason.SLOWER
    assert decision.recipe is None


def test_a_layer_whose_interval_holds_the_threshold_stays():
    decision = decide_one(measured([0.9, 1.3] * 8))
    assert decision.verdict is Verdict.REFERENCE
    assert decision.reason is Reason.NO_CLEAR_DIFFERENCE


def test_a_faster_median_from_too_few_pairs_is_not_clear():
    decision = decide_one(measured([2.0] * 7))
    assert decision.reason is Reason.NO_CLEAR_DIFFERENCE
    assert decision.speedup == 2.0
    assert decision.speedup_low == 0.0
    assert decision.speedup_high is None


def test_one_slow_pair_among_eight_makes_a_gain_unclear():
    assert decide_one(measured([1.5] * 7 + [0.9])).verdict is Verdict.REFERENCE
    assert decide_one(measured([1.5] * 15 + [0.9])).verdict is Verdict.CONVERTED


@pytest.mark.parametrize("threshold", [1.0, 1.1])
@pytest.mark.parametrize(
    ("direction", "reason"),
    [
        (0, Reason.SLOWER),
        (None, Reason.NO_CLEAR_DIFFERENCE),
        (2, Reason.FASTER),
    ],
)
def test_min_speedup_must_be_passed_not_reached(threshold, direction, reason):
    ratio = threshold if direction is None else math.nextafter(threshold, direction)
    config = TuneConfig(min_speedup=threshold)
    assert decide_one(measured([ratio] * 8), config=config).reason is reason


def test_numbers_of_a_decision_are_those_of_its_measurement():
    ratios = [1.2, 1.25, 1.3, 1.5, 1.55, 1.6, 1.7, 1.8, 1.9]
    decision = decide_one(measured(ratios, candidate_ms=2.0))
    assert decision.speedup == pytest.approx(1.55)
    assert decision.speedup_low == pytest.approx(1.2)
    assert decision.speedup_high == pytest.approx(1.9)
    assert decision.reference_ms == pytest.approx(3.1)
    assert decision.candidate_ms == pytest.approx(2.0)
    assert decision.samples == 9


@pytest.mark.parametrize(
    ("many", "few", "speedup"),
    # 9 calls of 15 ms that gain 5 ms, against 1 call of 0.2 ms that loses as much again;
    # then the other way round, with 1000 of the latter.
    [(9, 1, 135.2 / 90.4), (1, 1000, 215.0 / 410.0)],
)
def test_signatures_weigh_as_much_as_their_calls_take(many, few, speedup):
    large, small = signature(8192, 512, 256), signature(16, 512, 256)
    calls = ((small, few), (large, many))
    measurements = [
        measured([1.5] * 8, large, candidate_ms=10.0),
        measured([0.5] * 8, small, candidate_ms=0.4),
    ]
    (decision,) = decide_all([layer(calls=calls)], measurements)
    assert decision.speedup == pytest.approx(speedup)
    assert decision.reason is (Reason.FASTER if speedup > 1 else Reason.SLOWER)
    total_ms = many * 15.0 + few * 0.2
    assert decision.reference_ms == pytest.approx(total_ms / (many + few))
    assert decision.samples == 16


def test_one_unbounded_signature_makes_the_layer_unclear():
    clear, unclear = measured([3.0] * 8), measured([3.0] * 7, signature(16, 512, 256))
    decision = decide_one(clear, unclear)
    assert decision.reason is Reason.NO_CLEAR_DIFFERENCE
    assert decision.speedup == pytest.approx(3.0)
    assert decision.speedup_low == 0.0


def test_a_layer_that_was_never_called_stays():
    (decision,) = decide_all([layer(calls=())], [measured([2.0] * 8)])
    assert decision.verdict is Verdict.REFERENCE
    assert decision.reason is Reason.NEVER_CALLED
    assert decision.speedup is None


def test_a_layer_that_was_left_out_keeps_its_reason():
    left_out = layer(reason=Reason.FILTERED_BY_NAME)
    (decision,) = decide_all([left_out], [measured([2.0] * 8)])
    assert decision.verdict is Verdict.REFERENCE
    assert decision.reason is Reason.FILTERED_BY_NAME


def test_a_failure_gives_its_reason_and_detail():
    decision = decide_one(failed(Reason.OUT_OF_MEMORY, "MemoryError: 3 GB"))
    assert decision.verdict is Verdict.REFERENCE
    assert decision.reason is Reason.OUT_OF_MEMORY
    assert decision.detail == "MemoryError: 3 GB"


def test_one_failed_signature_is_enough_to_stay():
    failure = failed(Reason.NOT_MEASURED, "ValueError: no", signature(16, 512, 256))
    decision = decide_one(measured([2.0] * 8), failure)
    assert decision.verdict is Verdict.REFERENCE
    assert decision.reason is Reason.NOT_MEASURED
    assert decision.detail == "ValueError: no"


def test_a_signature_without_measurement_is_not_measured():
    (decision,) = decide_all([layer()], [])
    assert decision.reason is Reason.NOT_MEASURED
    assert decision.detail == "no measurement of its signature"


def test_decisions_come_in_the_order_of_the_layers():
    names = ["head", "b", "a", "layers.10", "layers.9"]
    layers = [layer(name) for name in names]
    decisions = decide_all(layers, [measured([2.0] * 8)])
    assert [x.fqn for x in decisions] == names


def test_identical_layers_get_identical_decisions():
    layers = [layer(f"layers.{i}.wq") for i in range(32)]
    decisions = decide_all(layers, [measured([1.02, 0.99, 1.03] * 5)])
    assert len({replace(x, fqn="") for x in decisions}) == 1


def test_a_decision_keeps_what_its_layer_was_called_with():
    calls = ((signature(16, 512, 256), 2), (signature(1024, 512, 256), 3))
    kept = [layer(calls=calls), layer(calls=calls, reason=Reason.SMALL_KN)]
    decisions = decide_all(kept, [measured([2.0] * 8)])
    assert [x.signatures for x in decisions] == [calls, calls]


def test_deciding_needs_no_torch():
    code = "import sys, fp8tune.decision.decide; print('torch' in sys.modules)"
    run = subprocess.run(  # noqa: S603 - runs this one line
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"


def test_of_two_recipes_that_fail_alike_the_faster_one_is_nearest():
    slow = [
        Measurement(signature(1024, 512, 256), name, (1.0,) * 8, (candidate_ms,) * 8)
        for name, candidate_ms in (("worse", 3.0), ("better", 2.0))
    ]
    for order in (["worse", "better"], ["better", "worse"]):
        (decision,) = decide([layer()], slow, order, CONFIG)
        assert decision.reason is Reason.SLOWER
        assert decision.nearest == "better"
        assert decision.speedup == 0.5
