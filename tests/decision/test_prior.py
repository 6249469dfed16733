"""What a table lets expect: true in most cells that are held out, and rarely opposite."""

from __future__ import annotations

import itertools
import random

import pytest

from fp8tune.decision.intervals import Interval
from fp8tune.decision.prior import Table, expect_near
from fp8tune.store.tables import published_table
from tests.decision.test_published_table import cells

SPEEDUPS = {(m, k, n): speedup for m, k, n, speedup in cells()}
AXES = [sorted(set(axis)) for axis in zip(*SPEEDUPS, strict=True)]


def table(speedups: dict[tuple[int, int, int], float]) -> Table:
    return Table("rowwise", "", "", speedups)


def test_the_table_of_the_package_is_torchaos() -> None:
    found = published_table("rowwise")
    assert found is not None
    assert found.speedups == SPEEDUPS
    assert published_table("bf16") is None


def test_a_shape_of_the_table_is_what_the_table_says() -> None:
    for shape, speedup in SPEEDUPS.items():
        low, middle, high = table(SPEEDUPS).expect(*shape)
        assert (low, middle, high) == pytest.approx(
            (speedup / 1.02, speedup, speedup * 1.02)
        )


def test_between_two_shapes_it_is_between_their_speedups() -> None:
    two = table({(16, 16, 16): 1.0, (64, 16, 16): 1.5})
    assert two.expect(32, 16, 16) == pytest.approx((1 / 1.02, 1.25, 1.5 * 1.02))


def test_outside_of_the_table_less_is_sure() -> None:
    one = table({(16, 16, 16): 1.5})
    assert one.expect(16, 16, 16).verdict(1.0) == "faster"
    assert one.expect(16, 8, 2).verdict(1.0) == "unsure"
    assert one.expect(16, 16, 16).verdict(2.0) == "slower"


def test_every_other_size_held_out() -> None:
    held_out = inside = 0
    clear: list[bool] = []
    for first in itertools.product((0, 1), repeat=3):
        kept = [set(axis[x::2]) for axis, x in zip(AXES, first, strict=True)]
        known = {
            shape: speedup
            for shape, speedup in SPEEDUPS.items()
            if all(x in axis for x, axis in zip(shape, kept, strict=True))
        }
        for shape in SPEEDUPS.keys() - known:
            speedup, found = SPEEDUPS[shape], table(known).expect(*shape)
            held_out += 1
            inside += found.low <= speedup <= found.high
            verdict = found.verdict(1.0)
            if verdict != "unsure":
                right = (verdict == "faster") == (speedup > 1)
                clear.append(right or 0.98 <= speedup <= 1.02)
    assert inside / held_out > 0.85
    assert len(clear) / held_out > 0.6
    assert clear.count(False) <= 2


def test_other_shapes_say_less_the_further_they_are() -> None:
    known = [((64, 64, 64), Interval(1.4, 1.5, 1.6))]
    assert expect_near((64, 64, 64), known) == pytest.approx((1.4, 1.5, 1.6))
    found = expect_near((64, 64, 128), known)
    assert found == pytest.approx((1.4 / 1.2, 1.5, 1.6 * 1.2))
    assert found.verdict(1.0) == "faster"
    far = expect_near((64, 32, 128), known)
    assert far is not None
    assert far.verdict(1.0) == "unsure"
    assert expect_near((64, 32, 129), known) is None


def test_a_few_shapes_of_the_table_rarely_say_the_opposite_of_others() -> None:
    rng = random.Random(0)  # noqa: S311 - a choice, no secrets
    clear: list[bool] = []
    for number in (4, 8, 16) * 15:
        shapes = rng.sample(sorted(SPEEDUPS), number)
        pairs = [(x, SPEEDUPS[x]) for x in shapes]
        known = [(x, Interval(y / 1.02, y, y * 1.02)) for x, y in pairs]
        for shape in SPEEDUPS.keys() - set(shapes):
            found, speedup = expect_near(shape, known), SPEEDUPS[shape]
            verdict = found.verdict(1.0) if found else "unsure"
            if verdict != "unsure":
                right = (verdict == "faster") == (speedup > 1)
                clear.append(right or 0.98 <= speedup <= 1.02)
    assert len(clear) > 1000
    assert clear.count(False) / len(clear) < 0.01
