"""The moment before the first forward of training, while nothing has run yet.

Forward hooks come too late for it: by then it is settled what the call runs. So this
stands in the place of the model's own call, as a compiled model would.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from fp8tune.errors import ModelError
from fp8tune.model.dry_run import dry_run
from fp8tune.model.entrances import set_call
from fp8tune.model.graph_capture import GraphCapture
from fp8tune.model.tracing import refuse_compiling
from fp8tune.report.messages import eager_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from fp8tune.model.capture import Capture
    from fp8tune.ranks.group import Ranks
    from fp8tune.tuner.pipeline import Pipeline

__all__ = ["FirstForward"]

_IN_EVAL = (
    "the model is in eval mode, where a forward with gradients may be an evaluation"
)


class FirstForward:
    """Waits for the first call of a model with gradients, and runs it dry.

    Args:
        module: the model.
        pipeline: its candidates.
        ranks: who come to the first forward together.
        say: logs.
    """

    def __init__(
        self,
        module: nn.Module,
        pipeline: Pipeline,
        ranks: Ranks,
        say: Callable[[int, object], None],
    ) -> None:
        self._module = module
        self._pipeline = pipeline
        self._ranks = ranks
        self._say = say
        self._decide: Callable[[Capture | None], Callable[..., Any]] | None = None
        self._graph = GraphCapture()

    def may_come(self) -> bool:
        """Whether all ranks can meet there; a warning where they cannot."""
        if self._pipeline.staged:
            why = "the first forward of a pipeline stage waits for the stage before"
            self._say(logging.WARNING, eager_line(why))
        return not self._pipeline.staged

    def wait(self, decide: Callable[[Capture | None], Callable[..., Any]]) -> None:
        """Begin to wait.

        Args:
            decide: gets what was captured in a dry run, on every rank or on none, and
                returns what is to be called for the model.
        """
        self._decide = decide
        set_call(self._module, self._call)

    def missed(self) -> None:
        """A layer runs, and the model was not called."""
        if self._decide is not None:
            self.close()
            why = "training calls layers outside of the model's forward"
            self._say(logging.WARNING, eager_line(why))

    def close(self) -> None:
        """Wait no longer, and give the model its own call back."""
        if self._decide is not None:
            self._decide = None
            set_call(self._module, None)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            refuse_compiling()
        decide = self._decide
        trains = torch.is_grad_enabled() and not self._graph.is_under_way()
        if decide is None or not trains:
            own: Any = self._module._call_impl  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            return own(*args, **kwargs)
        self.close()
        return decide(self._run_dry(args, kwargs))(*args, **kwargs)

    def _run_dry(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Capture | None:
        self._pipeline.capture.close()
        dry, problem = self._try(args, kwargs)
        problems = self._ranks.gather(problem, "the first forward")
        if any(problems):
            self._say(logging.WARNING, eager_line(next(x for x in problems if x)))
            return None
        return dry

    def _try(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Capture | None, str]:
        if not self._module.training:
            return None, _IN_EVAL
        try:
            candidates = self._pipeline.candidates
            return dry_run(self._module, candidates, args, kwargs), ""
        except ModelError as error:
            return None, str(error)
