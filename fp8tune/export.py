"""A plan in the words of other trainers: exact names, substrings, and text to paste.

What the targets take (read in their sources):

- torchao and accelerate call a filter function for each Linear;
- torchtitan's ``Float8LinearConverter`` and NeMo Automodel's ``FP8Config`` take
  ``filter_fqns``: they skip each Linear whose name contains one of these substrings, so
  that ``layers.1`` also skips ``layers.10``;
- OLMo-core's ``Float8Config`` takes ``modules_to_ignore``: exact names, and it raises on
  those that match nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from fp8tune.cover import smallest_cover
from fp8tune.errors import PlanMismatchError
from fp8tune.linears import named_linears, normalize_fqn
from fp8tune.records import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fp8tune.plan import Plan

__all__ = ["TARGETS", "exact_fqns", "export_lines", "substring_excludes"]


def exact_fqns(plan: Plan, model_or_fqns: nn.Module | Iterable[str]) -> list[str]:
    """See ``Plan.exact_fqns``."""
    return _split(plan, model_or_fqns)[1]


def substring_excludes(
    plan: Plan, model_or_fqns: nn.Module | Iterable[str]
) -> list[str]:
    """See ``Plan.substring_excludes``."""
    kept, excluded = _split(plan, model_or_fqns)
    # Newlines, which no name contains, keep substrings from spanning two names.
    text = "\n".join(kept)
    words = {name: list(_shortest_absent(name, text)) for name in excluded}
    for name, found in words.items():
        if not found:
            _refuse(name, kept)
    covers = {
        word: frozenset(i for i, name in enumerate(excluded) if word in name)
        for found in words.values()
        for word in found
    }
    chosen = smallest_cover(_one_word_each(covers), len(excluded))
    result = sorted(_readable(word, excluded) for word in chosen)
    assert [x for x in kept + excluded if any(y in x for y in result)] == excluded
    return result


def _split(
    plan: Plan, model_or_fqns: nn.Module | Iterable[str]
) -> tuple[list[str], list[str]]:
    """The names that the plan converts, and the others, each in the given order."""
    names = list(dict.fromkeys(_names(model_or_fqns)))
    kept = [name for name in names if _converts(plan, name)]
    missing = [
        x for x in plan.float8_fqns if x not in {_planned(plan, y) for y in kept}
    ]
    if missing:
        raise PlanMismatchError(
            f"the plan converts {missing[0]!r}, and the target's model has no such "
            f"Linear ({len(missing)} are missing); pass the names that the target uses, "
            "or the plan that was made for this model"
        )
    return kept, [name for name in names if not _converts(plan, name)]


def _names(model_or_fqns: nn.Module | Iterable[str]) -> Iterator[str]:
    if isinstance(model_or_fqns, nn.Module):
        return (fqn for fqn, _ in named_linears(model_or_fqns))
    return map(normalize_fqn, model_or_fqns)


def _converts(plan: Plan, name: str) -> bool:
    decision = plan.get(name)
    return decision is not None and decision.verdict is Verdict.FLOAT8


def _planned(plan: Plan, name: str) -> str:
    decision = plan.get(name)
    return name if decision is None else decision.fqn


def _shortest_absent(name: str, text: str) -> Iterator[str]:
    """The substrings of a name that are not in the text and contain no shorter such.

    Longer ones need not be looked at: they are in no more names than these.
    """
    end = 1
    last = ""
    for start in range(len(name)):
        end = max(end, start + 1)
        while end <= len(name) and name[start:end] in text:
            end += 1
        if end > len(name):
            break
        if last:
            yield last
        last = name[start:end]
    if last:
        yield last
