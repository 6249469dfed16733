"""The published tables of speedups that come with the package."""

from __future__ import annotations

import csv
from importlib.resources import files

from fp8tune.decision.prior import Table

__all__ = ["published_table"]

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
