"""The artefact that outlives a run: what became of every layer, and its exports.

In come decisions; out go a file, a converted model, filters and text for other trainers.
"""

from fp8tune.plan.plan import PLAN_VERSION, Plan

__all__ = ["PLAN_VERSION", "Plan"]
