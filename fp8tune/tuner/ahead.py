"""A plan before training begins, of any layout, on one device.

::

    build + parallelize in a world that is not there --dry run--> calls --measure on the
    device at hand--> decide --> the Plan, and the cache of the real run

Timing, deciding and the cache are those of training; only the calls and the numbers in
the tensors come from elsewhere.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fp8tune.config import TuneConfig
from fp8tune.decision.trials import NONE_NEEDED
from fp8tune.errors import ConfigError, Fp8TuneError, ModelError, in_short
from fp8tune.model.candidates import Candidate
from fp8tune.model.dry_run import dry_run
from fp8tune.model.example_batch import example_inputs
from fp8tune.model.linears import named_gemms
from fp8tune.model.screen import why_not_plain
from fp8tune.model.sharding import to_local
from fp8tune.ranks.fake_world import fake_world, named_world, refuse_real_world
from fp8tune.ranks.group import Ranks
from fp8tune.recipes.registry import resolve_recipes
from fp8tune.report import messages
from fp8tune.tuner.checks import check_arguments, check_linears
from fp8tune.tuner.options import Options
from fp8tune.tuner.pipeline import Pipeline
from fp8tune.tuner.subject import subject_of_plan, write_page

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from fp8tune.compiling.apply import Compile
    from fp8tune.decision.records import Layer
    from fp8tune.model.capture import Capture
    from fp8tune.plan.plan import Plan
    from fp8tune.timing.clock import Clock

    Parallelize = Callable[[nn.Module, DeviceMesh], nn.Module | None]

__all__ = ["layers_ahead", "plan_ahead"]

logger = logging.getLogger("fp8tune")

_DEFAULTS = TuneConfig()


def plan_ahead(
    build: Callable[[], nn.Module],
    batch: Any,
    *,
    recipe: Any = "rowwise",
    parallelize: Parallelize | None = None,
    world: int | Mapping[str, int] = 1,
    device: torch.device | str | None = None,
    compile: Compile = True,
    cache: str | os.PathLike[str] | None = None,
    filter_fqns: Sequence[str] = (),
    config: TuneConfig = _DEFAULTS,
    clock: Clock | None = None,
) -> Plan:
    """Decide for a training run that has not begun, on the one device at hand.

    The model is built without memory, called once on tensors without values, and what its
    Linears were called with is timed with random numbers: normal activations with a few
    outlier channels, weights as nn.Linear initialises them. What cannot be seen so: real
    activations (the SQNR is synthetic), communication between ranks, and the whole step.

    Call it as training calls the model: in ``torch.autocast`` if that is used. One process
    plans for all ranks; what is sharded is what rank 0 holds.

    Args:
        build: returns the model in training mode; called on the meta device.
        batch: what one rank calls the model with: a tensor, a sequence of arguments or a
            dict of them by name. A tuple of ints is a shape: of token ids if the model has
            an nn.Embedding, else of activations.
        recipe: as for AutoFloat8, and so are the five at the end. An AutoFloat8 that is
            given the same, with the same model, layout and device, is frozen when its
            constructor returns.
        parallelize: applies tensor parallelism, FSDP2 or checkpointing to the model, and
            returns it or None; DDP leaves shapes as they are and needs none.
        world: number of ranks, or the sizes of the mesh that ``parallelize`` gets, by name
            and outermost first, such as ``{"dp": 32, "tp": 8}``.
        device: what the run will train on; by default a GPU if there is one.
        compile: decides whether layers are timed compiled; nothing is compiled with it.
        cache: what was timed before, and where the real run finds the plan.
        filter_fqns: a Linear whose name contains one of these stays as it is.
        config: with ``trial_steps`` the real run tries whole plans in its training steps
            all the same; by default it takes this plan as it is.
        clock: what times the work; by default CUDA events or the CPU's clock.

    Returns:
        The plan. It applies to models on the meta device and exports like any other.

    Raises:
        ConfigError: an argument that cannot be right, or a process of a real group.
        ModelError: the model cannot be built without weights or run without values.
    """
    check_arguments(
        warmup_steps=1,
        filter_fqns=filter_fqns,
        compile=compile,
        config=config,
        plan=None,
        cache=cache,
    )
    refuse_real_world()
    place = _device(device)
    recipes = resolve_recipes(recipe, place)
    model, dry = _run_dry(build, batch, parallelize, named_world(world), place)
    options = Options(
        warmup_steps=1,
        filter_fqns=filter_fqns,
        compile=compile,
        cache=cache,
        config=config,
        clock=clock,
        ranks=Ranks(),
    )
    plan = _plan(_seen(Pipeline(model, place, recipes, options), dry), options)
    logger.info("%s\n%s", plan, messages.AHEAD_LINE)
    return plan


def layers_ahead(
    build: Callable[[], nn.Module],
    batch: Any,
    *,
    recipe: Any = "rowwise",
    parallelize: Parallelize | None = None,
    world: int | Mapping[str, int] = 1,
    filter_fqns: Sequence[str] = (),
    config: TuneConfig = _DEFAULTS,
) -> tuple[Layer, ...]:
    """What training would call each Linear with; nothing is timed, and no device asked.

    Args:
        build: as for ``plan_ahead``, which raises the same, and so are the others.
        batch: what one rank calls the model with.
        recipe: what layers would be converted to.
        parallelize: splits the model.
        world: the ranks.
        filter_fqns: a Linear whose name contains one of these is left out.
        config: how to screen.
    """
    refuse_real_world()
    place = torch.device("cpu")
    model, dry = _run_dry(build, batch, parallelize, named_world(world), place)
    options = Options(
        warmup_steps=1,
        filter_fqns=filter_fqns,
        compile=False,
        cache=None,
        config=config,
        clock=None,
        ranks=Ranks(),
    )
    recipes = resolve_recipes(recipe, place)
    return _seen(Pipeline(model, place, recipes, options), dry).layers()


def _run_dry(
    build: Callable[[], nn.Module],
    batch: Any,
    parallelize: Parallelize | None,
    sizes: Mapping[str, int],
    device: torch.device,
) -> tuple[nn.Module, Capture]:
    if parallelize is None:
        _refuse_unused(sizes)
        return _called(_built(build), batch, device)
    with fake_world(sizes, device.type) as mesh:
        model = _split(parallelize, _built(build), mesh)
        return _called(model, batch, device)


def _split(parallelize: Parallelize, model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    try:
        returned = parallelize(model, mesh)
    except Fp8TuneError:
        raise
    except Exception as error:
        raise ModelError(
            f"parallelize does not split the model, which has no weights, over the mesh of "
            f"{mesh.mesh_dim_names} ({in_short(error)}); give world the dimensions that it "
            "asks for, and leave out of it what needs values or other ranks, such as "
            "DistributedDataParallel, which changes no shape"
        ) from error
    if returned is not None:
        check_linears(returned)
    return model if returned is None else returned


def _refuse_unused(sizes: Mapping[str, int]) -> None:
    """Data parallelism alone leaves a rank's shapes as they are."""
    splitting = [x for x, size in sizes.items() if size > 1 and not x.startswith("dp")]
    if splitting:
        raise ConfigError(
            f"world has the dimension {splitting[0]!r}, and nothing says how the model is "
            "split over it; give parallelize, a function of the model and the mesh"
        )


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    if not callable(build):
        raise ConfigError(f"build is {build!r}; it must be a function of no arguments")
    try:
        with torch.device("meta"):
            model = build()
    except Exception as error:
        raise ModelError(
            f"the model cannot be built without weights ({in_short(error)}); build() must only make "
            "it, not load or move it, and compute what it reads of tensors inside of "
            'torch.device("cpu")'
        ) from error
    check_linears(model)
    return model


