"""Stage 4: what each rank measured -> what all of them decide by. Pure; imports no torch.

Every rank gets every rank's table and computes the same from it, so equal plans need no
further message. A step is as fast as its slowest rank, so for each signature the samples
of the slowest rank count. A signature that failed on one rank failed.

Ranks may meet other M, so of a kind with many M each rank has timed others. Then the
timings of one rank count, the one whose times are longest over all M that anybody timed,
each rank's interpolated where it did not time; the ends of the range come from whoever
timed them. Which part of a recipe is worth timing may also differ; one that not every rank
timed beside the whole recipe is dropped.

Ranks hold either the same layers (data, tensor parallelism) or none in common (pipeline
stages); what stages have in common are signatures, and those are merged.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from statistics import median
from typing import TYPE_CHECKING

from fp8tune.decision.curves import time_at
from fp8tune.decision.gemms import base_of, is_part
from fp8tune.decision.kinds import MOST_TIMED, Kind, kind_of, representatives
from fp8tune.decision.records import Layer, Measurement, Signature
from fp8tune.errors import RankMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp8tune.decision.coverage import Coverage
    from fp8tune.decision.reasons import Reason
    from fp8tune.decision.trust import Expectation

__all__ = [
    "RankTable",
    "Spread",
    "check_layers",
    "first_difference",
    "merge_calls",
    "merge_measurements",
]


@dataclass(frozen=True)
class RankTable:
    """What one rank knows at the freeze.

    Attributes:
        layers: with their calls.
        measurements: the timings.
        coverage: its share of products.
        uncounted: why calls of layers count for nothing, by name.
        expected: what is expected of the calls that were not timed.
    """

    layers: tuple[Layer, ...]
    measurements: tuple[Measurement, ...]
    coverage: Coverage | None = None
    uncounted: tuple[tuple[str, Reason], ...] = ()
    expected: tuple[Expectation, ...] = ()


@dataclass(frozen=True)
class Spread:
    """How far ranks differ in one signature; medians of the candidate, in ms."""

    signature: Signature
    fastest_rank: int
    fastest_ms: float
    slowest_rank: int
    slowest_ms: float
    recipe: str


def check_layers(ranks: Sequence[tuple[Layer, ...]]) -> None:
    """Refuse ranks that share some layers, but not all, or not alike.

    Args:
        ranks: each rank's layers; calls are not compared.

    Raises:
        RankMismatchError: names the ranks, the layer and the first field that differ.
    """
    seen: dict[tuple[str, ...], tuple[int, tuple[Layer, ...]]] = {}
    for rank, layers in enumerate(ranks):
        names = tuple(layer.fqn for layer in layers)
        if names not in seen:
            _check_disjoint(seen.values(), rank, layers)
            seen[names] = (rank, layers)
        first, expected = seen[names]
        for ours, theirs in zip(layers, expected, strict=True):
            _check_same(theirs, first, ours, rank)


def _check_disjoint(
    others: Iterable[tuple[int, tuple[Layer, ...]]],
    rank: int,
    layers: tuple[Layer, ...],
) -> None:
    names = {layer.fqn for layer in layers}
    for other, their_layers in others:
        theirs = {layer.fqn for layer in their_layers}
        if names & theirs:
            lone = next(iter(_in_one(names, theirs, layers, their_layers)), None)
            found = f"{lone!r} is on one only" if lone else "their order differs"
            raise RankMismatchError(
                f"ranks {other} and {rank} share layers, but {found}. Build the same "
                "model on every rank; if ranks hold different parts on purpose, pass "
                "process_group= with the ranks that hold the same layers"
            )


def _in_one(
    names: set[str],
    theirs: set[str],
    layers: tuple[Layer, ...],
    their_layers: tuple[Layer, ...],
) -> list[str]:
    in_order = [layer.fqn for layer in (*their_layers, *layers)]
    return [fqn for fqn in in_order if (fqn in names) != (fqn in theirs)]


def _check_same(a: Layer, rank_a: int, b: Layer, rank_b: int) -> None:
    for field in fields(Layer):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if field.name != "calls" and one != other:
            raise RankMismatchError(
                f"{a.fqn}.{field.name} is {one!r} on rank {rank_a} and {other!r} on rank "
                f"{rank_b}. Build the same model on every rank; if ranks hold different "
                "parts on purpose, pass process_group= with the ranks that hold the same "
                "layers"
            )


def merge_calls(
    layers: tuple[Layer, ...], tables: Sequence[RankTable]
) -> tuple[Layer, ...]:
    """One rank's layers with the calls of all ranks that hold them.

    A signature that several ranks called counts with its largest number of calls, so
    that the counts stay those of one rank.
    """
    calls: dict[str, dict[Signature, int]] = {}
    # Ranks with the same calls share one tuple, see Ranks.gather.
    distinct = {id(table.layers): table.layers for table in tables}
    for their_layers in distinct.values():
        for layer in their_layers:
            mine = calls.setdefault(layer.fqn, {})
            for signature, count in layer.calls:
                mine[signature] = max(count, mine.get(signature, 0))
    return tuple(
        replace(layer, calls=tuple(sorted(calls[layer.fqn].items())))
        for layer in layers
    )


def merge_measurements(
    tables: Sequence[RankTable],
) -> tuple[list[Measurement], list[Spread]]:
    """The slowest rank's samples of each signature and recipe, and how ranks differ.

    Returns:
        (one measurement per signature and recipe, one spread for each that several
        ranks timed), in the order of the signatures.
    """
    found: dict[tuple[Signature, str], list[tuple[int, Measurement]]] = {}
    for rank, table in enumerate(tables):
        for x in table.measurements:
            found.setdefault((x.signature, x.recipe), []).append((rank, x))
    counting = _counting(tables)
    ordered = [
        by_rank
        for (signature, recipe), by_rank in sorted(found.items())
        if signature in counting
        and len(by_rank) >= len(found.get((signature, base_of(recipe)), ()))
    ]
    merged = [_slowest(by_rank) for by_rank in ordered]
    spreads = [_spread(by_rank) for by_rank in ordered if len(by_rank) > 1]
    return merged, [x for x in spreads if x is not None]


def _counting(tables: Sequence[RankTable]) -> set[Signature]:
    """The signatures that are decided by: at most a few of each kind, and what failed."""
    by_kind: dict[Kind, list[list[Measurement]]] = {}
    recipes = {x.recipe for table in tables for x in table.measurements}
    # Not every rank has the parts of whole recipes, which would not compare.
    wholes = {x for x in recipes if not (is_part(x) and base_of(x) in recipes)}
    for rank, table in enumerate(tables):
        for x in (x for x in table.measurements if x.recipe in wholes):
            ranks = by_kind.setdefault(kind_of(x.signature), [[] for _ in tables])
            ranks[rank].append(x)
    return {
        signature for ranks in by_kind.values() for signature in _of_one_kind(ranks)
    }


def _of_one_kind(ranks: Sequence[Sequence[Measurement]]) -> set[Signature]:
    every = {x.signature for rank in ranks for x in rank}
    if len(every) <= MOST_TIMED:
        return every
    failed = {x.signature for rank in ranks for x in rank if x.failure}
    timed = [y for rank in ranks if (y := [x for x in rank if not x.failure])]
    if not timed:
        return failed
    sizes = sorted({x.signature.shape.m for rank in timed for x in rank})
    slowest = max(timed, key=lambda rank: _total_ms(rank, sizes))
    counting = {x.signature.shape.m for x in slowest} | {sizes[0], sizes[-1]}
    # As many as one rank alone would have, from whoever has them.
    others = [m for m in representatives(dict.fromkeys(sizes, 1)) if m not in counting]
    counting.update(others[: max(0, MOST_TIMED - len(counting))])
    kind = kind_of(slowest[0].signature)
    return failed | {kind.at(m) for m in counting}


def _total_ms(rank: Sequence[Measurement], sizes: Sequence[int]) -> float:
    by_recipe: dict[str, list[Measurement]] = {}
    for x in sorted(rank, key=lambda x: x.signature.shape.m):
        by_recipe.setdefault(x.recipe, []).append(x)
    return sum(time_at(timed, m) for timed in by_recipe.values() for m in sizes)


def _slowest(by_rank: Sequence[tuple[int, Measurement]]) -> Measurement:
    failed = next((x for _, x in by_rank if x.failure), None)
    # Reference and candidate come from one rank, since their samples are pairs.
    return failed or max((x for _, x in by_rank), key=_pair_ms)


def _pair_ms(measurement: Measurement) -> float:
    return median(measurement.reference_ms) + median(measurement.candidate_ms)


def _spread(by_rank: Sequence[tuple[int, Measurement]]) -> Spread | None:
    times = [(median(x.candidate_ms), rank) for rank, x in by_rank if not x.failure]
    if not times:
        return None
    (fastest_ms, fastest), (slowest_ms, slowest) = min(times), max(times)
    measured = by_rank[0][1]
    return Spread(
        measured.signature, fastest, fastest_ms, slowest, slowest_ms, measured.recipe
    )


def first_difference(ranks: Sequence[Mapping[str, str]]) -> str | None:
    """The first named value that is not the same on all ranks, in words, or None."""
    for rank, values in enumerate(ranks):
        for name, expected in ranks[0].items():
            found = values.get(name)
            if found != expected:
                return f"{name} is {expected!r} on rank 0 and {found!r} on rank {rank}"
    return None
