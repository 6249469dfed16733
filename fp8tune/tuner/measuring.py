"""What was captured -> what every rank measured of it, and what the cache knew already."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fp8tune.ranks.consensus import RankTable
from fp8tune.ranks.shares import Shares
from fp8tune.report.messages import share_line
from fp8tune.timing.signatures import time_signatures
from fp8tune.tuner.cached import from_cache

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from fp8tune.decision.records import Layer, Measurement, Signature
    from fp8tune.model.capture import Capture
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.recipes.registry import Recipes
    from fp8tune.store.cache import Key
    from fp8tune.store.shared_cache import SharedCache
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
        mine = self._shares.of(missing, splits=splits, wait=wait)
        if len(mine) < len(missing) and self._options.ranks.first:
            logger.info("%s", share_line(len(mine), len(missing)))
        found = self._options.ranks.meet(
            lambda: RankTable(
                layers,
                self._measure(layers, capture, known, mine),
                capture.coverage,
                capture.uncounted,
            ),
            "the end of warmup",
            wait=wait,
        )
        if found is not None:
            self._shares.over()
        return found

    def _measure(
        self,
        layers: tuple[Layer, ...],
        capture: Capture,
        known: Sequence[Measurement],
        wanted: Mapping[Signature, Sequence[Recipe]],
    ) -> tuple[Measurement, ...]:
        """What the cache knows, and what is wanted, timed. No collective."""
        results = list(known)
        try:
            results += self._time(layers, capture, wanted)
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
    ) -> Iterator[Measurement]:
        return time_signatures(
            wanted,
            capture,
            self._options.config,
            device=self._device,
            layers=layers,
            clock=self._options.clock,
            compile_options=self._compile_options,
            shown=self._options.ranks.first,
        )