def _called(
    model: nn.Module, batch: Any, device: torch.device
) -> tuple[nn.Module, Capture]:
    args, kwargs = example_inputs(batch, model)
    watched = [
        Candidate(fqn, x) for fqn, x in named_gemms(model) if not why_not_plain(x)
    ]
    return model, dry_run(model, watched, args, kwargs, device)


def _seen(pipeline: Pipeline, dry: Capture) -> Pipeline:
    """With what was captured in a dry run."""
    if not pipeline.candidates:
        logger.warning("%s", messages.no_candidates_line(pipeline.screened))
    stand_ins = [_on(pipeline.device, x) for x in pipeline.candidates]
    pipeline.capture.resume(*dry.counts(), stand_ins)
    return pipeline


def _plan(pipeline: Pipeline, options: Options) -> Plan:
    known = pipeline.cached_plan() if pipeline.candidates else None
    if known is not None and messages.shape_change(pipeline.layers(), known) is None:
        return known
    plan = pipeline.decide()
    assert plan is not None
    made_from = pipeline.run
    if pipeline.trial_steps and pipeline.candidates:
        pipeline.remember_trial(NONE_NEEDED)
    write_page(options.html, subject_of_plan(plan, made_from))
    return plan


def _on(device: torch.device, candidate: Candidate) -> Candidate:
    """The candidate, or where its weight has no values one that only says where it is."""
    if to_local(candidate.linear.weight).device == device:
        return candidate
    return replace(candidate, linear=nn.Linear(1, 1, bias=False, device=device))


def _device(wanted: torch.device | str | None) -> torch.device:
    name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cuda" and torch.cuda.is_available():
        # Tensors name the index, and are compared with this.
        return torch.device("cuda", device.index or torch.cuda.current_device())
    if device.type != "cpu":
        raise ConfigError(
            f"device is {wanted!r}, where nothing can be timed; give cpu, or cuda where "
            "torch finds a GPU"
        )
    return device
