"""How free the machine was while something was timed; pure.

On a CPU a thread that computes undisturbed spends all of its wall time on a core. What it
does not spend there it waited: for a core that another process had, or for a thread of its
own that waited for one. Of 430 verdicts taken under load, all 91 were right whose thread
had a core for at least 0.9 of the time; of the others 230 of 339.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

__all__ = ["STEADY_SHARE", "GpuLoad", "Load"]

# Thread CPU time / wall time from which on verdicts were right; see above.
STEADY_SHARE = 0.9

# Percent of its time that a GPU may work for others.
_STEADY_PERCENT = 5


@dataclass(frozen=True)
class GpuLoad:
    """What the driver says of a GPU before and after a signature was timed.

    Attributes:
        others_percent: utilisation by other processes, the larger of both; None where
            the driver does not tell processes apart.
        throttled: why the clock was held down, as "sw_power_cap"; sorted, of both.
        clock_mhz: the SM clock before and after.
    """

    others_percent: int | None = None
    throttled: tuple[str, ...] = ()
    clock_mhz: tuple[int, ...] = ()


@dataclass(frozen=True)
class Load:
    """What kept the machine busy besides what was timed.

    Attributes:
        cpu_shares: thread CPU time / wall time of each pair, the lesser of its two;
            empty where the clock does not tell.
        pressure: share of the time in which some process of the machine waited for a
            core, by /proc/pressure/cpu; None where there is none.
        gpu: the same of a GPU, or None.
    """

    cpu_shares: tuple[float, ...] = ()
    pressure: float | None = None
    gpu: GpuLoad | None = None

    @property
    def cpu_share(self) -> float | None:
        """The mean over all pairs, or None where the clock does not tell."""
        return mean(self.cpu_shares) if self.cpu_shares else None

    @property
    def steady(self) -> bool:
        """Whether what was timed had the machine to itself."""
        share = self.cpu_share
        others = self.gpu and self.gpu.others_percent
        return (share is None or share >= STEADY_SHARE) and (others or 0) <= (
            _STEADY_PERCENT
        )

    @property
    def said(self) -> str:
        """What disturbed it, in words; "" if nothing did."""
        parts: list[str] = []
        share = self.cpu_share
        if share is not None and share < STEADY_SHARE:
            parts.append(f"its thread had a core for {share:.0%} of the time")
        if self.gpu and (self.gpu.others_percent or 0) > _STEADY_PERCENT:
            parts.append(f"other processes used {self.gpu.others_percent}% of the GPU")
        if self.gpu and self.gpu.throttled:
            parts.append(
                f"the GPU's clock was held down ({', '.join(self.gpu.throttled)})"
            )
        return ", ".join(parts)
