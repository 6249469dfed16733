"""What the log says of models that move while they are tuned."""

__all__ = ["BEGUN_ANEW", "KEPT_MOVING", "STAGES_MOVED"]

BEGUN_ANEW = (
    "the layers run on {now} by now, and tuning began on {before}; it begins anew, with the "
    "recipes, the cache entries and the clock of {now}"
)

KEPT_MOVING = (
    "the layers ran on another device again ({now} after {before}), so tuning is given up "
    "and the model trains on in high precision; wrap it where it stays"
)

STAGES_MOVED = (
    "the model moved from {before} to {now} after it was wrapped, and pipeline stages cannot "
    "begin anew together, so it trains on in high precision; wrap it when it has moved"
)
