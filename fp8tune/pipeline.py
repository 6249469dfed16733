"""The stages in order, from the model to a plan; when each runs is the tuner's business.

::

    screen -> capture -> measure -> consensus -> decide -> convert
                           |  ^
                           v  |
                          cache
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fp8tune import report
from fp8tune.cache import Cache, Key
from fp8tune.capture import Capture
from fp8tune.checks import check_recipe_fits
from fp8tune.clock import Clock, clock_for
from fp8tune.compiling import Compile, compile_options, timing_name
from fp8tune.config import TuneConfig
from fp8tune.consensus import agree
from fp8tune.decide import decide
from fp8tune.environment import describe_environment
from fp8tune.linears import dtype_name
from fp8tune.measure import measure
from fp8tune.memory import default_capture_bytes
from fp8tune.plan import Plan
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
    cache: Cache | None
    config: TuneConfig
    clock: Clock | None


class Pipeline:
    """The stages on one model.

    Args:
        module: the model; its Linears are screened at once.
        device: where it is.
        recipe: what its Linears may be converted to.
        options: the rest.

    Raises:
        ModelError: the recipe does not take the dtype of any Linear.

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
        self._compile_options = compile_options(options.compile, options.config.timing)
        timing = timing_name(self._compile_options)
        environment = describe_environment(device)
        self._key = Key(environment, recipe.name, recipe.settings, timing)
        self.converted: dict[str, nn.Linear] = {}
        self.screened = self._screen()
        self.candidates = [x for x in self.screened if isinstance(x, Candidate)]
        self.capture = Capture(module, [], 0)

    def _screen(self) -> list[Candidate | LeftOut]:
        names = self._options.filter_fqns
        for name in unmatched_names(self._module, names):
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

    def decide(self) -> Plan:
        """Measure what was captured and is not in the cache, and decide."""
        layers = self.layers()
        return self._plan(layers, agree(self._measure(layers)))

    def cached_plan(self) -> Plan | None:
        """The plan that the cache has all measurements for, or None."""
        cache = self._options.cache
        if cache is None:
            return None
        layers = tuple(_layer(x, ()) for x in self.screened)
        found = cache.layers(self._key, layers)
        if found is None:
            logger.info("cache miss: %s", cache.explain_miss(self._key, layers))
            return None
        return self._plan(found, cache.measurements(self._key))

    def _measure(self, layers: tuple[Layer, ...]) -> dict[Signature, Measurement]:
        wanted = sorted({signature for x in layers for signature, _ in x.calls})
        cache = self._options.cache
        known = cache.measurements(self._key) if cache else {}
        results = {x: known[x] for x in wanted if x in known}
        try:
            self._time([x for x in wanted if x not in known], results)
        finally:
            # Also after Ctrl-C: what was timed so far is not timed again.
            if cache and results:
                cache.save(self._key, layers, list(results.values()))
        return results

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
                sample = self.capture.sample(signature)
                results[signature] = measure(
                    sample, self._recipe, clock, config, self._compile_options
                )
                line = report.measurement_line(results[signature], config)
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
