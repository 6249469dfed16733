"""Plan files of older versions under the names of today."""

from __future__ import annotations

from typing import Any, cast

from fp8tune.decision.records import Verdict

__all__ = ["PLAN_VERSION", "upgraded"]

# 1: first. 2: candidate_ms and candidate_bytes were float8_ms and float8_bytes, and the
# verdict "converted" was "float8". 3: decisions have timed_m and shared_by. 4: trials, a
# list of results, are in trial, with what roles saved and the steps; plans have a
# coverage. 5: decisions and shapes have experts, and shapes transposed. tests/data keeps a
# file of every version.
PLAN_VERSION = 5
_RENAMED_IN_2 = {"float8_ms": "candidate_ms", "float8_bytes": "candidate_bytes"}


def upgraded(plan: Any, version: Any) -> Any:
    """What stands under "plan" in a file of an older version, as it would stand today.

    What does not look like a plan stays as it is; decoding says what is wrong with it.
    """
    if version == 1:
        plan = _renamed(plan)
    if version in (1, 2) and isinstance(plan, dict):
        plan = _each_with_timed_m(cast("dict[str, Any]", plan))
    if version in (1, 2, 3) and isinstance(plan, dict):
        known = {"coverage": None, **cast("dict[str, Any]", plan)}
        plan = _with_trial(known)
    if version in (1, 2, 3, 4) and isinstance(plan, dict):
        plan = _without_experts(plan)
    return plan


def _renamed(data: Any) -> Any:
    if isinstance(data, list):
        return [_renamed(x) for x in cast("list[Any]", data)]
    if not isinstance(data, dict):
        return data
    items = cast("dict[str, Any]", data).items()
    named = {_RENAMED_IN_2.get(key, key): _renamed(value) for key, value in items}
    if named.get("verdict") == "float8":
        named["verdict"] = Verdict.CONVERTED.value
    return named


def _each_with_timed_m(plan: dict[str, Any]) -> dict[str, Any]:
    decisions = plan.get("decisions")
    if not isinstance(decisions, list):
        return plan
    return plan | {
        "decisions": [_with_timed_m(x) for x in cast("list[Any]", decisions)]
    }


def _with_timed_m(decision: Any) -> Any:
    """Every M was timed then."""
    if not isinstance(decision, dict):
        return decision
    known = cast("dict[str, Any]", decision)
    try:
        sizes = {call[0]["shape"]["m"] for call in known["signatures"]}
    except (KeyError, TypeError, IndexError):
        return known
    timed = sorted(sizes) if known.get("speedup") else []
    return known | {"timed_m": timed, "shared_by": 1}


def _with_trial(plan: dict[str, Any]) -> dict[str, Any]:
    """Of a trial only the results were kept; its verdicts are in the decisions."""
    if "trials" not in plan:
        return plan
    rest = {key: value for key, value in plan.items() if key != "trials"}
    results = plan["trials"]
    if not results:
        return rest | {"trial": None}
    decisions = plan.get("decisions")
    won = [
        x.get("fqn")
        for x in cast("list[Any]", decisions if isinstance(decisions, list) else [])
        if isinstance(x, dict) and x.get("verdict") == Verdict.CONVERTED.value
    ]
    steps = {"first": 0, "plans": list[int](), "ms": list[float]()}
    known = {"converted": won, "unclear": [], "results": results}
    return rest | {"trial": known | {"roles": [], "steps": steps}}


def _without_experts(data: Any) -> Any:
    """All were Linears then: decisions, which have a verdict, and shapes, which have an m."""
    if isinstance(data, list):
        return [_without_experts(x) for x in cast("list[Any]", data)]
    if not isinstance(data, dict):
        return data
    found = {k: _without_experts(x) for k, x in cast("dict[str, Any]", data).items()}
    if "verdict" in found:
        found["experts"] = 0
    if "m" in found and "input_dtype" in found:
        found |= {"experts": 0, "transposed": False}
    return found
