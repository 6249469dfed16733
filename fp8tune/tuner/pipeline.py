"""The stages in order, from the model to a plan; when each runs is the tuner's business.

::

    screen -> capture -> measure -> consensus -> decide -> convert
                           |  ^
                           v  |
                          cache
"""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from fp8tune.compiling.apply import compile_options, timing_name, trial_steps
from fp8tune.decision.coverage import Coverage, merged_coverage
from fp8tune.decision.decisions import with_uncounted
from fp8tune.decision.records import Layer, Measurement
from fp8tune.decision.trials import NONE_NEEDED, TrialRecord
from fp8tune.decision.trust import Expectation
from fp8tune.decision.watched import Fallen
from fp8tune.model.candidates import Candidate
from fp8tune.model.capture import Capture
from fp8tune.model.layers import layer_of
from fp8tune.model.sharding import running_device
from fp8tune.model.steps import Steps
from fp8tune.plan.plan import Plan
from fp8tune.ranks.consensus import RankTable, merge_calls, merge_measurements
from fp8tune.recipes.registry import Recipes
from fp8tune.report.coverage import expert_lines
from fp8tune.report.messages import spread_lines
from fp8tune.report.recipes import accuracy_lines
from fp8tune.report.table import fold
from fp8tune.store.cache import Key
from fp8tune.store.environment import describe_environment
from fp8tune.store.runs import Run
from fp8tune.store.shared_cache import SharedCache
from fp8tune.timing.clock import Clock
from fp8tune.timing.clocks import clock_for_steps
from fp8tune.timing.memory import default_capture_bytes
from fp8tune.tuner.cached import tried, without_fallen
from fp8tune.tuner.checks import warn_of_no_common_trial
from fp8tune.tuner.conversions import Conversions, without_lost
from fp8tune.tuner.measuring import Measuring
from fp8tune.tuner.options import Options
from fp8tune.tuner.screening import screen_again, screen_model

__all__ = ["Pipeline"]

logger = logging.getLogger("fp8tune")


