"""The published tables of speedups that come with the package."""

from __future__ import annotations

import csv
from importlib.resources import files
from typing import TYPE_CHECKING

from fp8tune.config import Context, Timing
from fp8tune.decision.prior import Table

if TYPE_CHECKING:
    from fp8tune.store.contents import Key

__all__ = ["published_table", "table_for"]

# By recipe: the file, the device, and who published it.
_TABLES = {
    "rowwise": (
        "rowwise-h100.csv",
        "NVIDIA H100",
        "torchao, https://github.com/pytorch/ao/pull/2312",
    )
}


def published_table(recipe: str) -> Table | None:
    """What is published of a recipe, or None.

    Args:
        recipe: its name.
    """
    if recipe not in _TABLES:
        return None
    name, device, source = _TABLES[recipe]
    text = files("fp8tune.store").joinpath("tables", name).read_text(encoding="utf-8")
    speedups = {
        (int(row["M"]), int(row["K"]), int(column[1:])): float(row[column])
        for row in csv.DictReader(text.splitlines())
        for column in row
        if column.startswith("N")
    }
    return Table(recipe, device, source, speedups)


def table_for(key: Key) -> Table | None:
    """What is published of timings such as a key's, or None.

    The tables are of compiled Linears alone.

    Args:
        key: of one recipe; its device is asked for, too.
    """
    compiled = key.timing.startswith(Timing.COMPILED.value)
    if not compiled or key.timing.endswith(Context.NORM_ACT.value):
        return None
    table = published_table(key.recipe)
    device = dict(key.environment).get("device", "")
    return table if table and device.startswith(table.device) else None
