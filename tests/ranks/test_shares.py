"""Who times what: everything twice, where there are two, and nobody more than its part."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from fp8tune.decision.kinds import kind_of
from fp8tune.ranks.shares import Wish, agreed_clear, share_of
from tests.helpers import signature

if TYPE_CHECKING:
    from fp8tune.decision.records import Signature

BF16 = ("bf16",)


def wish(rank: int, wanted: list[Signature], *, splits: bool = True) -> Wish:
    return Wish(rank, splits, tuple((x, BF16) for x in wanted))


def shares(wishes: list[Wish], size: int | None = None) -> list[list[Signature] | None]:
    return [share_of(wishes, x.rank, size or len(wishes)) for x in wishes]


@pytest.mark.parametrize("number", [0, 1, 2, 5, 8, 13])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 64])
def test_each_signature_is_timed_by_two_and_no_rank_times_more_than_its_part(
    number: int, ranks: int
) -> None:
    wanted = [signature(128, 16 * (k + 1), 64) for k in range(number)]
    found = shares([wish(x, wanted) for x in range(ranks)])
    timed = Counter(x for share in found for x in share)
    assert set(timed) == set(wanted)
    assert all(count >= min(2, ranks) for count in timed.values())
    for share in found:
        assert len(share) == len(set(share)) <= min(number, -(-2 * number // ranks))


def test_two_ranks_time_all_and_begin_apart() -> None:
    wanted = [signature(128, 16 * (k + 1), 64) for k in range(6)]
    first, second = shares([wish(0, wanted), wish(1, wanted)])
    assert first == wanted
    assert second == wanted[3:] + wanted[:3]


def test_the_sizes_of_a_kind_stay_together() -> None:
    wanted = [signature(m, k, 64) for k in (16, 32) for m in (8, 64, 512)]
    for share in shares([wish(x, wanted) for x in range(4)]):
        assert share in (wanted[:3], wanted[3:])


def test_stages_share_among_themselves_and_each_times_its_own_sizes() -> None:
    early = [signature(128, 16 * (k + 1), 64) for k in range(4)]
    late = [signature(128, 16, 16 * (n + 5)) for n in range(4)]
    other_rows = signature(17, 16, 999)
    rows = signature(18, 16, 999)
    wishes = [wish(x, [*early, other_rows]) for x in range(4)]
    wishes += [wish(x, [*late, rows]) for x in range(4, 8)]
    timed = Counter(x for share in shares(wishes) for x in share)
    assert set(timed) == {*early, *late, rows, other_rows}
    assert min(timed.values()) >= 2
    assert sum(timed.values()) < 8 * 5


def test_a_kind_that_ranks_met_with_other_rows_is_timed_by_all() -> None:
    wishes = [wish(x, [signature(100 + x, 64, 64)]) for x in range(3)]
    assert shares(wishes) == [[signature(100 + x, 64, 64)] for x in range(3)]


def test_other_recipes_are_timed_by_whoever_wants_them() -> None:
    wanted = signature(8, 64, 64)
    wishes = [Wish(x, splits=True, wanted=((wanted, BF16),)) for x in range(3)]
    wishes += [Wish(3, splits=True, wanted=((wanted, (*BF16, "rowwise")),))]
    assert shares(wishes)[3] == [wanted]


def test_nobody_leaves_a_part_to_ranks_that_may_not_come() -> None:
    wanted = [signature(128, 16 * (k + 1), 64) for k in range(6)]
    wishes = [wish(x, wanted) for x in range(4)]
    assert shares(wishes, size=5) == [None] * 4
    wishes[2] = wish(2, wanted, splits=False)
    assert shares(wishes) == [None] * 4


def test_what_any_rank_is_unsure_of_is_clear_for_none() -> None:
    wanted = [signature(128, 16 * (k + 1), 64) for k in range(3)]
    kinds = [kind_of(x) for x in wanted]
    names = tuple((x, BF16) for x in wanted)
    sure = Wish(0, splits=True, wanted=names, unsure=frozenset(kinds[:1]))
    # It has the second in its cache, but not clear.
    other = Wish(1, splits=True, wanted=names[:1], unsure=frozenset(kinds[:2]))
    assert agreed_clear([sure, other], 2) == {kinds[2]}
    assert agreed_clear([sure], 2) == frozenset()
    off = wish(1, wanted)
    assert agreed_clear([sure, off], 2) == frozenset()