class Pipeline:
    """The stages on one model.

    Args:
        module: the model; its Linears are screened at once.
        device: where it is; kept under this name.
        recipes: what its Linears may be converted to.
        options: the rest.

    Raises:
        ModelError: no recipe takes the dtype of any Linear.
        PlanMismatchError: a plan was given that was made for another model.
        RankMismatchError: ranks hold different layers or got different settings.

    Attributes:
        screened: one record per Linear, in model order.
        candidates: those of them that are to be timed.
        capture: what the hooks saw since the last ``watch``.
        conversions: which of them are converted right now.
        steps: the model's training steps so far.
        run: what the plan was made from, or None while there is none.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        recipes: Recipes,
        options: Options,
    ) -> None:
        self._module = module
        self.device = device
        self._recipes = recipes
        self._options = options
        self._ranks = options.ranks
        config = options.config
        compiled = compile_options(options.compile, config.timing, recipes)
        timing = timing_name(compiled, config.context)
        environment = describe_environment(device)
        (name, settings), *also = [(x.name, x.settings) for x in recipes]
        self._key = Key(environment, name, settings, timing, tuple(also))
        self.run: Run | None = None
        self.screened = screen_model(module, recipes, options)
        self.candidates = [x for x in self.screened if isinstance(x, Candidate)]
        self.conversions = Conversions(module, self.candidates, recipes)
        if options.plan:
            self.conversions.assign(options.plan)
        self.steps = Steps(module)
        self.capture = Capture(module, [], 0)
        self._cache = SharedCache(
            self._ranks,
            options.cache,
            self._key,
            tuple(layer_of(x) for x in self.screened),
            options.must_agree(),
        )
        self._measuring = Measuring(
            self._cache,
            self._key,
            recipes,
            options,
            compile_options=compiled,
            device=device,
        )
        if self._ranks.first:
            warn_of_no_common_trial(config.trial_steps, self._cache.models)

    def watch(
        self,
        began: Callable[[], object],
        gradient_seen: Callable[[], object],
        *,
        keep_tensors: bool,
    ) -> None:
        """Begin to capture afresh.

        Args:
            began: called before each pass of training.
            gradient_seen: called whenever a gradient reaches the model.
            keep_tensors: also keep what calls are made with, for timing.
        """
        budget = self._options.config.capture_bytes
        if budget is None:
            budget = default_capture_bytes(self.device)
        self.capture.close()
        kept = budget if keep_tensors else 0
        give_up = partial(self.conversions.give_up, said=self._ranks.first)
        self.capture = Capture(
            self._module, self.candidates, kept, gradient_seen, began, give_up=give_up
        )
        if keep_tensors:
            self.capture.count_products()

    def layers(self) -> tuple[Layer, ...]:
        """Every Linear with the calls that were captured."""
        return tuple(layer_of(x, self.capture.calls(x.fqn)) for x in self.screened)

    def decide(self, *, wait: bool = True) -> Plan | None:
        """Measure what was captured and the cache does not cover, agree, and decide.

        The ranks meet before all timing, to share it, and after it.

        Args:
            wait: for every rank; see ``Ranks.meet``.

        Returns:
            The plan, or None: to be called again in the next step.
        """
        self._rescreen()
        layers = self.layers()
        tables = self._measuring.tables(layers, self.capture, wait=wait)
        return None if tables is None else self._conclude(layers, tables)

    def _conclude(self, layers: tuple[Layer, ...], tables: Sequence[RankTable]) -> Plan:
        measurements, spreads = merge_measurements(tables)
        self._cache.remember(tables, measurements)
        for line in spread_lines(spreads) if self._ranks.first else ():
            logger.info("%s", line)
        coverage = merged_coverage(x.coverage for x in tables)
        expected = [x for table in tables for x in table.expected]
        every = merge_calls(layers, tables)
        plan = self._plan(every, measurements, coverage, expected)
        return with_uncounted(plan, [x for table in tables for x in table.uncounted])

    def _rescreen(self) -> list[str]:
        """Give up candidates that were replaced or changed; returns their names."""
        seen, said = self.capture.transformed, self._ranks.first
        with self.conversions.gathered_plainly():
            self.screened = screen_again(
                self._module, self.screened, self._recipes, seen, said=said
            )
        left = {x.fqn: x for x in self.screened if isinstance(x, Candidate)}
        lost = [x.fqn for x in self.candidates if x.fqn not in left]
        self.candidates = list(left.values())
        self.conversions.drop(lost)
        return lost

    def confirmed(self, plan: Plan) -> Plan:
        """The plan without the layers that were replaced or changed since it was made."""
        lost = self._rescreen()
        return without_lost(plan, lost, self.screened) if lost else plan

    def cached_plan(self) -> Plan | None:
        """The plan, if the cache has all that it needs, on every rank or none."""
        found = self._cache.layers()
        if found is None:
            return None
        plan = self._plan(found, self._cache.of_run(), self._cache.coverage(found))
        if self.trial_steps:
            trial = self._cache.trial(found)
            if trial != NONE_NEEDED:
                self.run = self.run and replace(self.run, trial=trial)
            plan = tried(plan, trial, self._options.config.trial_steps)
        least_db, said = self._options.config.min_sqnr_db, self._ranks.first
        fallen = self._cache.fallen(found)
        return plan and without_fallen(plan, fallen, least_db, said=said)

    def _plan(
        self,
        layers: Sequence[Layer],
        measurements: Sequence[Measurement],
        coverage: Coverage | None,
        expected: Sequence[Expectation] = (),
    ) -> Plan:
        recipes, config = self._recipes, self._options.config
        self.run = Run(
            1,
            self._key,
            tuple(layers),
            tuple(measurements),
            config,
            coverage=coverage,
            expected=tuple(expected),
        )
        plan = Plan(
            self.run.alone,
            recipes.name,
            recipes.reference,
            recipes.emulated,
            self._key.timing,
            self._key.environment,
            coverage=coverage,
        )
        self.conversions.assign(plan, self.capture.without_rows)
        if self._ranks.first:
            for line in (
                *accuracy_lines(fold(plan.decisions)),
                *expert_lines(coverage),
            ):
                logger.warning("%s", line)
        return plan

    def clock(self) -> Clock:
        """The clock that was given, or that of the devices."""
        places = [self.device, *(running_device(x.linear) for x in self.candidates)]
        return self._options.clock or clock_for_steps(places)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that take gradients."""
        return [x for x in self._module.parameters() if x.requires_grad]

    @property
    def staged(self) -> bool:
        """Whether ranks hold different layers, as pipeline stages do."""
        return self._cache.models > 1

    @property
    def trial_steps(self) -> int:
        """Training steps that a trial may take; none with stages, whose roles differ."""
        if self.staged:
            return 0
        return trial_steps(self._options.config.trial_steps, self._options.compile)

    def know(self, measurements: Sequence[Measurement]) -> None:
        """Take timings of this process, which need not be made again."""
        self._cache.know(measurements)

    def restore(
        self, layers: tuple[Layer, ...], measurements: tuple[Measurement, ...]
    ) -> None:
        """Take up what a plan of an earlier process was made from."""
        self.run = Run(1, self._key, layers, measurements, self._options.config)

    def remember_trial(self, trial: TrialRecord) -> None:
        """Save how a trial ended, so that the next run starts with the winner."""
        assert self.run is not None
        self.run = replace(self.run, trial=trial)
        self._cache.remember_trial(self.run.layers, trial, self.run.coverage)

    def remember_fallen(self, fallen: Iterable[Fallen]) -> None:
        """Save which layers lost their accuracy, for the next run."""
        self._cache.remember_fallen(fallen)

    def convert(self, fqns: Collection[str]) -> None:
        """Make exactly these candidates converted and the others plain."""
        self.conversions.convert(fqns)
