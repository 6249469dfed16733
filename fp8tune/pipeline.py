"""The stages in order, from the model to a plan; when each runs is the tuner's business.

::

    screen -> capture -> measure -> consensus -> decide -> convert
                           |  ^
                           v  |
                          cache
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from fp8tune import report
from fp8tune.cache import Key
from fp8tune.capture import Capture
from fp8tune.checks import check_plan_recipe, check_recipe_fits
from fp8tune.clock import Clock, clock_for
from fp8tune.compiling import compile_options, timing_name, trial_steps
from fp8tune.consensus import RankTable, merge_calls, merge_measurements
from fp8tune.decide import decide
from fp8tune.environment import describe_environment
from fp8tune.layers import layer_of
from fp8tune.memory import default_capture_bytes
from fp8tune.options import Options
from fp8tune.plan import Plan
from fp8tune.recipes import Recipe, Recipes
from fp8tune.records import (
    Candidate,
    Layer,
    LeftOut,
    Measurement,
    Reason,
    Signature,
)
from fp8tune.report_recipes import accuracy_lines
from fp8tune.roles import after_trial
from fp8tune.screen import screen, unmatched_names
from fp8tune.shared_cache import SharedCache
from fp8tune.timing import time_signatures
from fp8tune.trial_records import TrialRecord

__all__ = ["Pipeline"]

logger = logging.getLogger("fp8tune")


class Pipeline:
    """The stages on one model.

    Args:
        module: the model; its Linears are screened at once.
        device: where it is.
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
        converted: the Linears that are converted right now, by name.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        recipes: Recipes,
        options: Options,
    ) -> None:
        self._module = module
        self._device = device
        self._recipes = recipes
        self._options = options
        self._ranks = options.ranks
        self._timed: tuple[Layer, ...] = ()
        config = options.config
        self._compile_options = compile_options(options.compile, config.timing, recipes)
        timing = timing_name(self._compile_options, config.context)
        environment = describe_environment(device)
        (name, settings), *also = [(x.name, x.settings) for x in recipes]
        self._key = Key(environment, name, settings, timing, tuple(also))
        self.converted: dict[str, nn.Linear] = {}
        self._converted_to: dict[str, Recipe] = {}
        self.screened = self._screen()
        self.candidates = [x for x in self.screened if isinstance(x, Candidate)]
        # What each candidate is converted to when it is: at first the first that fits.
        self._assigned = {x.fqn: self._fitting(x.excluded)[0] for x in self.candidates}
        if options.plan:
            self._assign(options.plan)
        self.capture = Capture(module, [], 0)
        self._cache = SharedCache(
            self._ranks,
            options.cache,
            self._key,
            tuple(layer_of(x) for x in self.screened),
            options.must_agree(),
        )

    def _screen(self) -> list[Candidate | LeftOut]:
        plan = self._options.plan
        if plan is not None:
            check_plan_recipe(plan, self._recipes)
            return plan.sort(self._module)
        names = self._options.filter_fqns
        unmatched = unmatched_names(self._module, names) if self._ranks.first else []
        for name in unmatched:
            logger.warning(
                "filter_fqns has %r, which is in the name of no Linear; is it spelt as "
                "in model.named_modules()?",
                name,
            )
        screened = screen(
            self._module,
            self._recipes,
            filter_fqns=names,
            static_filter=self._options.config.static_filter,
            include_output_layer=self._options.config.include_output_layer,
        )
        check_recipe_fits(screened, self._recipes)
        return screened

    def _fitting(self, excluded: tuple[tuple[str, Reason], ...]) -> list[Recipe]:
        """The recipes that a candidate is left to."""
        names = dict(excluded)
        return [x for x in self._recipes if x.name not in names]

    def watch(self, *, keep_tensors: bool) -> None:
        """Begin to capture afresh.

        Args:
            keep_tensors: also keep what calls are made with, for timing.
        """
        budget = self._options.config.capture_bytes
        if budget is None:
            budget = default_capture_bytes(self._device)
        self.capture.close()
        self.capture = Capture(
            self._module, self.candidates, budget if keep_tensors else 0
        )

    def layers(self) -> tuple[Layer, ...]:
        """Every Linear with the calls that were captured."""
        return tuple(layer_of(x, self.capture.calls(x.fqn)) for x in self.screened)

    def decide(self) -> Plan:
        """Measure what was captured and is not in the cache, agree, and decide.

        One collective, after all timing.
        """
        layers = self.layers()
        tables = self._ranks.gather(RankTable(layers, self._measure(layers)))
        measurements, spreads = merge_measurements(tables)
        self._cache.remember(tables, measurements)
        if self._ranks.first:
            for line in report.spread_lines(spreads):
                logger.info("%s", line)
        self._timed = merge_calls(layers, tables)
        return self._plan(self._timed, measurements)

    def cached_plan(self) -> Plan | None:
        """The plan, if the cache has all that it needs, on every rank or none."""
        found = self._cache.layers()
        if found is None:
            return None
        plan = self._plan(found, self._cache.of_run())
        if not self.trial_steps:
            return plan
        trial = self._cache.trial(found)
        return after_trial(plan, trial) if trial else None

    def _measure(self, layers: tuple[Layer, ...]) -> tuple[Measurement, ...]:
        """Time what is not in the cache. No collective."""
        results: list[Measurement] = []
        missing: dict[Signature, list[Recipe]] = {}
        for signature, recipes in sorted(self._wanted(layers).items()):
            for recipe, key in zip(self._recipes, self._key.each(), strict=True):
                known = self._cache.measurements(key)
                if recipe.name in recipes and signature in known:
                    results.append(known[signature])
                elif recipe.name in recipes:
                    missing.setdefault(signature, []).append(recipe)
        try:
            results += self._time(layers, missing)
        except KeyboardInterrupt:
            # What was timed so far need not be timed again.
            if self._ranks.size == 1:
                self._cache.remember([RankTable(layers, tuple(results))], results)
            raise
        return tuple(results)

    def _wanted(self, layers: Sequence[Layer]) -> dict[Signature, set[str]]:
        """The recipes that each signature is to be timed with."""
        wanted: dict[Signature, set[str]] = {}
        for layer in layers:
            names = {x.name for x in self._fitting(layer.excluded)}
            for signature, _ in layer.calls:
                wanted.setdefault(signature, set()).update(names)
        return wanted

    def _time(
        self, layers: Sequence[Layer], wanted: Mapping[Signature, Sequence[Recipe]]
    ) -> Iterator[Measurement]:
        return time_signatures(
            wanted,
            self.capture,
            self._options.config,
            device=self._device,
            layers=layers,
            clock=self._options.clock,
            compile_options=self._compile_options,
            shown=self._ranks.first,
        )

    def _plan(
        self, layers: Sequence[Layer], measurements: Iterable[Measurement]
    ) -> Plan:
        recipes = self._recipes
        plan = Plan(
            decide(layers, measurements, recipes.names, self._options.config),
            recipes.name,
            recipes.reference,
            recipes.emulated,
            self._key.timing,
            self._key.environment,
        )
        self._assign(plan)
        if self._ranks.first:
            for line in accuracy_lines(report.fold(plan.decisions)):
                logger.warning("%s", line)
        return plan

    def _assign(self, plan: Plan) -> None:
        """From now on convert each layer to what the plan has for it."""
        for fqn in self._assigned:
            decision = plan[fqn]
            name = decision.recipe or decision.nearest
            if name:
                self._assigned[fqn] = self._recipes.find(name)

    @property
    def assigned(self) -> list[Recipe]:
        """The recipes that candidates are converted to whenever they are converted."""
        return list(self._assigned.values())

    def clock(self) -> Clock:
        """The clock that was given, or that of the device."""
        return self._options.clock or clock_for(self._device)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that take gradients."""
        return [x for x in self._module.parameters() if x.requires_grad]

    @property
    def trial_steps(self) -> int:
        """Training steps that a trial may take; 0 where there is none.

        Pipeline stages have roles of their own and so no plans in common to try.
        """
        if self._cache.models > 1:
            return 0
        return trial_steps(self._options.config.trial_steps, self._options.compile)

    def remember_trial(self, trial: TrialRecord) -> None:
        """Save how a trial ended, so that the next run starts with the winner."""
        if self._timed:
            self._cache.remember_trial(self._timed, trial)

    def convert(self, fqns: Collection[str]) -> None:
        """Make exactly these candidates converted and the others plain."""
        wanted = frozenset(fqns)
        for candidate in self.candidates:
            fqn = candidate.fqn
            recipe = self._assigned[fqn] if fqn in wanted else None
            if self._converted_to.get(fqn) is not recipe:
                self._revert(fqn)
                if recipe:
                    recipe.convert(candidate.linear)
                    self.converted[fqn] = candidate.linear
                    self._converted_to[fqn] = recipe

    def _revert(self, fqn: str) -> None:
        if fqn in self.converted:
            self._converted_to.pop(fqn).revert(self.converted.pop(fqn))

    def conversions(self) -> list[tuple[nn.Linear, Recipe]]:
        """The Linears that are converted right now, and what to."""
        return [(x, self._converted_to[fqn]) for fqn, x in self.converted.items()]
