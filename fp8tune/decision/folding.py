"""Names that differ only in their numbers, written as one pattern."""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

__all__ = ["fold_names", "without_numbers"]

# A number that is a whole part of a name, as in layers.0.wq, but not as in w1.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def without_numbers(name: str) -> str:
    """The name with {} in place of each number: "layers.{}.wq"."""
    return _NUMBER.sub("{}", name)


def fold_names(
    names: Sequence[str], keys: Sequence[Hashable]
) -> list[tuple[str, list[int]]]:
    """Put names together that differ only in numbers and whose keys are equal.

    Args:
        names: FQNs such as "layers.0.wq".
        keys: one for each name; what has to be equal besides.

    Returns:
        (pattern, indexes of its names) in order of first appearance; the pattern of one
        name is the name, of several ``layers.{0..31}.wq``.
    """
    groups: dict[object, list[int]] = {}
    for index, (name, key) in enumerate(zip(names, keys, strict=True)):
        groups.setdefault((without_numbers(name), key), []).append(index)
    return [x for group in groups.values() for x in _patterns(names, group)]


def _patterns(
    names: Sequence[str], indexes: Sequence[int]
) -> list[tuple[str, list[int]]]:
    if len(indexes) == 1:
        return [(names[indexes[0]] or "(root)", list(indexes))]
    words = _NUMBER.split(names[indexes[0]])
    by_numbers = {
        tuple(map(int, _NUMBER.findall(names[index]))): index for index in indexes
    }
    return [
        (_written(words, box), sorted(by_numbers[x] for x in itertools.product(*box)))
        for box in _boxes(list(by_numbers))
    ]


def _boxes(points: list[tuple[int, ...]]) -> list[list[list[int]]]:
    """Cover the points with products of lists of numbers, and nothing besides.

    Experts that differ from block to block must not be shown as every expert of every
    block.
    """
    columns = [sorted(set(column)) for column in zip(*points, strict=True)]
    if math.prod(map(len, columns)) == len(points):
        return [columns]
    tails: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in points:
        tails.setdefault(first, []).append(tuple(rest))
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, rests in tails.items():
        alike.setdefault(tuple(sorted(rests)), []).append(first)
    return [
        [sorted(firsts), *box]
        for rests, firsts in alike.items()
        for box in _boxes(list(rests))
    ]


def _written(words: Sequence[str], box: Sequence[Sequence[int]]) -> str:
    parts = [str(x[0]) if len(x) == 1 else "{" + _ranges(x) + "}" for x in (*box, [0])]
    return "".join(w + p for w, p in zip(words, parts, strict=True))[: -len("0")]


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0..2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs)
