"""Orders of rounds that give every participant the same company."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from fp8tune.decision.rounds import balanced_order


@pytest.mark.parametrize("number", range(2, 10))
def test_each_follows_each_other_equally_often(number: int) -> None:
    rounds = [balanced_order(number, turn) for turn in range(2 * number)]
    followers = Counter(pair for order in rounds for pair in pairwise(order))
    assert len(followers) == number * (number - 1)
    assert set(followers.values()) == {2}


@pytest.mark.parametrize("number", range(1, 10))
def test_everyone_runs_once_a_round(number: int) -> None:
    for turn in range(20):
        assert sorted(balanced_order(number, turn)) == list(range(number))
