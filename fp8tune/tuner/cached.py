"""What a cache knows of the layers' kinds and of a trial, and what is left to be done."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from fp8tune.decision.decisions import after_trial
from fp8tune.decision.kinds import missing_m, sizes_of, work_of
from fp8tune.decision.trials import NONE_NEEDED
from fp8tune.decision.watched import decisions_after_checks, still_fallen
from fp8tune.report.watch import remembered_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8tune.decision.records import Layer, Measurement, Signature
    from fp8tune.decision.trials import TrialRecord
    from fp8tune.decision.watched import Fallen
    from fp8tune.plan.plan import Plan
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.recipes.registry import Recipes
    from fp8tune.store.cache import Key
    from fp8tune.store.shared_cache import SharedCache

__all__ = ["from_cache", "tried", "without_fallen"]

logger = logging.getLogger("fp8tune")


def from_cache(
    cache: SharedCache, recipes: Recipes, key: Key, layers: Sequence[Layer]
) -> tuple[list[Measurement], dict[Signature, list[Recipe]]]:
    """Look the layers' kinds up, for each recipe. No collective.

    Args:
        cache: what was timed before.
        recipes: what layers may be converted to.
        key: of all recipes.
        layers: with their calls.

    Returns:
        (what is known, what must be timed and with which recipes).
    """
    found: list[Measurement] = []
    missing: dict[Signature, list[Recipe]] = {}
    for recipe, each in zip(recipes, key.each(), strict=True):
        known, parts = cache.measurements(each), cache.parts(each)
        by_kind = sizes_of((x, 1) for x in known)
        fitting = [x for x in layers if recipe.name not in dict(x.excluded)]
        for kind, work in work_of(fitting).items():
            cached = by_kind.get(kind, [])
            for m in missing_m(work, cached):
                missing.setdefault(kind.at(m), []).append(recipe)
            # With one M only its own timing is of use.
            useful = work if len(work) == 1 else cached
            used = {kind.at(m) for m in useful if m in cached}
            found += [known[x] for x in sorted(used)]
            found += [x for x in parts if x.signature in used]
    return found, dict(sorted(missing.items()))


def tried(plan: Plan, trial: TrialRecord | None, wanted: int | str) -> Plan | None:
    """The plan as a cached trial left it, or None where a trial is still to be made.

    Args:
        plan: what layers were decided alone.
        trial: how it ended; a plan that was made ahead has none, and needs none.
        wanted: ``TuneConfig.trial_steps``; who gave a number wants a trial of that, too.
    """
    if trial == NONE_NEEDED:
        return plan if wanted == "auto" else None
    return after_trial(plan, trial) if trial else None


def without_fallen(
    plan: Plan, fallen: Iterable[Fallen], least_db: float | None, *, said: bool
) -> Plan:
    """The plan without the layers that lost their accuracy in an earlier run.

    Args:
        plan: as that run began with it.
        fallen: what its checks found.
        least_db: this run's ``min_sqnr_db``, or None to go by the earlier run's.
        said: log which they are.
    """
    known = still_fallen(fallen, least_db)
    decisions = decisions_after_checks(plan.decisions, known)
    left = {x.fqn for x in known if x.reverted}.intersection(plan.converted_fqns)
    if left and said:
        logger.info("%s", remembered_line(sorted(left)))
    return replace(plan, decisions=decisions)
