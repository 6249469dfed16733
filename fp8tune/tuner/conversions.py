"""Which candidates are converted right now, and what to."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from fp8tune.decision.decide import reference_of
from fp8tune.decision.kinds import has_many_sizes
from fp8tune.decision.trials import GATHER
from fp8tune.model.convert import convert_by, revert_by
from fp8tune.model.copies import guard_copies
from fp8tune.model.experts import home_of
from fp8tune.model.layers import layer_of
from fp8tune.model.screen import why_not_plain
from fp8tune.recipes.empty import for_any_rows
from fp8tune.recipes.gathering import Gathering
from fp8tune.report.messages import transformed_line

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Sequence

    from torch import nn

    from fp8tune.decision.reasons import Reason
    from fp8tune.decision.records import Decision
    from fp8tune.model.candidates import Candidate, LeftOut
    from fp8tune.plan.plan import Plan
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.recipes.registry import Recipes

__all__ = ["Conversions", "without_lost"]

logger = logging.getLogger("fp8tune")


class Conversions:
    """Converts candidates in place and back, and keeps what it did.

    Args:
        module: the model.
        candidates: what can be converted.
        recipes: what to.

    Attributes:
        converted: the Linears that are converted right now, by name.
    """

    def __init__(
        self, module: nn.Module, candidates: Sequence[Candidate], recipes: Recipes
    ) -> None:
        self.converted: dict[str, nn.Linear] = {}
        self._module = module
        self._candidates = candidates
        self._recipes = recipes
        self._converted_to: dict[str, Recipe] = {}
        # What each candidate is converted to when it is: at first the first that fits.
        self._assigned = {
            x.fqn: for_any_rows(self.fitting(x.excluded)[0]) for x in candidates
        }
        self._wanted: frozenset[str] = frozenset()
        self._suspended = 0
        self._gave_up = False
        self._unguard: Callable[[], None] | None = None
        self.gathering = Gathering(module)
        self._gathers: bool | None = False

    def fitting(self, excluded: tuple[tuple[str, Reason], ...]) -> list[Recipe]:
        """The recipes that a candidate is left to."""
        names = dict(excluded)
        return [x for x in self._recipes if x.name not in names]

    def assign(self, plan: Plan, without_rows: Collection[str] = ()) -> None:
        """From now on convert each layer to what the plan has for it.

        Args:
            plan: has a recipe for each layer.
            without_rows: layers that were called without rows.
        """
        for fqn in self._assigned:
            decision = plan[fqn]
            name = decision.recipe or decision.nearest
            if name:
                recipe = self._recipes.find(name)
                varies = fqn in without_rows or has_many_sizes(decision.signatures)
                self._assigned[fqn] = for_any_rows(recipe) if varies else recipe

    def change_recipes(self, recipes: Recipes) -> None:
        """From now on convert to the recipes of these names, what is converted included."""
        self._switch(frozenset())
        for fqn, recipe in self._assigned.items():
            here = recipes.find(recipe.name)
            plain = recipe is self._recipes.find(recipe.name)
            self._assigned[fqn] = here if plain else for_any_rows(here)
        self._recipes = recipes
        if not self._suspended:
            self._switch(self._wanted)

    @property
    def assigned(self) -> list[Recipe]:
        """The recipes that candidates are converted to whenever they are converted."""
        return list(self._assigned.values())

    def convert(self, fqns: Collection[str]) -> None:
        """Make exactly these candidates converted and the others plain.

        Inside of ``suspended`` it is done at its end.
        """
        self._wanted = frozenset(fqns)
        if not self._suspended:
            self._switch(self._wanted)

    @contextmanager
    def suspended(self) -> Generator[None]:
        """Inside the block all candidates are plain; blocks may be nested."""
        self._suspended += 1
        self._switch(frozenset())
        try:
            yield
        finally:
            self._suspended -= 1
            if not self._suspended:
                self._switch(self._wanted)

    def gather_in_float8(self, wanted: bool | None) -> None:
        """From the next ``convert`` on, gather what is converted in float8, or not.

        Args:
            wanted: None where ``convert`` is told by GATHER among the names.
        """
        self._gathers = wanted

    @property
    def may_gather(self) -> bool:
        """Whether it is open, and there is a candidate whose weight can be gathered so."""
        layers = [(x.linear, self._assigned[x.fqn]) for x in self._candidates]
        return self._gathers is None and self.gathering.fits(layers)

    @contextmanager
    def gathered_plainly(self) -> Generator[None]:
        """Inside the block nothing is gathered in float8; weights must not change in it."""
        scales = self.gathering.scales()
        self.gathering.turn_off(self.converted.values())
        try:
            yield
        finally:
            if scales:
                self.gathering.turn_on(self.converted.values(), scales)

    @property
    def lost(self) -> bool:
        """Whether a layer that is to be converted could not be, since it was changed."""
        wanted = self._wanted & self._assigned.keys()
        return not (self._suspended or wanted <= self.converted.keys())

    def chosen(self) -> list[Recipe]:
        """The recipes of what is converted, or will be at the end of ``suspended``."""
        return [self._assigned[x] for x in self._assigned if x in self._wanted]

    def _switch(self, wanted: frozenset[str]) -> None:
        gathers = GATHER in wanted if self._gathers is None else self._gathers
        self.gathering.turn_off(
            linear
            for fqn, linear in self.converted.items()
            if not gathers or self._converted_to[fqn] is not self._to_be(fqn, wanted)
        )
        for candidate in self._candidates:
            fqn = candidate.fqn
            recipe = self._to_be(fqn, wanted)
            if self._converted_to.get(fqn) is not recipe:
                self._revert(fqn)
                # One that was changed meanwhile is found and left out at the freeze.
                if recipe and why_not_plain(candidate.linear) is None:
                    convert_by(recipe, candidate.linear)
                    self.converted[fqn] = candidate.linear
                    self._converted_to[fqn] = recipe
        if gathers:
            self.gathering.turn_on(self.converted.values())

    def _to_be(self, fqn: str, wanted: frozenset[str]) -> Recipe | None:
        return self._assigned[fqn] if fqn in wanted else None

    def _revert(self, fqn: str) -> None:
        if fqn in self.converted:
            self.gathering.turn_off([self.converted[fqn]])
            revert_by(self._converted_to.pop(fqn), self.converted.pop(fqn))

    def drop(self, fqns: Collection[str]) -> None:
        """Revert these candidates and convert them never again."""
        for fqn in fqns:
            self._revert(fqn)
            self._assigned.pop(fqn, None)
        self._candidates = [x for x in self._candidates if x.fqn not in fqns]

    def give_up(self, fqn: str, *, said: bool) -> None:
        """Leave a candidate in high precision that is called under torch.func.

        Args:
            fqn: its name.
            said: whether a warning names the first of them.
        """
        if said and not self._gave_up:
            logger.warning("%s", transformed_line(fqn))
        self._gave_up = True
        self.drop([fqn])

    def pairs(self) -> list[tuple[nn.Linear, Recipe]]:
        """The Linears that are converted right now, and what to."""
        return [(x, self._converted_to[fqn]) for fqn, x in self.converted.items()]

    def named(self) -> list[tuple[str, nn.Linear, Recipe]]:
        """The same with their names."""
        return [(fqn, x, self._converted_to[fqn]) for fqn, x in self.converted.items()]

    def keep_copies_plain(self, wanted: bool) -> None:
        """Whether copies of the model come out in high precision and without hooks.

        So they do while it is tuned; what is frozen is copied as it is.
        """
        if wanted and self._unguard is None:
            homes = [home_of(x.linear) for x in self._candidates]
            self._unguard = guard_copies(dict.fromkeys([self._module, *homes]))
        elif not wanted and self._unguard is not None:
            self._unguard()
            self._unguard = None


def without_lost(
    plan: Plan, lost: Collection[str], screened: Sequence[Candidate | LeftOut]
) -> Plan:
    """The plan for the model as it is now; what was lost stays in high precision."""

    def still(record: Candidate | LeftOut) -> Decision:
        decision = None if record.fqn in lost else plan.get(record.fqn)
        return decision or reference_of(layer_of(record))

    return replace(plan, decisions=tuple(map(still, screened)))
