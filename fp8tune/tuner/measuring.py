"""What was captured -> what every rank measured of it, and what the cache knew already."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from fp8tune.decision.kinds import kind_of
from fp8tune.decision.trust import Prior, clear_kinds, unsure_kinds
from fp8tune.ranks.consensus import RankTable
from fp8tune.ranks.shares import Shares
from fp8tune.report.messages import expected_line, share_line
from fp8tune.store.tables import table_for
from fp8tune.timing.signatures import compile_signatures, time_signatures
from fp8tune.tuner.cached import from_cache

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from fp8tune.decision.kinds import Kind
    from fp8tune.decision.records import Layer, Measurement, Signature
    from fp8tune.decision.trust import Expectation
    from fp8tune.model.capture import Capture
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.recipes.registry import Recipes
    from fp8tune.store.cache import Key
    from fp8tune.store.shared_cache import SharedCache
    from fp8tune.timing.replay import CompiledBodies
    from fp8tune.tuner.options import Options

__all__ = ["Measuring"]

logger = logging.getLogger("fp8tune")


class Measuring:
    """Times what the cache does not cover, a part on each rank.

    Args:
        cache: what was timed before.
        key: of all recipes.
        recipes: what layers may be converted to.
        options: the ranks, the clock and the config.
        compile_options: keyword arguments of torch.compile, or None to time eagerly.
        device: where the model is.
    """

    def __init__(
        self,
        cache: SharedCache,
        key: Key,
        recipes: Recipes,
        options: Options,
        *,
        compile_options: Mapping[str, Any] | None,
        device: torch.device,
    ) -> None:
        self._cache = cache
        self._key = key
        self._recipes = recipes
        self._options = options
        self._compile_options = compile_options
        self._device = device
        self._shares = Shares(options.ranks)

    def tables(
        self, layers: tuple[Layer, ...], capture: Capture, *, wait: bool
    ) -> list[RankTable] | None:
        """Every rank's table. The ranks meet before all timing, to share it, and after.

        Args:
            layers: with their calls.
            capture: the tensors that they were seen with.
            wait: for every rank; see ``Ranks.meet``.

        Returns:
            The tables, or None: to be called again in the next step.
        """
        known, missing = from_cache(self._cache, self._recipes, self._key, layers)
        # Traces are of what the first rank times.
        splits = self._options.config.profile_dir is None
        clear = self._clear(layers, known, missing) if wait else {}
        trusts = self._options.config.trust_prior
        mine, skipped = self._shares.of(
            missing,
            splits=splits,
            wait=wait,
            unsure=unsure_kinds(layers, clear) if trusts else None,
        )
        if self._options.ranks.first:
            self._say_shares(len(mine), len(missing), len(skipped))
        compiled: CompiledBodies = {}
        if self._shares.shared and self._compile_options is not None:
            compile_mine = partial(self._compile, capture, mine, compiled)
            self._options.ranks.meet(compile_mine, "the end of compiling")
        expected = [y for x in {kind_of(z) for z in skipped} for y in clear.get(x, ())]
        found = self._options.ranks.meet(
            lambda: RankTable(
                layers,
                self._measure(layers, capture, known, mine, compiled),
                capture.coverage,
                capture.uncounted,
                tuple(sorted(expected)),
            ),
            "the end of warmup",
            wait=wait,
        )
        if found is not None:
            self._shares.over()
        return found

    def _clear(
        self,
        layers: Sequence[Layer],
        known: Sequence[Measurement],
        missing: Mapping[Signature, Sequence[Recipe]],
    ) -> dict[Kind, list[Expectation]]:
        """What need not be timed, by what this rank knows. No collective."""
        config = self._options.config
        if not config.trust_prior:
            return {}
        wanted = {x: [y.name for y in each] for x, each in missing.items()}
        priors = {x.recipe: self._prior(x) for x in self._key.each()}
        return clear_kinds(layers, wanted, (x.signature for x in known), priors, config)

    def _prior(self, key: Key) -> Prior:
        timed = self._cache.measurements(key).values()
        return Prior.of(key.recipe, timed, table_for(key), self._options.config)

    def _say_shares(self, mine: int, missing: int, skipped: int) -> None:
        timed = missing - skipped
        if self._options.config.trust_prior:
            logger.info("%s", expected_line(timed, skipped))
        if mine < timed:
            logger.info("%s", share_line(mine, timed))

    def _compile(
        self,
        capture: Capture,
        wanted: Mapping[Signature, Sequence[Recipe]],
        compiled: CompiledBodies,
    ) -> None:
        assert self._compile_options is not None
        compile_signatures(
            wanted,
            capture,
            self._options.config,
            device=self._device,
            clock=self._options.clock,
            compile_options=self._compile_options,
            compiled=compiled,
            shown=self._options.ranks.first,
        )

    def _measure(
        self,
        layers: tuple[Layer, ...],
        capture: Capture,
        known: Sequence[Measurement],
        wanted: Mapping[Signature, Sequence[Recipe]],
        compiled: CompiledBodies,
    ) -> tuple[Measurement, ...]:
        """What the cache knows, and what is wanted, timed. No collective."""
        results = list(known)
        try:
            results += self._time(layers, capture, wanted, compiled)
        except KeyboardInterrupt:
            # What was timed so far need not be timed again.
            if self._options.ranks.size == 1:
                self._cache.remember([RankTable(layers, tuple(results))], results)
            raise
        return tuple(results)

    def _time(
        self,
        layers: Sequence[Layer],
        capture: Capture,
        wanted: Mapping[Signature, Sequence[Recipe]],
        compiled: CompiledBodies,
    ) -> Iterator[Measurement]:
        return time_signatures(
            wanted,
            capture,
            self._options.config,
            device=self._device,
            layers=layers,
            clock=self._options.clock,
            compile_options=self._compile_options,
            compiled=compiled,
            shown=self._options.ranks.first,
        )
