"""What the log says of float8 all-gather. Imports no torch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["GATHER_NOT_APPLIED", "GATHER_REFUSED", "gathered_line", "not_gathered_line"]

GATHER_REFUSED = (
    "the torchao config has enable_fsdp_float8_all_gather=True, and "
    "TuneConfig.float8_all_gather is False: weights are gathered in high precision"
)

GATHER_NOT_APPLIED = (
    "this plan converts in place, and the config's enable_fsdp_float8_all_gather=True is "
    "not for that: weights are gathered in high precision. Give the plan to AutoFloat8 "
    "after fully_shard, or convert with torchao before it"
)


def gathered_line(number: int, masters: int) -> str:
    """So many weights are gathered in float8."""
    cast = (
        f"; {masters} of them are kept in float32 and cast from that, not from bfloat16, "
        "so losses differ a little from those without it"
        if masters
        else ""
    )
    return f"FSDP2 gathers {number} weights in float8{cast}"


def not_gathered_line(reasons: Iterable[str], converted: int) -> str:
    """Converted layers whose weights are not gathered in float8, against the user's wish."""
    counted = Counter(reasons)
    said = "; ".join(f"{number}: {why}" for why, number in counted.most_common())
    return (
        f"float8 all-gather is asked for, and {counted.total()} of {converted} converted "
        f"layers are gathered in high precision ({said or 'none is converted'})"
    )
