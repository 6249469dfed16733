"""The stages in order, from the model to a plan; when each runs is the tuner's business.

::

    screen -> capture -> measure -> consensus -> decide -> convert
                           |  ^
                           v  |
                          cache
"""

import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fp8tune import report
from fp8tune.cache import Cache, Key
from fp8tune.capture import Capture
from fp8tune.checks import check_recipe_fits
from fp8tune.clock import Clock, clock_for
from fp8tune.compiling import Compile, compile_options, timing_name
from fp8tune.config import TuneConfig
from fp8tune.consensus import (
    RankTable,
    check_layers,
    first_difference,
    merge_calls,
    merge_measurements,
)
from fp8tune.decide import decide
from fp8tune.environment import describe_environment
from fp8tune.errors import RankMismatchError
from fp8tune.linears import dtype_name
from fp8tune.measure import measure
from fp8tune.memory import default_capture_bytes
from fp8tune.plan import Plan
from fp8tune.ranks import Ranks
from fp8tune.recipes import Recipe
from fp8tune.records import Candidate, Layer, LeftOut, Measurement, Signature
from fp8tune.screen import screen, unmatched_names

__all__ = ["Options", "Pipeline"]

logger = logging.getLogger("fp8tune")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The checked arguments of AutoFloat8."""

    warmup_steps: int
    filter_fqns: Sequence[str]
    compile: Compile
    cache: str | os.PathLike[str] | None
    config: TuneConfig
    clock: Clock | None
    ranks: Ranks

    def must_agree(self) -> dict[str, str]:
        """What would make plans differ if ranks had been given different values."""
        return {
            "warmup_steps": str(self.warmup_steps),
            "filter_fqns": str(list(self.filter_fqns)),
            "config": str(replace(self.config, capture_bytes=None)),
        }


class Pipeline:
    """The stages on one model.

    Args:
        module: the model; its Linears are screened at once.
        device: where it is.
        recipe: what its Linears may be converted to.
        options: the rest.

    Raises:
        ModelError: the recipe does not take the dtype of any Linear.
        RankMismatchError: ranks hold different layers or got different settings.

    Attributes:
        screened: one record per Linear, in model order.
        candidates: those of them that are to be timed.
        capture: what the hooks saw since the last ``watch``.
        converted: the Linears that are converted right now, by name.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, recipe: Recipe, options: Options
    ) -> None:
        self._module = module
        self._device = device
        self._recipe = recipe
        self._options = options
        self._ranks = options.ranks
        self._mixed: str | None = None
        self._compile_options = compile_options(options.compile, options.config.timing)
        timing = timing_name(self._compile_options)
        environment = describe_environment(device)
        self._key = Key(environment, recipe.name, recipe.settings, timing)
        self.converted: dict[str, nn.Linear] = {}
        self.screened = self._screen()
        self.candidates = [x for x in self.screened if isinstance(x, Candidate)]
        self.capture = Capture(module, [], 0)
        self._models = self._compare_ranks()
        self._cache = self._shared_cache()

    def _screen(self) -> list[Candidate | LeftOut]:
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
            self._recipe,
            filter_fqns=names,
            static_filter=self._options.config.static_filter,
        )
        check_recipe_fits(screened, self._recipe)
        return screened

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
        return tuple(_layer(x, self.capture.calls(x.fqn)) for x in self.screened)

    def _compare_ranks(self) -> list[tuple[Layer, ...]]:
        """Every rank's layers. One collective."""
        own = tuple(_layer(x, ()) for x in self.screened)
        gathered = self._ranks.gather((self._key, self._options.must_agree(), own))
        keys = [key for key, _, _ in gathered]
        settings = [
            {"recipe": key.recipe, "settings": key.settings, "timing": key.timing}
            | options
            for key, options, _ in gathered
        ]
        difference = first_difference(settings)
        if difference:
            raise RankMismatchError(f"{difference}; give every rank the same")
        check_layers([layers for _, _, layers in gathered])
        self._mixed = first_difference([dict(key.environment) for key in keys])
        return [layers for _, _, layers in gathered]

    def _shared_cache(self) -> Cache | None:
        """The first rank's cache, read by it alone. One collective."""
        path, first = self._options.cache, self._ranks.first
        cache = Cache(path) if first and path is not None else None
        if cache and self._mixed:
            logger.warning("%s; such a mix of timings is not cached", self._mixed)
            cache = None
        return self._ranks.broadcast(cache)

    def decide(self) -> Plan:
        """Measure what was captured and is not in the cache, agree, and decide.

        One collective, after all timing.
        """
        layers = self.layers()
        tables = self._ranks.gather(RankTable(layers, self._measure(layers)))
        measurements, spreads = merge_measurements(tables)
        if self._ranks.first:
            self._remember(tables, measurements.values())
            for line in report.spread_lines(spreads):
                logger.info("%s", line)
        return self._plan(merge_calls(layers, tables), measurements)

    def cached_plan(self) -> Plan | None:
        """The plan, if the cache has all measurements for it, on every rank or none."""
        cache = self._cache
        if cache is None:
            return None
        found = [cache.layers(self._key, layers) for layers in self._models]
        if None in found:
            if self._ranks.first:
                miss = self._models[found.index(None)]
                logger.info("cache miss: %s", cache.explain_miss(self._key, miss))
            return None
        own = found[self._ranks.rank] or ()
        return self._plan(own, cache.measurements(self._key))

    def _remember(
        self, tables: Sequence[RankTable], measurements: Iterable[Measurement]
    ) -> None:
        """Save every rank's layers with what was measured of their signatures."""
        if self._cache is None:
            return
        known = list(measurements)
        models = {table.layers for table in tables}
        for layers in {merge_calls(model, tables) for model in models}:
            called = {signature for layer in layers for signature, _ in layer.calls}
            # What a busy machine timed is good for this run, not for later ones.
            timed = [x for x in known if x.signature in called and x.steady]
            if timed:
                self._cache.save(self._key, layers, timed)

    def _measure(self, layers: tuple[Layer, ...]) -> tuple[Measurement, ...]:
        """Time the signatures that are not in the cache. No collective."""
        wanted = sorted({signature for x in layers for signature, _ in x.calls})
        known = self._cache.measurements(self._key) if self._cache else {}
        results = {x: known[x] for x in wanted if x in known}
        try:
            self._time([x for x in wanted if x not in known], results)
        except KeyboardInterrupt:
            # What was timed so far need not be timed again.
            timed = tuple(results.values())
            if self._ranks.size == 1:
                self._remember([RankTable(layers, timed)], timed)
            raise
        return tuple(results.values())

    def _time(
        self, signatures: Sequence[Signature], results: dict[Signature, Measurement]
    ) -> None:
        if not signatures:
            return
        config = self._options.config
        clock = self._options.clock or clock_for(self._device)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            for number, signature in enumerate(signatures, 1):
                results[signature] = measure(
                    self.capture.sample(signature),
                    self._recipe,
                    clock,
                    config,
                    self._compile_options,
                    release=self.capture.release_tensors,
                )
                line = report.measurement_line(results[signature], config)
                if self._ranks.first:
                    logger.info("[%d/%d] %s", number, len(signatures), line)

    def _plan(
        self, layers: Sequence[Layer], measurements: Mapping[Signature, Measurement]
    ) -> Plan:
        recipe = self._recipe
        return Plan(
            decide(layers, measurements, recipe.name, self._options.config),
            recipe.name,
            recipe.reference,
            recipe.emulated,
            self._key.timing,
            self._key.environment,
        )

    def convert(self, fqns: Collection[str]) -> None:
        """Make exactly these candidates converted and the others plain."""
        wanted = frozenset(fqns)
        for candidate in self.candidates:
            fqn, linear = candidate.fqn, candidate.linear
            if fqn in wanted and fqn not in self.converted:
                self._recipe.convert(linear)
                self.converted[fqn] = linear
            elif fqn not in wanted and fqn in self.converted:
                self._recipe.revert(self.converted.pop(fqn))


def _layer(
    record: Candidate | LeftOut, calls: tuple[tuple[Signature, int], ...]
) -> Layer:
    linear = record.linear
    return Layer(
        record.fqn,
        linear.in_features,
        linear.out_features,
        dtype_name(linear.weight.dtype),
        linear.weight.requires_grad,
        None if isinstance(record, Candidate) else record.reason,
        calls,
    )
