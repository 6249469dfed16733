"""torchtitan 0.3: tune in run 1, convert by the plan in run 2.

torchtitan converts configs, before there are weights to time, and compiles each block
before it has seen data. So run 1, a few eager steps with ``profiled``, finds the plan,
and run 2 replays it with ``plan_converter`` and everything else as usual.
"""

import dataclasses
import functools
import inspect
import logging
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
from torch import nn

from fp8tune.auto import AutoFloat8
from fp8tune.config import Timing, TuneConfig
from fp8tune.errors import ConfigError
from fp8tune.integrations import float8_config, needs
from fp8tune.model.sharding import rebase
from fp8tune.plan.export import single_recipe
from fp8tune.plan.plan import Plan
from fp8tune.ranks.group import Ranks
from fp8tune.tuner.phases import Phase

__all__ = ["plan_converter", "profiled"]

_logger = logging.getLogger("fp8tune")


def plan_converter(plan: Plan | str | os.PathLike[str]) -> Any:
    """The plan for ``model_registry(..., converters=[plan_converter("plan.json")])``.

    Args:
        plan: the plan, or the file that ``profiled`` wrote.

    Returns:
        The Config of a Float8LinearConverter that converts exactly the plan's layers,
        with the torchao config of the plan's recipe.

    Raises:
        ExportError: the plan's recipe is none of torchao's.
        MissingPackageError: torchtitan is not installed.
    """
    loaded = plan if isinstance(plan, Plan) else Plan.load(plan)
    emulate = float8_config(loaded).emulate
    return _converter_class().Config(
        plan=loaded, recipe_name=single_recipe(loaded), emulate=emulate
    )


@functools.cache
def _converter_class() -> Any:
    with needs("torchtitan"):
        from torchtitan.components.quantization import (  # noqa: PLC0415
            Float8LinearConverter,
        )
        from torchtitan.models.common.linear import Linear  # noqa: PLC0415

    class PlanConverter(Float8LinearConverter):
        @dataclass(kw_only=True, slots=True)
        class Config(Float8LinearConverter.Config):
            plan: Any = field(repr=False)

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.plan = config.plan
            self.torchao_config = float8_config(config.plan)
            self.filter_fn = config.plan.module_filter_fn

        def convert(self, model_config: Any) -> Any:
            # Raises unless the plan was made for this model.
            names = [fqn for fqn, *_ in model_config.traverse(Linear.Config)]
            left = self.plan.exact_fqns(names)
            converted = len(names) - len(left)
            _logger.info("converting %d of %d Linears", converted, len(names))
            return super().convert(model_config)

    return PlanConverter


def profiled(
    model_spec: Any,
    path: str | os.PathLike[str],
    recipe: Any = "rowwise",
    **options: Any,
) -> Any:
    """A model spec whose run finds the plan and writes it to a file.

    Run it for a few steps more than ``warmup_steps``, without pipeline parallelism, with
    ``compile.enable`` off and ``training.disable_cuda_graphs`` on: layers inside compiled
    or graphed code cannot be watched. They are timed compiled all the same, as run 2
    will run them, unless ``config`` says otherwise.

    Args:
        model_spec: from torchtitan's model_registry; its configs are changed in place.
        path: where to write the plan, once it is frozen; a temporary folder takes it
            where this cannot be written, which is logged.
        recipe: that of AutoFloat8.
        options: the rest of AutoFloat8's.

    Returns:
        The ModelSpec to train.

    Raises:
        MissingPackageError: torchtitan is not installed.
    """
    tunable = _tunable_class()
    _swap_configs(model_spec.model, tunable)
    before = model_spec.post_optimizer_build_fn
    options["config"] = _timed_compiled(options.get("config", TuneConfig()))

    def tune(optimizers: Any, model_parts: list[nn.Module], parallel_dims: Any) -> None:
        if before is not None:
            before(optimizers, model_parts, parallel_dims)
        if len(model_parts) != 1 or parallel_dims.pp_enabled:
            raise ConfigError("profile without pipeline parallelism; see profiled()")
        for module in model_parts[0].modules():
            _make_plain(module, tunable)
        _save_when_frozen(AutoFloat8(model_parts[0], recipe, **options), Path(path))

    return dataclasses.replace(model_spec, post_optimizer_build_fn=tune)


def _timed_compiled(config: TuneConfig) -> TuneConfig:
    if config.timing is not Timing.AUTO:
        return config
    return dataclasses.replace(config, timing=Timing.COMPILED)


@functools.cache
def _tunable_class() -> Any:
    with needs("torchtitan"):
        from torchtitan.models.common.linear import Linear  # noqa: PLC0415

    class TunableLinear(Linear):
        """A Linear that looks up its forward on every call.

        torchtitan stores the bound forward when it parallelises a module, so that a
        module that changes its class afterwards would go on as what it was.
        """

        @dataclass(kw_only=True, slots=True)
        class Config(Linear.Config):
            pass

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            kind: Any = type(self)
            plain = issubclass(kind, TunableLinear)
            return (nn.Linear if plain else kind).forward(self, input)

    return TunableLinear


def _swap_configs(model_config: Any, tunable: Any) -> None:
    (linear,) = tunable.__bases__
    for _, config, parent, attribute in list(model_config.traverse(linear.Config)):
        if type(config) is not linear.Config:
            continue
        values = {x.name: getattr(config, x.name) for x in dataclasses.fields(config)}
        if isinstance(parent, list):
            parent[attribute] = tunable.Config(**values)
        else:
            setattr(parent, attribute, tunable.Config(**values))


def _make_plain(module: nn.Module, tunable: Any) -> None:
    """Make a TunableLinear an nn.Linear, or the FSDP2 subclass of one, that can do more.

    torchtitan's wrapped forward calls methods that nn.Linear has not; they stay reachable
    as attributes of the object.
    """
    plain = rebase(type(module), tunable, nn.Linear)
    if plain is None:
        return
    for name, method in inspect.getmembers(module, inspect.ismethod):
        if not hasattr(plain, name):
            vars(module)[name] = method
    module.__class__ = plain
    if "forward" in vars(module):  # ends in TunableLinear's
        vars(module)["forward"].looks_up_class = True


def _save_when_frozen(auto: AutoFloat8, path: Path) -> None:
    lost = "no plan was written to %s: the run ended before its tuning did"
    unsaved = finalize(auto.module, _logger.warning, lost, path)

    def save(module: nn.Module, args: Any) -> None:
        if auto.plan is not None and auto.phase is Phase.FROZEN:
            handle.remove()
            unsaved.detach()
            if Ranks().first:
                _save(auto.plan, path)

    # After AutoFloat8's own, so in the very forward that freezes the plan.
    handle = auto.module.register_forward_pre_hook(save)


def _save(plan: Plan, path: Path) -> None:
    """Here or elsewhere: an error would end the training of all ranks."""
    try:
        plan.save(path)
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="fp8tune-"))
        plan.save(folder / path.name)
        _logger.warning(
            "the plan cannot be written to %s (%s); it is in %s instead",
            path,
            error,
            folder / path.name,
        )
    else:
        _logger.info("the plan is in %s", path)
