"""The phases of tuning and the transitions between them."""

from enum import StrEnum

__all__ = ["NEXT_PHASES", "Phase"]


class Phase(StrEnum):
    """Where the tuner is; see the picture in fp8tune.tuner.tuner."""

    WARMUP = "warmup"
    REPLAYED = "replayed"
    TRIAL = "trial"
    FROZEN = "frozen"
    ABANDONED = "abandoned"


NEXT_PHASES: dict[Phase | None, frozenset[Phase]] = {
    None: frozenset(Phase),
    Phase.WARMUP: frozenset({Phase.TRIAL, Phase.FROZEN, Phase.ABANDONED}),
    Phase.TRIAL: frozenset({Phase.FROZEN, Phase.ABANDONED}),
    Phase.REPLAYED: frozenset({Phase.WARMUP, Phase.FROZEN, Phase.ABANDONED}),
    Phase.FROZEN: frozenset({Phase.ABANDONED}),
    Phase.ABANDONED: frozenset(),
}
