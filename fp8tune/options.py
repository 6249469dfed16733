"""The arguments of AutoFloat8, once they are checked."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fp8tune.clock import Clock
from fp8tune.compiling import Compile
from fp8tune.config import TuneConfig
from fp8tune.plan import Plan
from fp8tune.ranks import Ranks

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

    def must_agree(self) -> dict[str, str]:
        """What would make plans differ if ranks had been given different values."""
        return {
            "warmup_steps": str(self.warmup_steps),
            "filter_fqns": str(list(self.filter_fqns)),
            "config": str(replace(self.config, capture_bytes=None, profile_dir=None)),
        }
