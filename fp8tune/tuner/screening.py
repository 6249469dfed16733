"""The first stage with the user's arguments, and once more at the freeze."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fp8tune.decision.reasons import Reason
from fp8tune.model.candidates import Candidate, LeftOut
from fp8tune.model.recheck import rescreen
from fp8tune.model.screen import screen, unmatched_names
from fp8tune.report.messages import cast_line, changed_line
from fp8tune.tuner.checks import check_plan_recipe, check_recipe_fits

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import nn

    from fp8tune.recipes.registry import Recipes
    from fp8tune.tuner.options import Options

__all__ = ["screen_again", "screen_model"]

logger = logging.getLogger("fp8tune")


def screen_model(
    module: nn.Module, recipes: Recipes, options: Options
) -> list[Candidate | LeftOut]:
    """One record per Linear, in model order.

    Raises:
        ModelError: no recipe takes the dtype of any Linear.
        PlanMismatchError: a plan was given that was made for another model.
    """
    if options.plan is not None:
        check_plan_recipe(options.plan, recipes)
        return options.plan.sort(module)
    names, config = options.filter_fqns, options.config
    for name in unmatched_names(module, names) if options.ranks.first else []:
        logger.warning(
            "filter_fqns has %r, which is in the name of no Linear; is it spelt as "
            "in model.named_modules()?",
            name,
        )
    screened = screen(
        module,
        recipes,
        filter_fqns=names,
        static_filter=config.static_filter,
        include_output_layer=config.include_output_layer,
    )
    check_recipe_fits(screened, recipes)
    return screened


def screen_again(
    module: nn.Module,
    screened: Sequence[Candidate | LeftOut],
    recipes: Recipes,
    transformed: Collection[str],
    *,
    said: bool,
) -> list[Candidate | LeftOut]:
    """The records as the model is now.

    Args:
        module: the model.
        screened: the records so far.
        recipes: what candidates could be converted to.
        transformed: names of candidates that were called under torch.func.
        said: whether a warning names the candidates that were replaced or changed.
    """
    now = rescreen(module, screened, recipes, transformed)
    left = {x.fqn for x in now if isinstance(x, Candidate)}
    lost = [x.fqn for x in screened if isinstance(x, Candidate) and x.fqn not in left]
    reasons = {x.fqn: x.reason for x in now if isinstance(x, LeftOut)}
    cast = [x for x in lost if reasons.get(x) is Reason.UNSUPPORTED_DTYPE]
    changed = [x for x in lost if x not in {*transformed, *cast}]
    for fqns, line in (changed, changed_line), (cast, cast_line):
        if fqns and said:
            logger.warning("%s", line(fqns))
    return now
