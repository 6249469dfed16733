"""Merging what ranks measured; the processes that do so are in test_ranks.py."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from fp8tune import RankMismatchError, Reason
from fp8tune.decision.records import Layer, Measurement, Signature
from fp8tune.ranks.consensus import (
    RankTable,
    check_layers,
    first_difference,
    merge_calls,
    merge_measurements,
)
from tests.helpers import signature


def layer(fqn: str, *calls: tuple[Signature, int], n: int = 64) -> Layer:
    return Layer(fqn, 32, n, "bfloat16", trains=True, reason=None, calls=calls)


def timed(reference: float, candidate: float, n: int = 64) -> Measurement:
    return Measurement(
        signature(128, 32, n), "rowwise", (reference,) * 8, (candidate,) * 8
    )


def table(*measurements: Measurement) -> RankTable:
    return RankTable((), measurements)


def test_the_slowest_ranks_pairs_count() -> None:
    tables = [table(timed(1.0, 0.5)), table(timed(2.0, 2.5)), table(timed(1.0, 0.9))]
    merged, (spread,) = merge_measurements(tables)
    assert merged == [timed(2.0, 2.5)]
    assert (spread.fastest_rank, spread.fastest_ms) == (0, 0.5)
    assert (spread.slowest_rank, spread.slowest_ms) == (1, 2.5)


def test_equal_ranks_are_settled_by_their_order() -> None:
    tables = [table(timed(1.0, 0.5)), table(timed(0.5, 1.0))]
    assert merge_measurements(tables)[0] == [timed(1.0, 0.5)]


def test_a_failure_on_one_rank_is_everybodys() -> None:
    failed = Measurement(
        signature(128, 32, 64), "rowwise", failure=Reason.OUT_OF_MEMORY
    )
    merged, (spread,) = merge_measurements([table(timed(1.0, 0.5)), table(failed)])
    assert merged == [failed]
    assert spread.slowest_rank == 0


def test_a_part_of_a_recipe_counts_only_if_every_rank_timed_it() -> None:
    whole, both = timed(1.0, 1.5), replace(timed(1.0, 0.8), recipe="rowwise:output")
    one = replace(both, recipe="rowwise:grad_input")
    slower = replace(both, reference_ms=(2.0,) * 8)
    tables = [table(whole, both, one), table(whole, slower)]
    assert merge_measurements(tables)[0] == [whole, slower]
    # Where a part itself is what was asked for, there is no whole beside it.
    alone = [table(one), table(one)]
    assert merge_measurements(alone)[0] == [one]


def test_what_one_rank_alone_timed_has_no_spread() -> None:
    merged, spreads = merge_measurements([table(timed(1.0, 0.5)), table()])
    assert merged == [timed(1.0, 0.5)]
    assert spreads == []


def test_calls_are_those_of_the_busiest_rank() -> None:
    ragged = signature(128, 32, 48)
    tables = [
        RankTable((layer("a", (signature(128, 32, 64), 3)), layer("b")), ()),
        RankTable(
            (layer("a", (signature(128, 32, 64), 2), (ragged, 1)), layer("b")), ()
        ),
    ]
    merged = merge_calls(tables[0].layers, tables)
    assert merged[0].calls == ((ragged, 1), (signature(128, 32, 64), 3))
    assert merged[1].calls == ()
    assert merged == merge_calls(tables[1].layers, tables)


def test_equal_and_disjoint_ranks_are_accepted() -> None:
    first, second = (layer("0"), layer("1")), (layer("2"), layer("3"))
    check_layers([first, second, first, second])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((layer("0"),), "ranks 0 and 1 share layers, but '1' is on one only"),
        ((layer("1"), layer("0")), "ranks 0 and 1 share layers, but their order"),
        ((layer("0"), layer("1", n=80)), "1.n is 64 on rank 0 and 80 on rank 1"),
        (
            (replace(layer("0"), reason=Reason.SMALL_KN), layer("1")),
            "0.reason is None on rank 0 and .* on rank 1",
        ),
    ],
)
def test_a_different_layer_list_is_named(
    other: tuple[Layer, ...], message: str
) -> None:
    with pytest.raises(RankMismatchError, match=message):
        check_layers([(layer("0"), layer("1")), other])


def test_the_first_difference_in_settings_is_named() -> None:
    ranks = [
        {"recipe": "rowwise", "torch": "2.13"},
        {"recipe": "rowwise", "torch": "3"},
    ]
    assert first_difference(ranks) == "torch is '2.13' on rank 0 and '3' on rank 1"
    assert first_difference(ranks[:1] * 3) is None


def test_merging_needs_no_torch() -> None:
    code = "import sys, fp8tune.ranks.consensus; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603


def ran(sizes: list[int], ms_per_row: float) -> RankTable:
    """A rank that timed these M, in proportion to M."""
    return table(
        *(
            Measurement(
                signature(m, 32, 64),
                "rowwise",
                (m * ms_per_row,) * 8,
                (m * ms_per_row / 2,) * 8,
            )
            for m in sizes
        )
    )


def test_of_ranks_that_timed_other_m_the_slowest_counts_and_the_ends_stay() -> None:
    tables = [ran([10, 200, 300, 900], 1.0), ran([20, 210, 310, 800], 1.1)]
    merged, spreads = merge_measurements(tables)
    assert [x.signature.shape.m for x in merged] == [10, 20, 210, 310, 800, 900]
    assert spreads == []


def test_a_rank_that_timed_few_m_is_filled_up_by_the_others() -> None:
    tables = [ran([10, 200, 300, 900], 1.0), ran([20], 1.1)]
    merged, _ = merge_measurements(tables)
    assert [x.signature.shape.m for x in merged] == [10, 20, 300, 900]


def test_up_to_four_m_in_all_are_all_kept() -> None:
    tables = [ran([10, 900], 1.0), ran([20, 800], 1.1)]
    merged, _ = merge_measurements(tables)
    assert [x.signature.shape.m for x in merged] == [10, 20, 800, 900]


def test_an_m_that_failed_on_a_fast_rank_failed() -> None:
    failed = Measurement(
        signature(1000, 32, 64), "rowwise", failure=Reason.OUT_OF_MEMORY
    )
    fast = RankTable((), (*ran([10, 200, 900], 1.0).measurements, failed))
    merged, _ = merge_measurements([fast, ran([20, 210, 310, 800], 1.1)])
    assert failed in merged
