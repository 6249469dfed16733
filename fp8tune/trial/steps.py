"""Trial plans in the user's own training steps: switching, timing, agreeing.

Three times are taken of a step. The *span* runs from the start of its first forward until
its backward has ended, on the device; several micro-batches have one span each, which add
up. It decides. *Start to start* of the next step also holds what a plan costs the CPU and
what the optimizer waits for; it vetoes. It is taken on the device's own timeline, where a
GPU that waits for the CPU shows and a CPU that runs ahead of the GPU does not, and on the
CPU's clock. Wall seconds inside of forward and backward hold compiling; budgets are kept
by them, so that an evaluation in between costs the trial nothing.

Where steps begin is told by ``fp8tune.model.steps``. A plan is only switched between steps.
Which plan runs when follows from the search, and the search from times that all ranks
exchanged at the end of the last round: every rank runs the same plan in the same step, and
the slowest rank's time counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from fp8tune.model.outputs import elements_in, tensors_in
from fp8tune.model.passes import Passes, at_end_of_backward
from fp8tune.trial.sizes import Timed
from fp8tune.trial.spans import Span, Step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp8tune.model.steps import Steps
    from fp8tune.ranks.group import Ranks
    from fp8tune.timing.clock import Clock
    from fp8tune.timing.memory import PeakMemory
    from fp8tune.trial.search import Search, TrialPlan

__all__ = ["Trial"]

# Forwards without the end of a step, beyond which the trial gives up: so many micro-batches
# and more are left to those who accumulate them.
_MOST_FORWARDS = 512

# Steps in a row that begin among passes which wait; so often it is how the loop is made.
_MOST_OVERLAPS = 10


class Switch(Protocol):
    """Makes a trial plan the one that runs."""

    def __call__(self, plan: TrialPlan) -> None:
        """Convert and revert layers so that exactly this plan is active."""
        ...


class Trial:
    """Runs a search in the training steps that pass by.

    Args:
        search: says which plan runs and takes the times.
        steps: tells where training steps begin.
        switch: makes a plan the one that runs.
        clock: marks points in the device's work.
        ranks: who must run the same plan.
        memory: watches what each plan has allocated at its peak.
        ragged: steps differ in size, so each of them has to tell its own.

    Attributes:
        search: as given.
        passes: forwards and backwards so far.
        stuck: no step has ended for so many forwards that none will.
        unsized: steps differ in size, and cannot tell theirs.
        overlapping: steps begin while passes of earlier ones wait for their backward.
        settled: the winner is known, and it ran one more step; or the trial is one of
            these three.
        current: the plan that is active.
        peaks: most memory that a step of each plan had allocated, on a GPU; of steps that
            count, since compiling and autotuning allocate too.
        seconds: wall time spent, by the clock.
        whole: backward recomputes the whole model, whose forwards in between run without
            gradients.
        recomputes: backward recomputes layers, which must not change as long as a graph
            lives, be it after a backward that retained it.
    """

    def __init__(
        self,
        search: Search,
        steps: Steps,
        switch: Switch,
        clock: Clock,
        ranks: Ranks,
        *,
        memory: PeakMemory,
        ragged: bool = False,
    ) -> None:
        self.passes = Passes(self._backward_began)
        self.current: TrialPlan | None = None
        self.peaks: dict[TrialPlan, int] = {}
        self._memory = memory
        self.search = search
        self.settled = self.stuck = self.unsized = self.overlapping = False
        self._overlaps = 0
        self.recomputes = self.whole = False
        self._ragged = ragged
        self._disturbed = False
        self._steps = steps
        self._switch = switch
        self._clock = clock
        self._ranks = ranks
        self._size = 0
        self._start: tuple[Any, float] | None = None
        self._end: tuple[Any, float] | None = None
        self._spans: list[Span] = []
        self._round: list[Step] = []
        self._resumed: list[tuple[TrialPlan, Timed]] = []  # steps of a round before
        self._order: list[TrialPlan] = []
        self._began = clock.now()
        self._opened: tuple[Any, float] = (None, self._began)

    @property
    def finished(self) -> bool:
        """Whether the winner is known."""
        return self.search.finished

    @property
    def seconds(self) -> float:
        """Wall time since the trial began."""
        return self._clock.now() - self._began

    def before(self, inputs: object = ()) -> None:
        """Called before each forward of a training step; may switch the plan.

        Args:
            inputs: what the forward is called with, from which the step's size follows.
        """
        self._steps.begin()
        self.passes.begin()
        self._close_span()
        # The step in which the trial began goes on as it began.
        first = self._steps.passes_in_step == 1
        retained = self.passes.retained if self.recomputes else 0
        if first and not (self.passes.waiting or retained):
            self._overlaps = 0
            self._next_step()
        elif first:
            self._overlap()
        steps = self._steps
        forwards = max(steps.passes_in_step, steps.passes_without_gradient)
        if forwards > _MOST_FORWARDS:
            self.stuck = self.settled = True
        self._size += elements_in(inputs)
        self._start = self._start or (self._clock.mark(), self._clock.now())

    def _overlap(self) -> None:
        self._overlaps += 1
        if self._overlaps > _MOST_OVERLAPS:
            self.overlapping = self.settled = True

    def _next_step(self) -> None:
        if self.current is None:
            self._open_step()
        elif not self._spans:
            return  # no backward was seen; it goes on
        elif self.finished:
            self.settled = True
        else:
            self._close_step()
            self._open_step()

    def _open_step(self) -> None:
        if self.finished:
            # One more step, so that whatever of the winner is not compiled yet is
            # compiled before the plan freezes.
            self.current = self.search.best
        else:
            self._order = self._order or list(self.search.order())
            self.current = self._order.pop(0)
        self._opened = self._clock.mark(), self._clock.now()
        self._spans, self._size, self._start = [], 0, None
        self._disturbed = False
        self._switch(self.current)
        self._memory.reset()

    def _close_span(self) -> None:
        """A forward whose backward never came is no part of a span."""
        if self._start is not None and self._end is not None:
            (start, began), (end, ended) = self._start, self._end
            self._spans.append(Span(start, end, ended - began))
            self._start = None
        self._end = None

    def _close_step(self) -> None:
        assert self.current is not None
        peak = None if self._disturbed else self._memory.read()
        if peak is not None and self.search.is_warm(self.current):
            self.peaks[self.current] = max(peak, self.peaks.get(self.current, 0))
        self._round.append(self._ended(self.current, self._spans))
        if not self._order:
            self._close_round()

    def _close_round(self) -> None:
        plans, mine = zip(*self._of_round(), strict=True)
        self._round, self._resumed = [], []
        gathered = self._ranks.gather([tuple(x) for x in mine], "a round of the trial")
        slowest = [
            Timed(*(max(values) for values in zip(*column, strict=True)))
            for column in zip(*gathered, strict=True)
        ]
        if self._ragged and not all(x.size for x in slowest):
            self.unsized = self.settled = True
        self.search.record(dict(zip(plans, slowest, strict=True)))

    def _ended(self, plan: TrialPlan, spans: Sequence[Span]) -> Step:
        """The step that is under way, as if it ended here."""
        mark, began = self._opened
        whole = Span(mark, self._clock.mark(), self._clock.now() - began)
        apart = None if self._disturbed else whole
        return Step(plan, tuple(spans), self._size, apart)

    def disturbed(self) -> None:
        """Something else than the step ran in between, such as an evaluation.

        The time from the step's start to that of the next, and the peak of memory, are
        then not its plan's.
        """
        self._disturbed = True

    def _of_round(self) -> list[tuple[TrialPlan, Timed]]:
        return self._resumed + [(x.plan, self._timed(x)) for x in self._round]

    def state_dict(self) -> dict[str, Any]:
        """The steps of the round that is under way, and the plans left to it; waits."""
        steps, left = self._of_round(), list(self._order)
        if self.current is not None and not self.finished:
            if self._steps.over > self._steps.completed:
                steps.append((self.current, self._timed(self._under_way())))
            else:
                left.insert(0, self.current)
        mask = self.search.mask
        return {
            "round": [[mask(plan), *timed] for plan, timed in steps],
            "left": [mask(plan) for plan in left],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, before the first step."""
        plan = self.search.plan
        self._resumed = [(plan(x), Timed(*step)) for x, *step in state.get("round", [])]
        self._order = [plan(x) for x in state.get("left", [])]
        if self._resumed and not self._order:
            self._close_round()

    def _under_way(self) -> Step:
        """The step that is under way, as if it ended here."""
        assert self.current is not None
        spans = list(self._spans)
        if self._start is not None and self._end is not None:
            (start, began), (end, ended) = self._start, self._end
            spans.append(Span(start, end, ended - began))
        return self._ended(self.current, spans)

    def _timed(self, step: Step) -> Timed:
        def device_ms(span: Span) -> float:
            return self._clock.elapsed_ms(span.start, span.end, step.plan)

        whole = step.whole
        return Timed(
            ms=sum(map(device_ms, step.spans)),
            size=float(step.size),
            wall_ms=whole.seconds * 1e3 if whole else 0.0,
            busy_s=sum(x.seconds for x in step.spans),
            device_ms=device_ms(whole) if whole else 0.0,
        )

    def after(self, output: object) -> None:
        """Called with what the forward returned."""
        self.passes.ended(output)

    def recomputed(self, output: object) -> None:
        """Called with what the forward returned in a backward, which may go through it."""
        for leaf in tensors_in(output):
            if leaf.requires_grad and leaf.grad_fn is not None:
                leaf.register_hook(self._recomputed_came)

    def _recomputed_came(self, grad: object) -> None:
        del grad
        self.whole = True
        self._backward_began()

    def _backward_began(self) -> None:
        self._steps.saw_gradient()
        at_end_of_backward(self._backward_ended)

    def _backward_ended(self) -> None:
        self._end = self._clock.mark(), self._clock.now()

    def close(self) -> None:
        """The user's peak of memory is again what it was, or more."""
        self._memory.restore()
