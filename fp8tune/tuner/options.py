"""The arguments of AutoFloat8, once they are checked."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fp8tune.compiling.apply import Compile
from fp8tune.config import TuneConfig
from fp8tune.plan.plan import Plan
from fp8tune.ranks.group import Ranks
from fp8tune.timing.clock import Clock

__all__ = ["Options"]


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
    plan: Plan | None = None

    @property
    def watched_steps(self) -> int:
        """Training steps before a decision, where it cannot be made before the first."""
        return max(1, self.warmup_steps)

    @property
    def html(self) -> str | os.PathLike[str] | None:
        """The page that this process writes: that of the first rank."""
        return self.config.html if self.ranks.first else None

    def must_agree(self) -> dict[str, str]:
        """What would make plans differ if ranks had been given different values."""
        return {
            "warmup_steps": str(self.warmup_steps),
            "filter_fqns": str(list(self.filter_fqns)),
            "cache": str(self.cache),
            "config": str(
                replace(self.config, capture_bytes=None, profile_dir=None, html=None)
            ),
        }
