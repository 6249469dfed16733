"""A plan in the words of other trainers: exact names, substrings, and text to paste.

What the targets take:

- torchao and accelerate call a filter function for each Linear;
- torchtitan's ``Float8LinearConverter`` and NeMo Automodel's ``FP8Config`` take
  ``filter_fqns`` and skip each Linear whose name contains one of these substrings, so
  that ``layers.1`` also skips ``layers.10``;
- OLMo-core's ``Float8Config`` takes ``modules_to_ignore``: exact names, and it raises on
  those that match nothing. It never converts ``lm_head.w_out``.
"""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Never

from torch import nn

from fp8tune.cover import smallest_cover
from fp8tune.errors import ExportError, PlanMismatchError
from fp8tune.linears import named_linears, normalize_fqn
from fp8tune.records import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fp8tune.plan import Plan
    from fp8tune.records import Decision

__all__ = [
    "TARGETS",
    "exact_fqns",
    "export_lines",
    "single_recipe",
    "substring_excludes",
]


def exact_fqns(plan: Plan, model_or_fqns: nn.Module | Iterable[str]) -> list[str]:
    """See ``Plan.exact_fqns``."""
    return _split(plan, model_or_fqns)[1]


def substring_excludes(
    plan: Plan, model_or_fqns: nn.Module | Iterable[str]
) -> list[str]:
    """See ``Plan.substring_excludes``."""
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


def _split(
    plan: Plan, model_or_fqns: nn.Module | Iterable[str]
) -> tuple[list[str], list[str]]:
    """The names that the plan converts, and the others, each in the given order."""
    kept: list[str] = []
    excluded: list[str] = []
    missing = dict.fromkeys(plan.float8_fqns)
    for name in dict.fromkeys(_names(model_or_fqns)):
        decision = plan.get(name)
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


def export_lines(plan: Plan, target: str) -> list[str]:
    """A plan as text to paste into a program or configuration of the target.

    Args:
        plan: made with a recipe of torchao.
        target: a key of ``TARGETS``.

    Returns:
        Lines of text that do not need fp8tune.

    Raises:
        ExportError: the target is unknown, does not know the recipe, or cannot say this
            plan.
    """
    if target not in TARGETS:
        raise ExportError(
            f"unknown target {target!r}; choose one of {', '.join(sorted(TARGETS))}"
        )
    recipes, write = TARGETS[target]
    recipe = single_recipe(plan)
    if recipe not in recipes:
        raise ExportError(
            f"the plan was made with the recipe {recipe!r}, and {target} knows "
            f"{', '.join(recipes)}; tune with one of these"
        )
    summary = textwrap.wrap(plan.summary(), 78)
    return [*(f"# {line}" for line in summary), *write(plan, recipe)]


def single_recipe(plan: Plan) -> str:
    """Name of the one recipe that the plan converts to; targets take no more.

    Raises:
        ExportError: it converts some layers to one recipe and some to another.
    """
    used = {x.recipe or plan.recipe for x in plan.decisions if _is_float8(x)}
    if len(used) > 1:
        raise ExportError(
            f"the plan converts to several recipes ({', '.join(sorted(used))}), and only "
            "plan.apply(model) can do that; tune with one recipe"
        )
    return used.pop() if used else plan.recipe.split(",")[0]


def _is_float8(decision: Decision) -> bool:
    return decision.verdict is Verdict.FLOAT8


def _torchao(plan: Plan, recipe: str) -> list[str]:
    return [
        "from dataclasses import replace",
        "",
        "from torchao.float8 import Float8LinearConfig, convert_to_float8_training",
        "",
        *_filter_function(plan, recipe),
        "convert_to_float8_training(model, config=config, module_filter_fn=is_float8)",
    ]


def _accelerate(plan: Plan, recipe: str) -> list[str]:
    return [
        "from dataclasses import replace",
        "",
        "from accelerate import Accelerator",
        "from accelerate.utils import AORecipeKwargs",
        "from torchao.float8 import Float8LinearConfig",
        "",
        *_filter_function(plan, recipe),
        "recipe = AORecipeKwargs(config=config, module_filter_func=is_float8)",
        'accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[recipe])',
    ]


def _filter_function(plan: Plan, recipe: str) -> list[str]:
    return [
        "FLOAT8_FQNS = {",
        *(f"    {json.dumps(fqn)}," for fqn in plan.float8_fqns),
        "}",
        "",
        "",
        "def is_float8(module, fqn):",
        "    return fqn in FLOAT8_FQNS",
        "",
        "",
        f'config = Float8LinearConfig.from_recipe_name("{recipe}")',
        "config = replace(config, pad_inner_dim=True)  # M need not divide by 16",
    ]


def _torchtitan(plan: Plan, recipe: str) -> list[str]:
    return [
        "Float8LinearConverter.Config(",
        f'    recipe_name="{recipe}",',
        *_listed("filter_fqns", _all_substrings(plan)),
        ")",
    ]


def _automodel(plan: Plan, recipe: str) -> list[str]:
    names = [f"  - {json.dumps(x)}" for x in _all_substrings(plan)]
    return [
        "fp8:",
        "  enabled: true",
        f"  recipe_name: {recipe}",
        f"  filter_fqns:{'' if names else ' []'}",
        *names,
    ]


def _olmo(plan: Plan, recipe: str) -> list[str]:
    always_ignored = "lm_head.w_out"
    if always_ignored in plan.float8_fqns:
        raise ExportError(
            f"the plan converts {always_ignored!r}, which OLMo-core never does; tune "
            f'with filter_fqns=["{always_ignored}"]'
        )
    names = exact_fqns(plan, [x.fqn for x in plan.decisions])
    return [
        "Float8Config(",
        f"    ao_recipe=AOFloat8LinearRecipe.{recipe},",
        *_listed("modules_to_ignore", names),
        ")",
    ]


def _all_substrings(plan: Plan) -> list[str]:
    return substring_excludes(plan, [x.fqn for x in plan.decisions])


def _listed(name: str, values: Sequence[str]) -> list[str]:
    return [f"    {name}=[", *(f"        {json.dumps(x)}," for x in values), "    ],"]


_ALL_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")

TARGETS: dict[str, tuple[tuple[str, ...], Callable[[Plan, str], list[str]]]] = {
    "torchao": (_ALL_RECIPES, _torchao),
    "accelerate": (_ALL_RECIPES, _accelerate),
    "torchtitan": (("rowwise", "rowwise_with_gw_hp"), _torchtitan),
    "automodel": (_ALL_RECIPES, _automodel),
    "olmo": (_ALL_RECIPES, _olmo),
}
