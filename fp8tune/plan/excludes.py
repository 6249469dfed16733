"""The layers that a plan does not convert, as exact names or as substrings of names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Never

from torch import nn

from fp8tune.decision.decisions import Decisions
from fp8tune.decision.records import Verdict
from fp8tune.errors import ExportError, PlanMismatchError
from fp8tune.model.linears import named_linears, normalize_fqn
from fp8tune.plan.cover import smallest_cover

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8tune.decision.decisions import Decisions
    from fp8tune.decision.records import Decision

__all__ = ["exact_fqns", "find", "linears_of", "refuse_experts", "substring_excludes"]


def find(plan: Decisions, fqn: str) -> Decision | None:
    """The decision for one Linear, or None if the model had none of that name."""
    name = normalize_fqn(fqn)
    # The prefix that DDP adds, unless the model has a child of that name.
    return plan.by_name.get(name) or plan.by_name.get(name.removeprefix("module."))


def exact_fqns(plan: Decisions, model_or_fqns: nn.Module | Iterable[str]) -> list[str]:
    """Names to leave out for targets that take exact ones; see ``Plan.exact_fqns``."""
    return _split(plan, model_or_fqns)[1]


def substring_excludes(
    plan: Decisions, model_or_fqns: nn.Module | Iterable[str]
) -> list[str]:
    """Substrings that leave out the rest; see ``Plan.substring_excludes``."""
    kept, excluded = _split(plan, model_or_fqns)
    if not kept:
        return [""] if excluded else []
    # Names hold no newlines, so that no substring spans two of them.
    text = "\n".join(kept)
    words: set[str] = set()
    for name in excluded:
        found = _shortest_absent(name, text)
        if not found:
            _refuse_substrings(name, kept)
        words.update(found)
    numbers = range(len(excluded))
    covers = {x: frozenset(i for i in numbers if x in excluded[i]) for x in words}
    chosen = [_readable(word, excluded) for word in smallest_cover(covers)]
    _check_substrings(chosen, kept, excluded)
    return sorted(chosen)


def linears_of(plan: Decisions) -> list[str]:
    """The names of the plan's Linears, which are all that filters of other trainers see."""
    return [x.fqn for x in plan.decisions if not x.experts]


def refuse_experts(plan: Decisions) -> None:
    """Refuse a plan that converts what the names of modules cannot say.

    Raises:
        ExportError: it converts grouped GEMMs of experts; the message names the first.
    """
    converted = set(plan.converted_fqns)
    experts = [x.fqn for x in plan.decisions if x.experts and x.fqn in converted]
    if experts:
        raise ExportError(
            f"the plan converts {experts[0]!r}, a grouped GEMM of experts ({len(experts)} "
            "in all), and filters of modules or names only know Linears; use "
            "plan.apply(model), export to torchao, or tune with filter_fqns that leaves the "
            "experts out"
        )


def _split(
    plan: Decisions, model_or_fqns: nn.Module | Iterable[str]
) -> tuple[list[str], list[str]]:
    """The names that the plan converts, and the others, each in the given order."""
    refuse_experts(plan)
    kept: list[str] = []
    excluded: list[str] = []
    missing = dict.fromkeys(plan.converted_fqns)
    for name in dict.fromkeys(_names(model_or_fqns)):
        decision = find(plan, name)
        if decision is None or decision.verdict is Verdict.REFERENCE:
            excluded.append(name)
        else:
            kept.append(name)
            missing.pop(decision.fqn, None)
    if missing:
        raise PlanMismatchError(
            f"the plan converts {next(iter(missing))!r}, but the target has no Linear of "
            f"that name ({len(missing)} are missing). Pass the target's model or its "
            "names, and a plan that was made for this model"
        )
    return kept, excluded


def _names(model_or_fqns: nn.Module | Iterable[str]) -> Iterable[str]:
    if isinstance(model_or_fqns, nn.Module):
        return (fqn for fqn, _ in named_linears(model_or_fqns))
    return map(normalize_fqn, model_or_fqns)


def _shortest_absent(name: str, text: str) -> list[str]:
    """The substrings of a name that are not in the text and contain no shorter such.

    Longer ones need not be looked at, since they are in no more names than these.
    """
    starts: dict[int, int] = {}
    end = 0
    for start in range(len(name)):
        end = max(end, start + 1)
        while name[start:end] in text:
            if end == len(name):
                return [name[first:last] for last, first in starts.items()]
            end += 1
        starts[end] = start  # a later start with the same end is the shorter word
    return [name[first:last] for last, first in starts.items()]


def _readable(word: str, names: Sequence[str]) -> str:
    """The shortest run of whole path segments that is in the same names, if any."""
    covered = [name for name in names if word in name]
    parts = covered[0].split(".")
    runs = [
        f"{before}{'.'.join(parts[i:j])}{after}"
        for i in range(len(parts))
        for j in range(i + 1, len(parts) + 1)
        for before in ([""] if i == 0 else ["", "."])
        for after in ([""] if j == len(parts) else ["", "."])
    ]
    same = [x for x in runs if word in x and all(x in name for name in covered)]
    return min(same, key=len, default=word)


def _refuse_substrings(name: str, kept: Sequence[str]) -> Never:
    other = next(x for x in kept if name in x)
    raise ExportError(
        f"substrings cannot say this plan: one that leaves out {name or '(root)'!r} also "
        f"leaves out {other!r}, whose name contains it and which is converted. Use a "
        "target that takes a function or exact names (torchao, accelerate, olmo)"
    )


def _check_substrings(
    substrings: Sequence[str], kept: Sequence[str], excluded: Sequence[str]
) -> None:
    assert all(any(x in name for x in substrings) for name in excluded)
    assert not any(x in name for x in substrings for name in kept)
