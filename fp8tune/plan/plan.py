"""The plan: what became of every layer, and how to do the same to another model."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8tune.decision.decisions import Decisions
from fp8tune.decision.kinds import has_many_sizes
from fp8tune.decision.records import Decision, Verdict
from fp8tune.errors import CacheError, PlanMismatchError
from fp8tune.model.candidates import Candidate, LeftOut
from fp8tune.model.experts import experts_in
from fp8tune.model.linears import named_gemms, named_linears
from fp8tune.model.screen import why_not_plain
from fp8tune.plan import excludes
from fp8tune.plan.versions import PLAN_VERSION, upgraded
from fp8tune.report import table
from fp8tune.report.gathering import GATHER_NOT_APPLIED
from fp8tune.store.codec import decode, encode
from fp8tune.store.files import read_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn


__all__ = ["PLAN_VERSION", "Plan"]

logger = logging.getLogger("fp8tune")

_FORMAT = "fp8tune-plan"

# What they are called, and what they are.
_Sizes = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Plan(Decisions):
    """The decisions for one model, and how to do the same to another."""

    @classmethod
    def of(cls, decisions: Decisions) -> Plan:
        """The plan that these decisions are."""
        return cls(**{x.name: getattr(decisions, x.name) for x in fields(decisions)})

    def __getitem__(self, fqn: str) -> Decision:
        """The decision for one Linear.

        Raises:
            KeyError: the model had no Linear of that name.
        """
        decision = self.get(fqn)
        if decision is None:
            raise KeyError(f"no Linear {fqn!r} in this plan of {len(self.decisions)}")
        return decision

    def get(self, fqn: str) -> Decision | None:
        """The decision for one Linear, or None if the model had none of that name."""
        return excludes.find(self, fqn)

    def summary(self) -> str:
        """One line: how many Linears were converted, and why the others were not."""
        return table.summary(self)

    def __str__(self) -> str:
        """The table of decisions, identical layers of a stack in one row."""
        return "\n".join(table.table_lines(self))

    def apply(self, module: nn.Module, recipe: Any = None) -> None:
        """Convert a model in place as this plan says. No timing, any device.

        Args:
            module: a model with the same Linears, none of them converted.
            recipe: a Float8LinearConfig or a Recipe, or a sequence of them; needed only
                if the plan was made with one that is not registered by name.

        Raises:
            PlanMismatchError: the model's Linears are not those of the plan; the message
                names the first that differ.
            UnknownRecipeError: ``recipe`` is needed and missing.
        """
        # These import torchao.
        from fp8tune.recipes.empty import for_any_rows  # noqa: PLC0415
        from fp8tune.recipes.registry import resolve_recipes  # noqa: PLC0415

        given = self.recipe if recipe is None else recipe
        resolve = cache(partial(resolve_recipes, given))
        if getattr(recipe, "enable_fsdp_float8_all_gather", False):
            logger.warning("%s", GATHER_NOT_APPLIED)
        for record in self.sort(module):
            if isinstance(record, Candidate):
                recipes = resolve(record.linear.weight.device)
                found = recipes.in_place_of(self[record.fqn].recipe)
                varies = has_many_sizes(self[record.fqn].signatures)
                (for_any_rows(found) if varies else found).convert(record.linear)

    def revert(self, module: nn.Module, recipe: Any = None) -> None:
        """Undo ``apply``: the plan's converted layers run in high precision again.

        Args:
            module: a model that this plan was applied to.
            recipe: as for ``apply``.

        Raises:
            UnknownRecipeError: ``recipe`` is needed and missing.
        """
        from fp8tune.recipes.registry import resolve_recipes  # noqa: PLC0415 - imports torchao

        given = self.recipe if recipe is None else recipe
        for fqn, linear in named_gemms(module):
            decision = self.get(fqn)
            if decision and decision.recipe and why_not_plain(linear) is not None:
                recipes = resolve_recipes(given, linear.weight.device)
                recipes.in_place_of(decision.recipe).revert(linear)

    def sort(self, module: nn.Module) -> list[Candidate | LeftOut]:
        """The model's layers as this plan has them, in model order.

        A plan that knows no experts, as of a version before they were tuned, leaves those
        of the model alone.

        Raises:
            PlanMismatchError: the model's Linears are not those of the plan.
        """
        knows_experts = any(x.experts for x in self.decisions)
        linears = dict((named_gemms if knows_experts else named_linears)(module))
        self._require_same(linears)
        return [
            Candidate(fqn, linear)
            if self[fqn].verdict is Verdict.CONVERTED
            else LeftOut(fqn, linear, self[fqn].reason)
            for fqn, linear in linears.items()
        ]

    def module_filter_fn(self, module: Any, fqn: str) -> bool:
        """Whether to convert this layer; takes what torchao and accelerate pass.

        Args:
            module: an nn.Linear, or a config object with in_features and out_features.
            fqn: its name in the model.

        Returns:
            True for the layers that the plan converts; False for any other, and for
            one whose K and N are not those of the plan.
        """
        decision = self.get(fqn)
        if decision is None or decision.verdict is Verdict.REFERENCE:
            return False
        k = getattr(module, "in_features", None)
        n = getattr(module, "out_features", None)
        return (k, n) == (decision.k, decision.n)

    def exact_fqns(self, model_or_fqns: nn.Module | Iterable[str]) -> list[str]:
        """Names to leave out, for targets that take exact ones and refuse unknown ones.

        Args:
            model_or_fqns: the model of the target, or the names of its Linears.

        Returns:
            The model's Linears that are not to be converted, in its order.

        Raises:
            PlanMismatchError: a Linear that is to be converted is not in the model.
        """
        return excludes.exact_fqns(self, model_or_fqns)

    def substring_excludes(self, model_or_fqns: nn.Module | Iterable[str]) -> list[str]:
        """Substrings to leave out, for targets that skip each name that holds one.

        Args:
            model_or_fqns: the model of the target, or the names of its Linears.

        Returns:
            The shortest list that leaves out exactly what this plan does not convert.

        Raises:
            PlanMismatchError: a Linear that is to be converted is not in the model.
            ExportError: no list of substrings does it; the message says why.
        """
        return excludes.substring_excludes(self, model_or_fqns)

    def _require_same(self, linears: dict[str, nn.Linear]) -> None:
        planned = {x.fqn: _sizes(x.experts, x.k, x.n) for x in self.decisions}
        found = {
            fqn: _sizes(experts_in(x), x.in_features, x.out_features)
            for fqn, x in linears.items()
        }
        problems = [
            f"{fqn or '(root)'} is only in the plan"
            for fqn in planned.keys() - found.keys()
        ]
        problems += [
            f"{fqn or '(root)'} is only in the model"
            for fqn in found.keys() - planned.keys()
        ]
        problems += [
            f"{fqn} has {found[fqn][0]} = {found[fqn][1]}, in the plan {planned[fqn][1]}"
            for fqn in planned.keys() & found.keys()
            if not _are_alike(planned[fqn], found[fqn])
        ]
        problems += [
            f"{fqn} is a {type(linears[fqn]).__name__}, not a plain nn.Linear: "
            f"{why.sentence}"
            for fqn in self.converted_fqns
            if fqn in found and (why := why_not_plain(linears[fqn]))
        ]
        if problems:
            shown = "; ".join(sorted(problems)[:5])
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise PlanMismatchError(
                f"this plan was made for another model: {shown}{more}. Tune this model "
                "with AutoFloat8, or apply the plan to the model it was made for"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        Path(path).write_text(text, encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """What ``save`` writes, as plain data for a checkpoint."""
        return {"format": _FORMAT, "version": PLAN_VERSION, "plan": encode(self)}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that ``save`` wrote.

        Raises:
            CacheError: the file is no plan, or was written by a newer fp8tune.
            OSError: the file cannot be read.
        """
        try:
            data = json.loads(read_bytes(Path(path)).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise CacheError(f"{path} is no JSON: {error}") from error
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str = "the data") -> Plan:
        """Undo ``to_dict``.

        Args:
            data: what ``to_dict`` returned.
            where: what it was read from, for the error.

        Raises:
            CacheError: the data is no plan, or was written by a newer fp8tune.
        """
        found = (
            (data.get("format"), data.get("version"))
            if isinstance(data, dict)
            else data
        )
        if found not in [(_FORMAT, x + 1) for x in range(PLAN_VERSION)]:
            raise CacheError(
                f"{where} holds format and version {found!r}; expected "
                f"{(_FORMAT, PLAN_VERSION)!r}, as written by Plan.save of this version"
            )
        return decode(cls, upgraded(data.get("plan"), data.get("version")), "plan")


def _are_alike(planned: _Sizes, found: _Sizes) -> bool:
    """Of experts that are not called yet nobody knows which size is K."""
    name, (first, *matrix) = found
    exchanged = (name, (first, *reversed(matrix)))
    return planned == found or (len(matrix) > 1 and planned == exchanged)


def _sizes(experts: int, k: int, n: int) -> _Sizes:
    return ("E, K, N", (experts, k, n)) if experts else ("K, N", (k, n))
