"""One cache and one model for all ranks.

The first rank alone reads and writes the file, which other hosts may not even see; the
others get what it read. A hit is all ranks' or nobody's.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence

from fp8tune.decision.coverage import Coverage, merged_coverage
from fp8tune.decision.gemms import base_of, is_part
from fp8tune.decision.kinds import kind_of, sizes_of
from fp8tune.decision.records import Layer, Measurement, Signature
from fp8tune.decision.trials import TrialRecord
from fp8tune.decision.watched import Fallen
from fp8tune.errors import RankMismatchError
from fp8tune.ranks.consensus import (
    RankTable,
    check_layers,
    first_difference,
    merge_calls,
)
from fp8tune.ranks.group import Ranks
from fp8tune.store.cache import Cache, Key

__all__ = ["SharedCache"]

logger = logging.getLogger("fp8tune")


class SharedCache:
    """A cache file as all ranks see it. Constructing it makes two collectives.

    Args:
        ranks: who must agree.
        path: the file, or None for none.
        key: what this run's measurements are true of.
        layers: this rank's layers, without calls.
        settings: what else must be the same on every rank.

    Raises:
        RankMismatchError: ranks hold different layers or got different settings.

    Attributes:
        models: how many different lists of layers the ranks hold; more than one with
            pipeline stages.
    """

    def __init__(
        self,
        ranks: Ranks,
        path: str | os.PathLike[str] | None,
        key: Key,
        layers: tuple[Layer, ...],
        settings: Mapping[str, str],
    ) -> None:
        self._ranks = ranks
        self._key = key
        self._known: list[Measurement] = []
        keys, self._layers = self._compare(layers, settings)
        self.models = len(set(self._layers))
        mixed = first_difference([dict(x.environment) for x in keys])
        cache = Cache(path) if ranks.first and path is not None else None
        if cache and mixed:
            logger.warning("%s; such a mix of timings is not cached", mixed)
            cache = None
        self._cache = ranks.broadcast(cache, "the construction of AutoFloat8")

    def _compare(
        self, layers: tuple[Layer, ...], settings: Mapping[str, str]
    ) -> tuple[list[Key], list[tuple[Layer, ...]]]:
        gathered = self._ranks.gather(
            (self._key, dict(settings), layers), "the construction of AutoFloat8"
        )
        said = [
            {"recipe": key.label, "settings": key.all_settings, "timing": key.timing}
            | also
            for key, also, _ in gathered
        ]
        difference = first_difference(said)
        if difference:
            raise RankMismatchError(f"{difference}; give every rank the same")
        every = [layers for _, _, layers in gathered]
        check_layers(every)
        return [key for key, _, _ in gathered], every

    def measurements(self, key: Key) -> dict[Signature, Measurement]:
        """What was measured under the key of one recipe."""
        mine = {x.signature: x for x in self._known if x.recipe == key.recipe}
        return mine | (self._cache.measurements(key) if self._cache else {})

    def parts(self, key: Key) -> list[Measurement]:
        """What was measured of only some GEMMs of that recipe."""
        mine = [x for x in self._known if is_part(x.recipe)]
        found = {
            (x.signature, x.recipe): x for x in mine if base_of(x.recipe) == key.recipe
        }
        theirs = self._cache.parts(key) if self._cache else []
        return list((found | {(x.signature, x.recipe): x for x in theirs}).values())

    def know(self, measurements: Iterable[Measurement]) -> None:
        """Use these, which this process made before, also where there is no file."""
        self._known = [x for x in measurements if x.steady and not x.failure]

    def of_run(self) -> tuple[Measurement, ...]:
        """What was measured of each of this run's recipes."""
        return self._cache.of_run(self._key) if self._cache else ()

    def layers(self) -> tuple[Layer, ...] | None:
        """This rank's layers with their calls, if every rank has a full hit."""
        if self._cache is None:
            return None
        found = [self._cache.layers(self._key, x) for x in self._layers]
        if None in found:
            if self._ranks.first:
                miss = self._layers[found.index(None)]
                reason = self._cache.explain_miss(self._key, miss)
                logger.info("cache miss: %s", reason)
            return None
        return found[self._ranks.rank]

    def trial(self, layers: tuple[Layer, ...]) -> TrialRecord | None:
        """How the trial of the same model's latest run ended."""
        trial = self._cache.trial(self._key, layers) if self._cache else None
        if trial is None and self._ranks.first:
            logger.info("the cache has all timings, but no trial of whole plans yet")
        return trial

    def coverage(self, layers: tuple[Layer, ...]) -> Coverage | None:
        """What candidates are of the matrix products, as the latest run counted it."""
        return self._cache.coverage(self._key, layers) if self._cache else None

    def fallen(self, layers: tuple[Layer, ...]) -> tuple[Fallen, ...]:
        """Which layers lost their accuracy while the latest run trained."""
        return self._cache.fallen(self._key, layers) if self._cache else ()

    def remember_fallen(self, fallen: Iterable[Fallen]) -> None:
        """Save with every rank's layers which of them lost their accuracy."""
        if self._cache and self._ranks.first:
            self._cache.save_fallen(self._key, set(self._layers), fallen)

    def remember(
        self, tables: Sequence[RankTable], measurements: Iterable[Measurement]
    ) -> None:
        """Save every rank's layers with what was measured of their signatures."""
        if self._cache is None or not self._ranks.first:
            return
        known = list(measurements)
        busy = [x for x in known if not x.failure and not x.steady]
        if busy:
            logger.warning(
                "%d of %d timings were taken while the machine was busy and are not "
                "cached, so the next run times them again; run it alone on its cores",
                len(busy),
                len(known),
            )
        coverage = merged_coverage(x.coverage for x in tables)
        models = {tuple(x.fqn for x in t.layers): t.layers for t in tables}
        for layers in (merge_calls(model, tables) for model in models.values()):
            kinds = {kind for layer in layers for kind in sizes_of(layer.calls)}
            # What a busy machine timed is good for this run, not for later ones.
            timed = [x for x in known if kind_of(x.signature) in kinds and x.steady]
            if timed:
                self._cache.save(self._key, layers, timed, coverage=coverage)

    def remember_trial(
        self,
        layers: tuple[Layer, ...],
        trial: TrialRecord,
        coverage: Coverage | None,
    ) -> None:
        """Save how a trial ended, so that the next run starts with the winner."""
        if self._cache and self._ranks.first:
            self._cache.save(self._key, layers, (), trial, coverage)
