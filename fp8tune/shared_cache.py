"""One cache and one model for all ranks.

The first rank alone reads and writes the file, which other hosts may not even see; the
others get what it read. A hit is all ranks' or nobody's.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence

from fp8tune.cache import Cache, Key
from fp8tune.consensus import RankTable, check_layers, first_difference, merge_calls
from fp8tune.errors import RankMismatchError
from fp8tune.ranks import Ranks
from fp8tune.records import Layer, Measurement, Signature
from fp8tune.trial_records import TrialRecord

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
        keys, self._layers = self._compare(layers, settings)
        self.models = len(set(self._layers))
        mixed = first_difference([dict(x.environment) for x in keys])
        cache = Cache(path) if ranks.first and path is not None else None
        if cache and mixed:
            logger.warning("%s; such a mix of timings is not cached", mixed)
            cache = None
        self._cache = ranks.broadcast(cache)

    def _compare(
        self, layers: tuple[Layer, ...], settings: Mapping[str, str]
    ) -> tuple[list[Key], list[tuple[Layer, ...]]]:
        gathered = self._ranks.gather((self._key, dict(settings), layers))
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
        return self._cache.measurements(key) if self._cache else {}

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

    def remember(
        self, tables: Sequence[RankTable], measurements: Iterable[Measurement]
    ) -> None:
        """Save every rank's layers with what was measured of their signatures."""
        if self._cache is None or not self._ranks.first:
            return
        known = list(measurements)
        models = {tuple(x.fqn for x in t.layers): t.layers for t in tables}
        for layers in (merge_calls(model, tables) for model in models.values()):
            called = {signature for layer in layers for signature, _ in layer.calls}
            # What a busy machine timed is good for this run, not for later ones.
            timed = [x for x in known if x.signature in called and x.steady]
            if timed:
                self._cache.save(self._key, layers, timed)

    def remember_trial(self, layers: tuple[Layer, ...], trial: TrialRecord) -> None:
        """Save how a trial ended, so that the next run starts with the winner."""
        if self._cache and self._ranks.first:
            self._cache.save(self._key, layers, (), trial)
