"""Again at the freeze: whether candidates are still the plain Linears that were screened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8tune.decision.reasons import Reason
from fp8tune.model.candidates import Candidate, LeftOut
from fp8tune.model.copies import plain_twin
from fp8tune.model.experts import home_of
from fp8tune.model.linears import named_gemms
from fp8tune.model.screen import why_not_plain

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import nn

__all__ = ["rescreen"]


def rescreen(
    module: nn.Module,
    screened: Sequence[Candidate | LeftOut],
    transformed: Collection[str] = (),
) -> list[Candidate | LeftOut]:
    """The model's layers as they are now, with what was found when it was wrapped.

    Args:
        module: the model.
        screened: what ``screen`` returned; candidates may be converted.
        transformed: names of candidates that were called under torch.func.

    Returns:
        One record per Linear, in model order. Linears that came in under another name,
        or changed so that a converted class would not run, are left out.

    Raises:
        ModelError: a converted layer has a class that cannot be taken back.
    """
    known = {(x.fqn, id(home_of(x.linear))): x for x in screened}

    def now(fqn: str, linear: nn.Linear) -> Candidate | LeftOut:
        record = known.get((fqn, id(home_of(linear))))
        if record is None:
            return LeftOut(fqn, linear, Reason.REPLACED)
        if isinstance(record, Candidate):
            reason = why_not_plain(plain_twin(linear))
            if fqn in transformed:
                reason = Reason.FUNCTION_TRANSFORM
            return LeftOut(fqn, linear, reason) if reason else record
        return record

    return [now(fqn, linear) for fqn, linear in named_gemms(module)]
