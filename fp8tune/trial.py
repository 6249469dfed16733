"""Trial plans in the user's own training steps: switching, timing, agreeing.

A step runs from the start of its first forward until its backward has ended. Steps of
gradient accumulation (gradients are there already when the next forward begins) belong
to one step, which then has several spans. A plan is only switched between steps.

Which plan runs when follows from the tournament, and the tournament from times that all
ranks exchanged at the end of the last round: every rank runs the same plan in the same
step, and the slowest rank's time counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from fp8tune.passes import Passes, at_end_of_backward

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8tune.clock import Clock
    from fp8tune.ranks import Ranks
    from fp8tune.tournament import Tournament, TrialPlan

__all__ = ["Trial"]


class Switch(Protocol):
    """Makes a trial plan the one that runs."""

    def __call__(self, plan: TrialPlan) -> None:
        """Convert and revert layers so that exactly this plan is active."""
        ...


class Trial:
    """Runs a tournament in the training steps that pass by.

    Args:
        tournament: says which plan runs and takes the times.
        parameters: the trained ones; their gradients tell accumulation.
        switch: makes a plan the one that runs.
        clock: marks points in the device's work.
        ranks: who must run the same plan.

    Attributes:
        tournament: as given.
        passes: forwards and backwards so far.
        finished: the winner is known; it runs one more step.
        settled: that step is over too.
        current: the plan that is active.
        peaks: most memory that a step of each plan had allocated, on a GPU.
        seconds: wall time spent, by the clock.
    """

    def __init__(
        self,
        tournament: Tournament,
        parameters: Sequence[torch.nn.Parameter],
        switch: Switch,
        clock: Clock,
        ranks: Ranks,
    ) -> None:
        self.passes = Passes(self._backward_began)
        self.current: TrialPlan | None = None
        self.peaks: dict[TrialPlan, int] = {}
        self.tournament = tournament
        self._parameters = parameters
        self._switch = switch
        self._clock = clock
        self._ranks = ranks
        self.settled = False
        self._resets = False
        self._start: Any = None
        self._end: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._round: dict[TrialPlan, list[tuple[Any, Any]]] = {}
        self._order: list[TrialPlan] = []
        self._began = clock.now()

    @property
    def finished(self) -> bool:
        """Whether the winner is known."""
        return self.tournament.finished

    @property
    def seconds(self) -> float:
        """Wall time since the trial began."""
        return self._clock.now() - self._began

    def before(self) -> None:
        """Called before each forward of a training step; may switch the plan."""
        if self.passes.begin() and self.current is not None:
            self._close_span()
        if not self._begins_a_step():
            self._start = self._start or self._clock.mark()
        elif self.finished:
            self.settled = True
        else:
            self._close_step()
            self._open_step()

    def _begins_a_step(self) -> bool:
        if self.passes.waiting:
            return False
        return self.current is None or (bool(self._spans) and not self._accumulating())

    def _accumulating(self) -> bool:
        # A loop that never sets gradients to None cannot be told from accumulation; there
        # each forward with its backward counts as a step.
        clean = all(x.grad is None for x in self._parameters)
        self._resets = self._resets or clean
        return self._resets and not clean

    def _open_step(self) -> None:
        if self.finished:
            # One more step, so that whatever of the winner is not compiled yet is
            # compiled before the plan freezes.
            self.current = self.tournament.best
        else:
            self._order = self._order or list(self.tournament.order())
            self.current = self._order.pop(0)
        self._switch(self.current)
        self._watch_memory()
        self._start = self._clock.mark()

    def _close_span(self) -> None:
        end = self._clock.mark() if self._end is None else self._end
        self._spans.append((self._start, end))
        self._start = self._end = None

    def _close_step(self) -> None:
        if self.current is None:
            return
        self._note_memory(self.current)
        self._round[self.current] = self._spans
        self._spans = []
        if not self._order:
            self._close_round()

    def _close_round(self) -> None:
        times = {
            plan: sum(self._clock.elapsed_ms(*span, plan) for span in spans)
            for plan, spans in self._round.items()
        }
        self._round = {}
        gathered = self._ranks.gather(list(times.values()))
        slowest = [max(column) for column in zip(*gathered, strict=True)]
        self.tournament.record(dict(zip(times, slowest, strict=True)))

    def after(self, output: object) -> None:
        """Called with what the forward returned."""
        self.passes.ended(output)

    def _backward_began(self) -> None:
        at_end_of_backward(self._backward_ended)

    def _backward_ended(self) -> None:
        self._end = self._clock.mark()

    def _watch_memory(self) -> None:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def _note_memory(self, plan: TrialPlan) -> None:
        if self._on_gpu:
            peak = torch.cuda.max_memory_allocated()
            self.peaks[plan] = max(peak, self.peaks.get(plan, 0))

    @property
    def _on_gpu(self) -> bool:
        return any(x.is_cuda for x in self._parameters[:1])
