"""Rows -> lines of text in columns that fit a width. Wraps, and never cuts anything off.

Written out rather than left to rich, which takes seconds for the ten thousand rows of a
large model and breaks names where no reader would.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Column", "column_lines", "paragraph"]

_GAP = 2
_NARROW_GAP = 1
# Below this a name would be more breaks than name.
_NARROWEST = 10
# Where a cell may be broken: after a word, a number of a list, or a part of a name.
_BREAK = re.compile(
    r"(?<=[^,] )|(?<=\d,)(?=\d)|(?<=[^.]\.)(?=[^.\d])|(?<=[^.\d]\.)(?=\d)"
)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: what stands above it.
        right: its cells are aligned to the right, as numbers are.
    """

    heading: str
    right: bool = False


def column_lines(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    width: int,
    colours: Sequence[str] = (),
) -> list[str]:
    """The table: headings, a rule, the rows.

    Args:
        columns: from left to right.
        rows: the cells of each.
        width: characters that a line may have, where the cells' words allow it.
        colours: an ANSI sequence for each row, or nothing for no colour at all.
    """
    headings = [column.heading for column in columns]
    cells = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    gap = _GAP if sum(widths) + _GAP * (len(widths) - 1) <= width else _NARROW_GAP
    _shrink(widths, cells, width - gap * (len(widths) - 1))
    layout = list(zip(columns, widths, strict=True))
    head = _row_lines(headings, layout, gap)
    rule = "─" * (sum(widths) + gap * (len(widths) - 1))
    body = [_row_lines(row, layout, gap) for row in rows]
    if colours:
        body = [_coloured(x, c) for x, c in zip(body, colours, strict=True)]
    return [*head, rule, *(line for lines in body for line in lines)]


def paragraph(text: str, width: int, indent: str = "") -> list[str]:
    """One paragraph of running text."""
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)


def _shrink(widths: list[int], cells: Sequence[Sequence[str]], room: int) -> None:
    """Break what costs the reader least, until all fit: headings, words, then names."""
    columns = list(zip(*cells, strict=True))
    natural = list(widths)
    headings = [max(_longest_piece(x[0]), *map(len, x[1:]), 0) for x in columns]
    words = [max(map(_longest_piece, set(x))) for x in columns]
    _shrink_to(widths, headings, room)
    _shrink_to(widths, [natural[0], *words[1:]], room)
    _shrink_to(widths, words, room)
    # Still too wide: names are broken inside a part, numbers never.
    _shrink_to(widths, [min(words[0], _NARROWEST), *words[1:]], room)


def _shrink_to(widths: list[int], smallest: Sequence[int], room: int) -> None:
    while sum(widths) > room:
        spare = [width - least for width, least in zip(widths, smallest, strict=True)]
        if max(spare) <= 0:
            return
        able = [i for i, x in enumerate(spare) if x > 0]
        widths[max(able, key=lambda i: widths[i])] -= 1


def _longest_piece(cell: str) -> int:
    # What ends a piece may not stand at the end of a line, if it is a space.
    return max(len(piece.rstrip()) for piece in _BREAK.split(cell))


def _row_lines(
    cells: Sequence[str], layout: Sequence[tuple[Column, int]], gap: int
) -> list[str]:
    if all(len(x) <= width for x, (_, width) in zip(cells, layout, strict=True)):
        pairs = zip(cells, layout, strict=True)
        return [(" " * gap).join(_aligned(x, *to) for x, to in pairs).rstrip()]
    parts = [_wrapped(x, width) for x, (_, width) in zip(cells, layout, strict=True)]
    height = max(map(len, parts))
    return [
        (" " * gap)
        .join(
            _aligned(part[i] if i < len(part) else "", column, width)
            for part, (column, width) in zip(parts, layout, strict=True)
        )
        .rstrip()
        for i in range(height)
    ]


def _aligned(text: str, column: Column, width: int) -> str:
    return text.rjust(width) if column.right else text.ljust(width)


def _wrapped(cell: str, width: int) -> list[str]:
    if len(cell) <= width:
        return [cell]
    lines = [""]
    for piece in _hard_split(_BREAK.split(cell), width):
        if len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.strip() for line in lines]


def _hard_split(pieces: Iterable[str], width: int) -> Iterable[str]:
    for piece in pieces:
        if len(piece.rstrip()) <= width:
            yield piece
        else:
            yield from (piece[i : i + width] for i in range(0, len(piece), width))


def _coloured(lines: Sequence[str], colour: str) -> list[str]:
    return [f"{colour}{line}\x1b[0m" if colour else line for line in lines]
