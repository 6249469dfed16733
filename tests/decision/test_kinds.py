"""Which M of a kind are timed, what they stand for, and who shares calls."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8tune.decision.curves import Point, point_at
from fp8tune.decision.intervals import Interval
from fp8tune.decision.kinds import (
    MOST_SIZES,
    fits_range,
    is_covered,
    kind_of,
    missing_m,
    representatives,
    stand_ins,
    work_of,
)
from fp8tune.decision.pooling import pool, sharing_of
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Layer
from tests.helpers import signature

CALLS = dict[int, int]


def layer(fqn: str, calls: CALLS, reason: Reason | None = None) -> Layer:
    rows = tuple((signature(m, 32, 64), count) for m, count in sorted(calls.items()))
    return Layer(fqn, 32, 64, "bfloat16", trains=True, reason=reason, calls=rows)


def calls_of(layer: Layer) -> CALLS:
    return {called.shape.m: count for called, count in layer.calls}


def test_a_kind_is_a_signature_without_its_m() -> None:
    one, other = signature(12, 32, 64), signature(812, 32, 64)
    assert kind_of(one) == kind_of(other)
    assert kind_of(one).at(812) == other
    assert kind_of(one) != kind_of(signature(12, 32, 32))
    assert kind_of(one) != kind_of(replace(one, grad_input=False))


def test_work_is_calls_times_m_over_all_layers() -> None:
    layers = [layer("a", {10: 3, 20: 1}), layer("b", {10: 1}), layer("c", {10: 1})]
    assert work_of(layers) == {kind_of(signature(1, 32, 64)): {10: 50, 20: 20}}


@pytest.mark.parametrize("sizes", [[7], [7, 9], [1, 5, 6, 4096]])
def test_up_to_four_m_are_all_timed(sizes: list[int]) -> None:
    assert representatives(dict.fromkeys(sizes, 1)) == sizes


def test_of_more_the_ends_and_two_where_the_work_is() -> None:
    work = dict.fromkeys([100, 110, 120, 5000, 5100, 5200, 8192], 1000)
    assert representatives(work) == [100, 110, 5100, 8192]


def test_the_smallest_calls_with_hardly_any_work_are_not_timed() -> None:
    work = {1: 1, 2: 1, 500: 400, 600: 500, 700: 500, 800: 400, 900: 400}
    assert representatives(work)[0] == 500
    assert representatives(work)[-1] == 900


@given(st.dictionaries(st.integers(1, 10**6), st.integers(1, 10**9), min_size=5))
def test_four_are_chosen_and_each_was_called(work: dict[int, int]) -> None:
    chosen = representatives(work)
    assert len(chosen) == 4
    assert set(chosen) <= work.keys()
    assert max(work) in chosen


def test_thousands_of_m_are_counted_in_few_and_the_ends_stay() -> None:
    sizes = sorted(random.Random(0).sample(range(3, 20_000), 5_000))  # noqa: S311
    instead = stand_ins(sizes)
    assert len(set(instead.values())) <= MOST_SIZES
    assert instead[sizes[0]] == sizes[0]
    assert instead[sizes[-1]] == sizes[-1]
    assert all(1 <= instead[m] / m < 1.1 for m in sizes[1:])


@pytest.mark.parametrize(
    ("m", "known", "covered"),
    [
        (512, [512], True),
        (513, [512], False),
        (512, [], False),
        (300, [256, 1024], True),
        (300, [256, 1025], False),
        (300, [16, 64, 256, 8192], True),
        (362, [64, 256], True),
        (363, [64, 256], False),
        (46, [64, 256], True),
        (45, [64, 256], False),
        (1, [12, 40], True),
    ],
)
def test_what_earlier_timings_stand_for(
    m: int, known: list[int], *, covered: bool
) -> None:
    assert is_covered(m, known) is covered


def test_one_m_needs_its_own_timing_and_a_range_does_not() -> None:
    known = [100, 200, 400, 800]
    assert missing_m({300: 1}, known) == [300]
    assert missing_m({300: 1, 301: 1}, known) == []
    assert missing_m({300: 1, 5000: 1}, known) == [5000]


@pytest.mark.parametrize(
    ("m", "planned", "fits"),
    [
        (32, [32], True),
        (33, [32], False),
        (33, [32, 64], True),
        (90, [32, 64], True),
        (91, [32, 64], False),
        (22, [32, 64], False),
        (23, [32, 64], True),
        (5, [], False),
    ],
)
def test_a_plan_holds_for_its_m_or_its_range(
    m: int, planned: list[int], *, fits: bool
) -> None:
    assert fits_range(m, planned) is fits


POINTS = [
    Point(100, 1.0, Interval(0.7, 0.8, 0.9)),
    Point(400, 4.0, Interval(1.1, 1.2, 1.3)),
]


def test_between_two_m_the_speedup_is_a_line_over_log_m() -> None:
    point, used = point_at(POINTS, 200)
    assert list(used) == POINTS
    assert point.speedup.middle == pytest.approx(1.0)
    assert point.time_ms == pytest.approx(2.0)
    # The bounds, moved apart by a tenth of the difference of 0.4.
    assert point.speedup.low == pytest.approx(0.9 - 0.04)
    assert point.speedup.high == pytest.approx(1.1 + 0.04)


def test_a_timed_m_is_itself() -> None:
    assert point_at(POINTS, 400) == (POINTS[1], [POINTS[1]])


def test_outside_the_nearest_counts_and_may_gain_more_above_and_less_below() -> None:
    point, used = point_at(POINTS, 800)
    assert list(used) == [POINTS[1]]
    assert point.speedup == pytest.approx((1.1, 1.2, 1.3 * 1.12))
    assert point.time_ms == pytest.approx(8.0)
    below = point_at(POINTS, 25)[0]
    assert below.speedup == pytest.approx((0.7 / 1.12**2, 0.8, 0.9))


def test_a_bound_that_too_few_pairs_could_not_set_stays_unset() -> None:
    open_end = Point(400, 4.0, Interval(0.0, 1.2, math.inf))
    speedup = point_at([POINTS[0], open_end], 200)[0].speedup
    assert speedup.low < 0.7
    assert speedup.high == math.inf


def test_experts_that_meet_many_m_share_their_calls() -> None:
    experts = [layer(f"experts.{i}", {600 + i: 1, 620 + i: 2}) for i in range(3)]
    pooled = pool([*experts, layer("router", {2048: 1})])
    together = {600: 1, 601: 1, 602: 1, 620: 2, 621: 2, 622: 2}
    assert [calls_of(x) for x in pooled] == [together] * 3 + [{2048: 1}]
    assert sharing_of([*experts, pooled[3]], pooled) == {x.fqn: 3 for x in experts}
    assert pool(pooled) == pooled


def test_layers_whose_ranges_do_not_touch_are_judged_apart() -> None:
    layers = [
        layer("a.0", {16: 1, 20: 1}),
        layer("a.1", {1000: 1, 1200: 1}),
        layer("a.2", {18: 1, 25: 1}),
    ]
    small, large, also_small = map(calls_of, pool(layers))
    assert small == also_small == {16: 1, 18: 1, 20: 1, 25: 1}
    assert large == {1000: 1, 1200: 1}


def test_layers_of_one_m_each_stay_as_they_are() -> None:
    layers = [layer("a.0", {8192: 3}), layer("a.1", {1024: 3}), layer("a.2", {})]
    assert pool(layers) == tuple(layers)


def test_other_names_and_other_kinds_share_nothing() -> None:
    first = layer("a.0.w1", {100: 1, 101: 1})
    other_name = layer("a.1.w2", {100: 1, 103: 1})
    left_out = layer("a.2.w1", {100: 1, 103: 1}, Reason.OUTPUT_LAYER)
    frozen = replace(layer("a.3.w1", {100: 1, 103: 1}), trains=False)
    layers = (first, other_name, left_out, frozen)
    assert pool(layers) == layers


def test_an_expert_that_no_token_chose_is_one_of_its_siblings() -> None:
    called = layer("experts.0", {100 + i: 1 for i in range(5)})
    lone = layer("experts.1", {})
    assert calls_of(pool([called, lone])[1]) == calls_of(called)


def test_a_layer_that_is_never_called_beside_fixed_sizes_stays_uncalled() -> None:
    lone = layer("a.1", {})
    assert pool([layer("a.0", {8192: 3, 17: 1}), lone])[1] == lone


def test_past_the_most_sizes_the_work_stays_the_same() -> None:
    calls = dict.fromkeys(range(100, 1100), 2)
    (pooled,) = pool([layer("a", calls)])
    found = calls_of(pooled)
    assert len(found) <= MOST_SIZES
    assert (min(found), max(found)) == (100, 1099)
    work = sum(m * n for m, n in calls.items())
    assert sum(m * n for m, n in found.items()) == pytest.approx(work, rel=0.02)
