"""Everything that is to be known of a GPU, in one run that ends within ten minutes.

The parts come in order of importance. Before each part the time that is left is compared
with what a part like it took or is expected to take, and it is skipped rather than cut.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fp8tune.bench.agreement import Agreement, clock_agreement
from fp8tune.bench.cost import tuning_cost
from fp8tune.bench.policies import Outcome, Setting, compare_policies
from fp8tune.bench.workloads import WORKLOADS, find_workloads
from fp8tune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8tune.bench.sizes import Workload

__all__ = ["Findings", "GpuSuite"]

_LIMIT_S = 570.0
# Guesses of what has not run yet, in seconds.
_FIRST_WORKLOAD_S = 200.0
_COST_S = 120.0

# Where others lost by converting everything, then the most common model.
_FIRST = ("llama3-70b-tp8@8192", "llama3-8b@8192")
_COST_OF = "llama3-8b@8192"


@dataclass
class Findings:
    """What a benchmark has found so far.

    Attributes:
        outcomes: of the policies, by workload.
        agreement: of the clock with a profiler, see ``fp8tune.bench.agreement``.
        cost: of tuning, see ``fp8tune.bench.cost``.
        missing: what could not be run, and why.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    agreement: list[Agreement] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


class GpuSuite:
    """Clock, policies and tuning cost on one GPU.

    Args:
        setting: recipe, device and clock.
        findings: where results go.
        save: called whenever there is one more.
        now: seconds on a clock that never goes back.
        limit_s: seconds for all of it.

    Raises:
        ConfigError: the device is no GPU.
    """

    def __init__(
        self,
        setting: Setting,
        findings: Findings,
        save: Callable[[], object],
        now: Callable[[], float] = time.monotonic,
        limit_s: float = _LIMIT_S,
    ) -> None:
        if setting.device.type != "cuda":
            raise ConfigError(
                f"--suite gpu runs on a GPU, and the device is {setting.device}; without "
                "--suite workloads run on any device"
            )
        self._setting = setting
        self._found = findings
        self._save = save
        self._now = now
        self._end = now() + limit_s
        self._longest = 0.0

    def run(self) -> None:
        """All parts that there is time for; one that fails does not end the others."""
        found, setting = self._found, self._setting
        self._part("clock", 0, self._compare_clocks)
        for label in _FIRST:
            self._workloads(find_workloads([label]))
        self._part(
            f"tuning cost of {_COST_OF}",
            _COST_S,
            lambda: found.cost.update(
                tuning_cost(_COST_OF, setting.recipe.name, setting.device)
            ),
        )
        self._workloads([x for x in WORKLOADS if x.label not in _FIRST])

    def _compare_clocks(self) -> None:
        for row in clock_agreement(self._setting.device):
            self._found.agreement.append(row)
            self._save()

    def _workloads(self, workloads: Sequence[Workload]) -> None:
        for workload in workloads:
            started = self._now()
            self._part(
                workload.label,
                self._longest or _FIRST_WORKLOAD_S,
                lambda x=workload: self._found.outcomes.append(
                    compare_policies(x, self._setting)
                ),
            )
            self._longest = max(self._longest, self._now() - started)

    def _part(self, what: str, seconds: float, act: Callable[[], object]) -> None:
        if self._now() + seconds > self._end:
            self._found.missing.append(f"{what}: no time left")
            return
        try:
            act()
        except Exception as error:  # noqa: BLE001 - the other parts go on
            first_line = str(error).strip().split("\n", 1)[0]
            self._found.missing.append(f"{what}: {type(error).__name__}: {first_line}")
        self._save()
