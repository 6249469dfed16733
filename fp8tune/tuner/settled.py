"""What a copy of an AutoFloat8 has in the place of a tuner: a plan, or none, for good."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from fp8tune.decision.reasons import Reason
from fp8tune.errors import PhaseError
from fp8tune.model.candidates import LeftOut
from fp8tune.model.convert import is_converted, revert_by, reverted
from fp8tune.model.linears import named_gemms
from fp8tune.model.screen import why_not_plain
from fp8tune.model.sharding import is_plain_linear
from fp8tune.report.messages import COPIED_LINE, changed_line
from fp8tune.tuner.conversions import without_lost
from fp8tune.tuner.phases import Phase
from fp8tune.tuner.subject import subject_of_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from torch import nn

    from fp8tune.plan.plan import Plan
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.report.subject import Subject

__all__ = ["Settled"]

logger = logging.getLogger("fp8tune")

_HOW = "wrap the model anew, AutoFloat8(auto.module), to tune it"


class Tunes(Protocol):
    """What is asked of a tuner, or of the like of it, before it is copied."""

    @property
    def phase(self) -> Phase | None:
        """Where tuning is."""
        ...

    @property
    def plan(self) -> Plan | None:
        """The decisions, if there are any."""
        ...

    @property
    def conversions(self) -> list[tuple[nn.Linear, Recipe]]:
        """The Linears that are converted, and what to."""
        ...


@dataclass
class Settled:
    """Answers like a tuner whose work is over.

    Attributes:
        target: the model; a copy is not compiled, as torch has it.
        plan: the decisions that it was copied with, or None.
        conversions: the Linears that are converted, and what to.
    """

    target: nn.Module
    plan: Plan | None
    conversions: list[tuple[nn.Linear, Recipe]]

    @classmethod
    def of(cls, tuner: Tunes, module: nn.Module) -> Settled:
        """What a copy of an AutoFloat8 with this tuner has."""
        if tuner.phase is Phase.FROZEN:
            return cls(module, tuner.plan, tuner.conversions)
        logger.info("%s", COPIED_LINE)
        return cls(module, None, [])

    @property
    def phase(self) -> Phase:
        """Frozen, or abandoned where the model was copied before there was a plan."""
        return Phase.FROZEN if self.plan else Phase.ABANDONED

    @property
    def converted(self) -> list[nn.Linear]:
        """The Linears that are converted."""
        return [linear for linear, _ in self.conversions]

    @contextmanager
    def reference(self) -> Generator[None]:
        """Inside the block every layer runs in high precision."""
        with reverted(self.conversions):
            yield
        # Inside of another block they are plain.
        done = (is_converted(x) or is_plain_linear(x) for x in self.converted)
        if not all(done):
            self._give_up_changed()

    def _give_up_changed(self) -> None:
        """Layers that were changed, and so could not be converted again, are said to be."""
        assert self.plan is not None
        kept = (x for x in self.converted if is_converted(x) or is_plain_linear(x))
        gone = {id(x) for x in self.converted} - {id(x) for x in kept}
        records = [
            LeftOut(fqn, x, why_not_plain(x) or Reason.REPLACED)
            for fqn, x in named_gemms(self.target)
        ]
        lost = [x.fqn for x in records if id(x.linear) in gone]
        logger.warning("%s", changed_line(lost))
        self.plan = without_lost(self.plan, lost, records)
        self.conversions = [x for x in self.conversions if id(x[0]) not in gone]

    @property
    def linears(self) -> int:
        """How many Linears the model has."""
        return len(self.plan.decisions) if self.plan else 0

    @property
    def subject(self) -> Subject | None:
        """What a page shows; a copy has no measurements."""
        return self.plan and subject_of_plan(self.plan, None)

    def freeze(self) -> Plan:
        """The plan.

        Raises:
            PhaseError: there is none.
        """
        return self.plan or self._refuse()

    def run(self, training_step: Callable[[], object]) -> Plan:
        """The same; no step is run."""
        del training_step
        return self.freeze()

    def moved(self) -> None:
        """A copy goes on as what it is, wherever it is moved."""

    def end_of_run(self) -> None:
        """A copy has nothing to say."""

    def abandon(self) -> None:
        """Give the model back in high precision."""
        for linear, recipe in self.conversions:
            revert_by(recipe, linear)
        self.plan, self.conversions = None, []

    def retune(self) -> NoReturn:
        """A copy cannot be tuned.

        Raises:
            PhaseError: always.
        """
        self._refuse()

    def state_dict(self) -> dict[str, Any]:
        """The plan, as plain data."""
        return {"plan": self.plan.to_dict()} if self.plan else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> NoReturn:
        """A copy does not go on tuning.

        Raises:
            PhaseError: always.
        """
        del state
        self._refuse()

    def status(self) -> str:
        """The table, or that there is none."""
        return str(self.plan) if self.plan else f"a model in high precision; {_HOW}"

    def _refuse(self) -> NoReturn:
        raise PhaseError(f"this is a copy of a model, which nobody tunes; {_HOW}")
