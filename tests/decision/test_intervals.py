"""The interval around a speedup: its bounds, and how often it holds the truth."""

import math
import random

import pytest

from fp8tune.decision.intervals import FIRST_LOOK, looks, speedup_interval

RATIOS = [1.3, 1.1, 1.6, 1.2, 1.5, 1.8, 1.4, 1.7]
TRUTH = 1.2
TRIALS = 1000


def noisy_ratio(rng):
    """A ratio whose median is TRUTH, with noise that is skewed and has no mean."""
    return TRUTH * (1 + 0.02 * (1 / (1 - rng.random()) - 2))


def holds_truth(ratios, confidence, number_of_looks=1):
    interval = speedup_interval(ratios, confidence, number_of_looks)
    return interval.low <= TRUTH <= interval.high


def covered_at_every_look(max_samples, corrected):
    """The share of runs whose interval never left out the truth as they grew."""
    rng = random.Random(3)  # noqa: S311 - noise, no secrets
    stops = looks(max_samples)
    divisor = len(stops) if corrected else 1
    covered = 0
    for _ in range(TRIALS):
        ratios = [noisy_ratio(rng) for _ in range(max_samples)]
        covered += all(holds_truth(ratios[:n], 0.95, divisor) for n in stops)
    return covered / TRIALS


def test_eight_pairs_bound_the_median_with_99_percent():
    assert speedup_interval(RATIOS, 0.99) == (1.1, pytest.approx(1.45), 1.8)


def test_seven_pairs_do_not_bound_the_median_with_99_percent():
    assert speedup_interval(RATIOS[:7], 0.99) == (0.0, 1.4, math.inf)


def test_bounds_end_where_the_extremes_err_just_too_often():
    # The median lies outside 8 samples with probability 2 / 2**8.
    exactly = 1 - 2 / 2**8
    assert speedup_interval(RATIOS, exactly).low == 1.1
    assert speedup_interval(RATIOS, math.nextafter(exactly, 1)).low == 0.0


# Ranks from the table of the sign test's 95% interval.
@pytest.mark.parametrize(("n", "rank"), [(10, 2), (20, 6), (30, 10), (50, 18)])
def test_ranks_are_those_of_the_sign_test(n, rank):
    interval = speedup_interval(list(range(1, n + 1)), 0.95)
    assert interval == (rank, (n + 1) / 2, n + 1 - rank)


def test_the_order_of_samples_does_not_matter():
    shuffled = speedup_interval(RATIOS, 0.9)
    assert shuffled == speedup_interval(sorted(RATIOS), 0.9)


def test_more_confidence_takes_a_wider_interval():
    ratios = [1 + i / 100 for i in range(32)]
    loose, strict = speedup_interval(ratios, 0.8), speedup_interval(ratios, 0.99)
    assert strict.low < loose.low
    assert strict.high > loose.high


def test_more_looks_take_a_wider_interval():
    ratios = [1 + i / 100 for i in range(32)]
    once, often = speedup_interval(ratios, 0.95), speedup_interval(ratios, 0.95, 5)
    assert often.low < once.low
    assert often.high > once.high


def test_the_first_look_can_already_be_clear():
    number = len(looks(128))
    assert speedup_interval(RATIOS[:FIRST_LOOK], 0.95, number).low > 1


@pytest.mark.parametrize("n", [8, 15, 64])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_the_truth_is_held_as_often_as_promised(n, confidence):
    rng = random.Random(1)  # noqa: S311 - noise, no secrets
    held = sum(
        holds_truth([noisy_ratio(rng) for _ in range(n)], confidence)
        for _ in range(TRIALS)
    )
    assert held / TRIALS >= confidence


def test_the_truth_is_held_as_often_as_promised_at_every_look():
    assert covered_at_every_look(128, corrected=True) >= 0.95


def test_without_counting_looks_the_truth_is_held_less_often_than_promised():
    assert covered_at_every_look(128, corrected=False) < 0.95


@pytest.mark.parametrize(
    ("max_samples", "stops"),
    [
        (8, [8]),
        (9, [8, 9]),
        (16, [8, 16]),
        (100, [8, 16, 32, 64, 100]),
        (128, [8, 16, 32, 64, 128]),
    ],
)
def test_looks_double_and_end_at_max_samples(max_samples, stops):
    assert looks(max_samples) == stops


def test_fewer_samples_than_the_first_look_are_refused():
    with pytest.raises(ValueError, match="max_samples is 7; it must be >= 8"):
        looks(7)


def test_no_ratios_are_refused():
    with pytest.raises(ValueError, match="no ratios"):
        speedup_interval([], 0.95)
