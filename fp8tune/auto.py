"""AutoFloat8: wrap a model, train it, and get float8 where it is faster."""

import logging
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn

from fp8tune.compiling.apply import Compile
from fp8tune.config import TuneConfig
from fp8tune.model.wrapper import SameKeys
from fp8tune.plan.plan import Plan
from fp8tune.ranks.group import Ranks
from fp8tune.recipes.registry import resolve_recipes
from fp8tune.report.messages import own_names_line
from fp8tune.report.report import Report
from fp8tune.report.step_log import watch_steps
from fp8tune.report.tensorboard import open_writer
from fp8tune.timing.clock import Clock
from fp8tune.tuner.checks import check_arguments, check_model
from fp8tune.tuner.options import Options
from fp8tune.tuner.phases import Phase
from fp8tune.tuner.resuming import ResumableTuner
from fp8tune.tuner.settled import Settled
from fp8tune.tuner.watched import WatchedTuner

__all__ = ["AutoFloat8"]

_DEFAULTS = TuneConfig()

# Every module has these.
_OF_MODULES = frozenset(dir(nn.Module))


class AutoFloat8(SameKeys):
    """Measures each Linear in the user's own training run and converts the faster ones.

    Use it in place of the model, or go on using the model: both do the same. state_dict
    and all names are those of the bare model.

    Args:
        module: the model, on its device, not compiled.
        recipe: "rowwise", "tensorwise", "rowwise_with_gw_hp", "bf16", the name of a
            registered recipe, a torchao Float8LinearConfig, or a Recipe; a sequence of
            them, of which each layer gets the best for it and with whose first it runs
            during warmup; or "auto", every recipe that the device runs natively. None,
            the default, is the given plan's recipe, or else "rowwise".
        warmup_steps: training steps (a forward with gradients, then its backward) that
            are watched before the decision. 0 decides before the first training forward,
            which then runs compiled, by a dry run on fake tensors and timings on random
            numbers; the first forward with gradients is then a collective.
        filter_fqns: a Linear whose name contains one of these stays as it is.
        compile: False, True, a dict of torch.compile options, or a callable that takes
            the module and compiles it or parts of it; applied at the freeze.
        cache: path of a JSON file that remembers timings, or the URL of a folder that
            fsspec knows, as "s3://bucket/fp8tune", which many jobs may share. A run whose
            signatures are all in it is frozen when the constructor returns.
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
        recipe: Any = None,
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
            cache=cache,
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
        if recipe is None:
            recipe = plan.recipe if plan else "rowwise"
        recipes = resolve_recipes(recipe, device)
        hidden = [
            x
            for x in vars(AutoFloat8)
            if x[0] != "_" and x not in _OF_MODULES and hasattr(module, x)
        ]
        if hidden and options.ranks.first:
            line = own_names_line(type(module).__name__, hidden)
            logging.getLogger("fp8tune").warning("%s", line)
        writer = open_writer(tensorboard) if options.ranks.first else None
        # Not by attribute assignment, which would set it on the model.
        self.__dict__["_tuner"] = WatchedTuner(module, device, recipes, options)
        if writer is not None:
            owned = writer is not tensorboard
            watch_steps(self, self._tuner, writer, close=owned)

    _tuner: ResumableTuner | Settled

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> Self:
        super()._apply(fn, recurse)
        self._tuner.moved()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which have a plan or none, and are not tuned."""
        settled = Settled.of(self._tuner, self.module)
        return {**super().__getstate__(), "_tuner": settled}

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

    def abandon(self) -> None:
        """Give the model back in high precision, in any phase, with nothing of ours on it.

        Parts that ``compile`` compiled in place run eagerly again. Does nothing the
        second time.
        """
        self._tuner.abandon()

    def retune(self) -> None:
        """Begin a new warmup at the next step, as after layers were frozen or unfrozen.

        What was timed before is not timed again; collective, and to be called between
        two training steps.

        Raises:
            PhaseError: a forward pass waits for its backward, or the model is compiled.
        """
        self._tuner.retune()

    def tuning_state(self) -> dict[str, Any]:
        """How far tuning has come, for a checkpoint; no tensors.

        Returns:
            What JSON can hold: ``phase``; in warmup ``seen``, the training steps and each
            layer's calls; in the trial and after it ``plan``, and of the trial the steps
            that it timed.
        """
        return self._tuner.state_dict()

    def load_tuning_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``tuning_state`` returned, before the first training step.

        Layers whose tensors no step of this process shows are timed on random numbers.

        Args:
            state: of the same model with the same arguments, the same on every rank.

        Raises:
            PhaseError: training has begun, or the plan is frozen.
            PlanMismatchError: the state is that of another model.
            CacheError: the state is damaged.
        """
        self._tuner.load_state_dict(state)

    @property
    def tuner(self) -> ResumableTuner | Settled:
        """What tunes, for models that have a ``freeze`` or ``plan`` of their own."""
        return self._tuner

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
            Text; its methods ``to_html(path)``, ``to_tensorboard(writer)`` and
            ``log_to(run)`` write the same and pictures.
        """
        tuner = self._tuner
        return Report.of(tuner.status(), tuner.subject, tuner.plan)

    @contextmanager
    def reference(self) -> Generator[None]:
        """Inside the block every layer runs in high precision, as for an evaluation."""
        with self._tuner.reference():
            yield
