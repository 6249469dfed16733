"""Merging what ranks measured; the processes that do so are in test_ranks.py."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from fp8tune import RankMismatchError, Reason
from fp8tune.consensus import (
    RankTable,
    check_layers,
    first_difference,
    merge_calls,
    merge_measurements,
)
from fp8tune.records import Layer, Measurement, Shape, Signature


def signature(n: int = 64) -> Signature:
    shape = Shape(128, 32, n, "bfloat16", "bfloat16", None, bias=False)
    return Signature(shape, grad_input=True, grad_weight=True, grad_bias=False)


def layer(fqn: str, *calls: tuple[Signature, int], n: int = 64) -> Layer:
    return Layer(fqn, 32, n, "bfloat16", trains=True, reason=None, calls=calls)


def timed(reference: float, candidate: float, n: int = 64) -> Measurement:
    return Measurement(signature(n), "rowwise", (reference,) * 8, (candidate,) * 8)


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
    failed = Measurement(signature(), "rowwise", failure=Reason.OUT_OF_MEMORY)
    merged, (spread,) = merge_measurements([table(timed(1.0, 0.5)), table(failed)])
    assert merged == [failed]
    assert spread.slowest_rank == 0


def test_what_one_rank_alone_timed_has_no_spread() -> None:
    merged, spreads = merge_measurements([table(timed(1.0, 0.5)), table()])
    assert merged == [timed(1.0, 0.5)]
    assert spreads == []


def test_calls_are_those_of_the_busiest_rank() -> None:
    ragged = signature(48)
    tables = [
        RankTable((layer("a", (signature(), 3)), layer("b")), ()),
        RankTable((layer("a", (signature(), 2), (ragged, 1)), layer("b")), ()),
    ]
    merged = merge_calls(tables[0].layers, tables)
    assert merged[0].calls == ((ragged, 1), (signature(), 3))
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
    code = "import sys, fp8tune.consensus; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603
