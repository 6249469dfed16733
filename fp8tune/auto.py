"""AutoFloat8: wrap a model, train it, and get float8 where it is faster."""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from fp8tune.checks import check_arguments, check_model
from fp8tune.clock import Clock
from fp8tune.compiling import Compile
from fp8tune.config import TuneConfig
from fp8tune.convert import reverted
from fp8tune.options import Options
from fp8tune.phases import Phase
from fp8tune.plan import Plan
from fp8tune.ranks import Ranks
from fp8tune.recipes import resolve_recipes
from fp8tune.tensorboard import Report, open_writer, watch_steps
from fp8tune.tuner import Tuner
from fp8tune.wrapper import SameKeys

__all__ = ["AutoFloat8"]

_DEFAULTS = TuneConfig()


class AutoFloat8(SameKeys):
    """Measures each Linear in the user's own training run and converts the faster ones.

    Use it in place of the model, or go on using the model: both do the same. state_dict
    and all names are those of the bare model.

    Args:
        module: the model, on its device, not compiled.
        recipe: "rowwise", "tensorwise", "rowwise_with_gw_hp", "bf16", the name of a
            registered recipe, a torchao Float8LinearConfig, or a Recipe; a sequence of
            them, of which each layer gets the best for it and with whose first it runs
            during warmup; or "auto", every recipe that the device runs natively.
        warmup_steps: training steps (a forward with gradients, then its backward) that
            are watched before the decision; at least 1.
        filter_fqns: a Linear whose name contains one of these stays as it is.
        compile: False, True, a dict of torch.compile options, or a callable that takes
            the module and compiles it or parts of it; applied at the freeze.
        cache: path of a JSON file that remembers timings. A run whose signatures are all
            in it is frozen when the constructor returns.
        process_group: the ranks that hold the same layers and must end with the same
            plan; by default all. Constructing and freezing are collective in it.
        plan: the decisions of an earlier run, as after a resume: frozen at once, nothing
            is timed, and shapes are not compared. The recipe must be the plan's.
        tensorboard: a folder, or a torch.utils.tensorboard.SummaryWriter, that gets the
            plan, and step times with the share of converted layers, step by step.
        config: the rarer knobs.
        clock: what times the work; by default CUDA events or the CPU's clock.

    Raises:
        ConfigError: an argument that cannot be right.
        ModelError: a model in which nothing could be tuned.
        PlanMismatchError: ``plan`` was made for another model.
        RankMismatchError: ranks that hold different layers or got different settings.
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: Any = "rowwise",
        *,
        warmup_steps: int = 3,
        filter_fqns: Sequence[str] = (),
        compile: Compile = False,
        cache: str | os.PathLike[str] | None = None,
        process_group: dist.ProcessGroup | None = None,
        plan: Plan | None = None,
        tensorboard: Any = None,
        config: TuneConfig = _DEFAULTS,
        clock: Clock | None = None,
    ) -> None:
        check_arguments(
            warmup_steps=warmup_steps,
            filter_fqns=filter_fqns,
            compile=compile,
            config=config,
            plan=plan,
        )
        device = check_model(module)
        super().__init__(module)
        options = Options(
            warmup_steps=warmup_steps,
            filter_fqns=filter_fqns,
            compile=compile,
            cache=cache,
            config=config,
            clock=clock,
            ranks=Ranks(process_group),
            plan=plan,
        )
        recipes = resolve_recipes(recipe, device)
        writer = open_writer(tensorboard) if options.ranks.first else None
        self._tuner = Tuner(module, device, recipes, options)
        if writer is not None:
            owned = writer is not tensorboard
            watch_steps(self, self._tuner, writer, close=owned)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, compiled once the plan is frozen."""
        return self._tuner.target(*args, **kwargs)

    @property
    def phase(self) -> Phase:
        """Where tuning is: warmup, replayed (from a cache, not yet checked) or frozen."""
        phase = self._tuner.phase
        assert phase is not None
        return phase

    @property
    def frozen(self) -> bool:
        """Whether there is a plan."""
        return self._tuner.plan is not None

    @property
    def plan(self) -> Plan | None:
        """The decisions, or None until frozen."""
        return self._tuner.plan

    def freeze(self) -> Plan:
        """Decide now, on the training steps seen so far.

        Returns:
            The plan; layers that no step called stay in high precision.

        Raises:
            PhaseError: a forward pass still waits for its backward.
        """
        return self._tuner.freeze()

    def trial(self, training_step: Callable[[], object]) -> Plan:
        """Tune in steps of one's own, for those who prefer an explicit call.

        Args:
            training_step: runs one training step with this model; called until the plan
                is frozen.

        Returns:
            The plan.

        Raises:
            PhaseError: the steps do not get on, as when nothing is differentiated.
        """
        return self._tuner.run(training_step)

    def report(self) -> Report:
        """The table of decisions, or how far tuning has come.

        Returns:
            Text; its method ``to_tensorboard(writer)`` writes the same and pictures.
        """
        return Report.of(self._tuner.status(), self._tuner.plan)

    @contextmanager
    def reference(self) -> Generator[None]:
        """Inside the block every layer runs in high precision, as for an evaluation."""
        with reverted(self._tuner.conversions):
            yield
