"""Linear algebra of a few rows, in plain Python.

As many rows as plans that ran, about ten. Plain Python adds in the same order on every
rank, which a BLAS need not do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Matrix", "dot", "product", "solve"]

Matrix = list[list[float]]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    """The inner product."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def product(a: Matrix, b: Matrix) -> Matrix:
    """The product of two matrices."""
    columns = list(zip(*b, strict=True))
    return [[dot(row, column) for column in columns] for row in a]


def solve(matrix: Matrix, right: Matrix) -> Matrix:
    """``matrix**-1 @ right`` by Gaussian elimination with partial pivoting.

    Args:
        matrix: square and regular.
        right: as many rows.
    """
    size = len(matrix)
    rows = [[*a, *b] for a, b in zip(matrix, right, strict=True)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda j: abs(rows[j][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        head = [x / rows[i][i] for x in rows[i]]
        rows[i] = head
        for j in range(size):
            factor = rows[j][i]
            if j != i and factor:
                rows[j] = [x - factor * y for x, y in zip(rows[j], head, strict=True)]
    return [row[size:] for row in rows]
