"""What candidates are of a step's matrix products, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8tune.decision.coverage import EXPERTS

if TYPE_CHECKING:
    from fp8tune.decision.coverage import Coverage

__all__ = ["coverage_line", "coverage_shares", "expert_lines"]

# What is less than this share of all is named together.
_NAMED = 0.005


def coverage_shares(coverage: Coverage) -> tuple[float, list[tuple[str, float]]]:
    """The candidates' share of all FLOPs, and (what, share) of the rest, largest first."""
    total = coverage.total or 1
    shares = [(what, flops / total) for what, flops in coverage.rest]
    named = [x for x in shares if x[1] >= _NAMED]
    small = sum(share for _, share in shares[len(named) :])
    return coverage.candidates / total, named + ([("other", small)] if small else [])


def coverage_line(coverage: Coverage) -> str:
    """One line: "GEMM FLOPs of a step: 91.2% in candidates; the rest: 8.8% attention"."""
    candidates, rest = coverage_shares(coverage)
    said = ", ".join(f"{100 * share:.1f}% {what}" for what, share in rest)
    line = f"GEMM FLOPs of a step: {100 * candidates:.1f}% in candidates"
    return f"{line}; the rest: {said}" if said else line


def expert_lines(coverage: Coverage | None) -> list[str]:
    """That experts are not tuned, and how much that is; nothing without experts."""
    flops = dict(coverage.rest).get(EXPERTS, 0) if coverage else 0
    if coverage is None or flops < _NAMED * coverage.total or not flops:
        return []
    share = 100 * flops / coverage.total
    return [
        (
            f"experts have {share:.1f}% of a step's GEMM FLOPs and are not tuned: the "
            "recipe takes no grouped GEMMs, or they are not called with the experts' own "
            "3-D Parameters (the table says which); what a plan gains is of the rest"
        )
    ]
