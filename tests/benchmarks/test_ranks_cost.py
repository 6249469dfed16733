"""What 1,024 ranks exchange at the freeze. Figures are in docs/measurements/ranks.md.

One process stands in for all: it packs each rank's table as that rank would, and then
does what every rank does with all of them.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fp8tune import TuneConfig
from fp8tune.decision.decide import decide
from fp8tune.decision.records import Layer, Measurement
from fp8tune.ranks.consensus import (
    RankTable,
    check_layers,
    merge_calls,
    merge_measurements,
)
from fp8tune.ranks.group import pack, unpack
from tests.helpers import signature

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from fp8tune.decision.records import Decision

RANKS = 1024
PAIRS = 64
BLOCKS = 32  # of 7 Linears, and the output layer: 225

# K and N of Llama3-70B's Linears under TP=8: five kinds, so 10 signatures with two Ms.
SIZES = {
    "attention.wq": (8192, 1024),
    "attention.wk": (8192, 128),
    "attention.wv": (8192, 128),
    "attention.wo": (1024, 8192),
    "feed_forward.w1": (8192, 3584),
    "feed_forward.w2": (3584, 8192),
    "feed_forward.w3": (8192, 3584),
}


def layers(extra_calls: int = 0) -> tuple[Layer, ...]:
    """Freshly made, since no two ranks share objects."""
    blocks = [
        Layer(
            f"layers.{i}.{name}",
            k,
            n,
            "bfloat16",
            True,
            None,
            ((signature(4096, k, n), 1), (signature(8192, k, n), 3 + extra_calls)),
        )
        for i in range(BLOCKS)
        for name, (k, n) in SIZES.items()
    ]
    # The output layer makes no signature of its own here.
    return (*blocks, replace(blocks[0], fqn="output"))


def packed_table(rank: int, *, alike: bool) -> bytes:
    """What one rank sends: times are random in all digits, so they do not compress.

    Args:
        rank: which one.
        alike: whether all ranks called their layers equally often.
    """
    generator = random.Random(rank)  # noqa: S311 - no secret
    own = layers(extra_calls=0 if alike else rank)

    def times(middle: float) -> tuple[float, ...]:
        return tuple(generator.gauss(middle, 0.02) for _ in range(PAIRS))

    signatures = sorted({x for layer in own for x, _ in layer.calls})
    measurements = tuple(
        Measurement(x, "rowwise", times(1.0), times(0.8), recorded="2026-01-31")
        for x in signatures
    )
    return pack(RankTable(own, measurements))


def agree(packed: list[bytes]) -> tuple[Decision, ...]:
    """What every rank does once it has all tables."""
    tables = unpack(packed)
    merged, _ = merge_measurements(tables)
    called = merge_calls(tables[0].layers, tables)
    return decide(called, merged, ["rowwise"], TuneConfig())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("alike", [True, False], ids=["same calls", "calls differ"])
def test_merging_1024_ranks(benchmark: BenchmarkFixture, *, alike: bool) -> None:
    """At most 20 MB; 5 s at most where ranks called their layers equally often."""
    packed = [packed_table(rank, alike=alike) for rank in range(RANKS)]
    decisions = benchmark.pedantic(agree, (packed,), rounds=3)
    gathered = sum(len(data) for data in packed)
    benchmark.extra_info["bytes_per_rank"] = len(packed[0])
    benchmark.extra_info["bytes_gathered"] = gathered
    assert gathered < 20e6
    assert benchmark.stats.stats.min < (5 if alike else 30)
    assert len(decisions) == 225
    assert {d.verdict.value for d in decisions} == {"converted"}


@pytest.mark.timeout(300)
def test_comparing_the_layers_of_1024_ranks(benchmark: BenchmarkFixture) -> None:
    """The exchange in the constructor: names and sizes, no calls."""
    bare = tuple(replace(layer, calls=()) for layer in layers())
    packed = [pack((bare,)) for _ in range(RANKS)]
    benchmark.pedantic(
        lambda: check_layers([layers for (layers,) in unpack(packed)]), rounds=3
    )
    benchmark.extra_info["bytes_per_rank"] = len(packed[0])
    benchmark.extra_info["bytes_gathered"] = sum(len(data) for data in packed)
