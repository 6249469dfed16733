"""The seam between measuring and deciding, where ranks will agree.

Everything that is decided follows from the measurements that this stage returns, so
ranks that get equal measurements here end with equal plans.
"""

from collections.abc import Mapping

from fp8tune.records import Measurement, Signature

__all__ = ["agree"]


def agree(
    measurements: Mapping[Signature, Measurement],
) -> dict[Signature, Measurement]:
    """What all ranks measured, the same on each; with one rank, what it measured."""
    return dict(measurements)
