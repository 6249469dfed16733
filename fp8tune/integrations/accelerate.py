"""Hugging Face accelerate.

To tune, put AutoFloat8 around the model before ``accelerator.prepare``, with any
``mixed_precision`` but "fp8", which would convert the layers once more. To use a plan
that exists, also under FSDP2, pass ``ao_recipe_kwargs(plan)``.
"""

from typing import Any

from fp8tune.integrations import float8_config, needs
from fp8tune.plan.plan import Plan

__all__ = ["ao_recipe_kwargs"]


def ao_recipe_kwargs(plan: Plan, config: Any = None) -> Any:
    """The plan for ``Accelerator(mixed_precision="fp8", kwargs_handlers=[...])``.

    accelerate then converts exactly the plan's layers: given a filter it no longer
    leaves out the first and the last Linear by itself.

    Args:
        plan: what to convert.
        config: a torchao Float8LinearConfig in place of that of the plan's recipe, for
            example with enable_fsdp_float8_all_gather.

    Returns:
        An ``accelerate.utils.AORecipeKwargs``.

    Raises:
        ExportError: the plan's recipe is none of torchao's, and no config is given.
        MissingPackageError: accelerate is not installed.
    """
    with needs("accelerate"):
        from accelerate.utils import AORecipeKwargs  # noqa: PLC0415
    return AORecipeKwargs(
        config=float8_config(plan) if config is None else config,
        module_filter_func=plan.module_filter_fn,
    )
