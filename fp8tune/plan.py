"""The plan: what became of every Linear, and how to do the same to another model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8tune import export, report
from fp8tune.codec import decode, encode
from fp8tune.errors import CacheError, PlanMismatchError
from fp8tune.linears import named_linears, normalize_fqn
from fp8tune.records import Candidate, Decision, LeftOut, Verdict
from fp8tune.sharding import is_plain_linear

# The codec reads the types of the fields while it runs.
from fp8tune.trial_records import TrialResult  # noqa: TC001

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn


__all__ = ["PLAN_VERSION", "Plan"]

# 1: first.
PLAN_VERSION = 1
_FORMAT = "fp8tune-plan"


@dataclass(frozen=True)
class Plan:
    """The decisions for one model, in model order, and what they are true of.

    Attributes:
        decisions: one per Linear, those left out included.
        recipe: name of the recipe that was measured, or names with commas between.
        reference: name of the dtype that it was compared with.
        emulated: the device had no GEMMs for the recipe and emulated them.
        timing: "eager" or "compiled".
        environment: sorted (field, value) pairs of hardware and software.
        trials: what whole training steps measured, the fastest plan first; empty if
            there was no trial.
    """

    decisions: tuple[Decision, ...]
    recipe: str
    reference: str
    emulated: bool
    timing: str
    environment: tuple[tuple[str, str], ...]
    trials: tuple[TrialResult, ...] = ()

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
        name = normalize_fqn(fqn)
        # The prefix that DDP adds, unless the model has a child of that name.
        return self._by_name.get(name) or self._by_name.get(
            name.removeprefix("module.")
        )

    @cached_property
    def _by_name(self) -> dict[str, Decision]:
        return {x.fqn: x for x in self.decisions}

    @property
    def float8_fqns(self) -> list[str]:
        """Names of the Linears that are converted, in model order."""
        return [x.fqn for x in self.decisions if x.verdict is Verdict.FLOAT8]

    @property
    def reference_fqns(self) -> list[str]:
        """Names of the Linears that stay in high precision, in model order."""
        return [x.fqn for x in self.decisions if x.verdict is Verdict.REFERENCE]

    def summary(self) -> str:
        """One line: how many Linears were converted, and why the others were not."""
        name = f"{self.recipe} (emulated)" if self.emulated else self.recipe
        return report.summary_line(self.decisions, name)

    def __str__(self) -> str:
        """The table of decisions, identical layers of a stack in one row."""
        return "\n".join(report.table_lines(self))

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
        from fp8tune.recipes import resolve_recipes  # noqa: PLC0415 - imports torchao

        given = self.recipe if recipe is None else recipe
        resolve = cache(partial(resolve_recipes, given))
        for record in self.sort(module):
            if isinstance(record, Candidate):
                recipes = resolve(record.linear.weight.device)
                # A single one replaces whatever the plan was made with.
                name = recipes.name if len(recipes) == 1 else self[record.fqn].recipe
                recipes.find(name or recipes.names[0]).convert(record.linear)

    def sort(self, module: nn.Module) -> list[Candidate | LeftOut]:
        """The model's Linears as this plan has them, in model order.

        Raises:
            PlanMismatchError: the model's Linears are not those of the plan.
        """
        linears = dict(named_linears(module))
        self._require_same(linears)
        return [
            Candidate(fqn, linear)
            if self[fqn].verdict is Verdict.FLOAT8
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
        return export.exact_fqns(self, model_or_fqns)

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
        return export.substring_excludes(self, model_or_fqns)

    def _require_same(self, linears: dict[str, nn.Linear]) -> None:
        planned = {x.fqn: (x.k, x.n) for x in self.decisions}
        found = {fqn: (x.in_features, x.out_features) for fqn, x in linears.items()}
        problems = [
            f"{fqn or '(root)'} is only in the plan"
            for fqn in planned.keys() - found.keys()
        ]
        problems += [
            f"{fqn or '(root)'} is only in the model"
            for fqn in found.keys() - planned.keys()
        ]
        problems += [
            f"{fqn} has K, N = {found[fqn]}, in the plan {planned[fqn]}"
            for fqn in planned.keys() & found.keys()
            if planned[fqn] != found[fqn]
        ]
        problems += [
            f"{fqn} is a {type(linears[fqn]).__name__}, not a plain nn.Linear"
            for fqn in self.float8_fqns
            if fqn in found and not is_plain_linear(linears[fqn])
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
            data = json.loads(Path(path).read_text(encoding="utf-8"))
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
        if found != (_FORMAT, PLAN_VERSION):
            raise CacheError(
                f"{where} holds format and version {found!r}; expected "
                f"{(_FORMAT, PLAN_VERSION)!r}, as written by Plan.save of this version"
            )
        return decode(cls, data.get("plan"), "plan")
