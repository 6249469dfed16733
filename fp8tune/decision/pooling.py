"""Layers that are called with many M, judged together with their like.

The experts of a mixture, or one layer of many blocks, meet other M in each step. Which
ones each met is chance, and so would be verdicts from it: blocks that are alike would
differ, and ``torch.compile`` by block would compile each of them. So layers whose names
differ only in numbers, and whose ranges of M overlap, share their calls.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from fp8tune.decision.folding import without_numbers
from fp8tune.decision.kinds import (
    MOST_SIZES,
    MOST_TIMED,
    Calls,
    Kind,
    kind_of,
    reach,
    sizes_of,
    stand_ins,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence

    from fp8tune.decision.records import Layer, Signature

__all__ = ["pool", "sharing_of"]


def pool(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers, those that belong together with the calls of all of them.

    Layers that were each called with one M, and not with nearly the same one, are left
    as they are.
    """
    groups: dict[tuple[Hashable, frozenset[Kind]], list[Layer]] = {}
    kinds = {id(x.calls): frozenset(sizes_of(x.calls)) for x in layers}
    for layer in layers:
        if layer.calls:
            key = (_family(layer), kinds[id(layer.calls)])
            groups.setdefault(key, []).append(layer)
    shared: dict[str, Calls] = {}
    ranges: dict[Hashable, list[Calls]] = {}
    for (family, _), group in groups.items():
        for members in _overlapping(group):
            calls = _together(members)
            shared |= {x.fqn: calls for x in members}
            if any(len(sizes) > MOST_TIMED for sizes in sizes_of(calls).values()):
                ranges.setdefault(family, []).append(calls)
    return tuple(_with_calls(layer, shared, ranges) for layer in layers)


def sharing_of(layers: Sequence[Layer], pooled: Sequence[Layer]) -> dict[str, int]:
    """How many layers the calls are of, for each layer that shares them.

    Args:
        layers: with their own calls.
        pooled: what ``pool`` made of them.
    """
    pairs = [(x, y) for x, y in zip(layers, pooled, strict=True) if y.calls != x.calls]
    # Layers that share have one tuple of calls.
    sharing = Counter(id(y.calls) for _, y in pairs)
    return {x.fqn: sharing[id(y.calls)] for x, y in pairs}


def _family(layer: Layer) -> Hashable:
    name = without_numbers(layer.fqn)
    weight = (layer.k, layer.n, layer.experts, layer.weight_dtype, layer.trains)
    return (name, weight, layer.reason, layer.excluded)


def _with_calls(
    layer: Layer, shared: Mapping[str, Calls], ranges: Mapping[Hashable, list[Calls]]
) -> Layer:
    if layer.calls:
        return replace(layer, calls=shared[layer.fqn])
    alike = ranges.get(_family(layer), [])
    # An expert that no token chose so far is one of its siblings all the same.
    return replace(layer, calls=alike[0]) if len(alike) == 1 else layer


def _overlapping(group: Iterable[Layer]) -> list[list[Layer]]:
    """The layers in parts whose ranges of M do not touch."""
    ordered = sorted(((_range_of(x.calls), x) for x in group), key=lambda x: x[0])
    parts: list[list[Layer]] = []
    high = 0
    for (first, last), layer in ordered:
        if parts and first <= reach(high):
            parts[-1].append(layer)
            high = max(high, last)
        else:
            parts.append([layer])
            high = last
    return parts


def _range_of(calls: Calls) -> tuple[int, int]:
    every = [signature.shape.m for signature, _ in calls]
    return min(every), max(every)


def _together(members: Sequence[Layer]) -> Calls:
    distinct = {x.calls for x in members}
    if len(distinct) == 1:
        return _coarse(members[0].calls)
    counts: Counter[Signature] = Counter()
    for layer in members:
        counts.update(dict(layer.calls))
    return _coarse(tuple(sorted(counts.items())))


def _coarse(calls: Calls) -> Calls:
    """The calls with at most ``MOST_SIZES`` different M of each kind, as much work."""
    sizes = sizes_of(calls)
    if all(len(x) <= MOST_SIZES for x in sizes.values()):
        return calls
    stands_in = {kind: stand_ins(x) for kind, x in sizes.items()}
    rows: Counter[tuple[Kind, int]] = Counter()
    for signature, count in calls:
        kind, m = kind_of(signature), signature.shape.m
        rows[kind, stands_in[kind][m]] += count * m
    counted = {kind.at(m): max(1, round(n / m)) for (kind, m), n in rows.items()}
    return tuple(sorted(counted.items()))
