"""Stage 4: what each rank measured -> what all of them decide by. Pure; imports no torch.

Every rank gets every rank's table and computes the same from it, so equal plans need no
further message. A step is as fast as its slowest rank, so for each signature the samples
of the slowest rank count. A signature that failed on one rank failed.

Ranks hold either the same layers (data, tensor parallelism) or none in common (pipeline
stages); what stages have in common are signatures, and those are merged.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from statistics import median
from typing import TYPE_CHECKING

from fp8tune.errors import RankMismatchError
from fp8tune.records import Layer, Measurement, Signature

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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
    """What one rank knows at the freeze: its layers with calls, and its timings."""

    layers: tuple[Layer, ...]
    measurements: tuple[Measurement, ...]


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
    ordered = [by_rank for _, by_rank in sorted(found.items())]
    merged = [_slowest(by_rank) for by_rank in ordered]
    spreads = [_spread(by_rank) for by_rank in ordered if len(by_rank) > 1]
    return merged, [x for x in spreads if x is not None]


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
