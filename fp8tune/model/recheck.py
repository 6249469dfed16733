"""Again at the freeze: whether candidates are still the plain Linears that were screened."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fp8tune.decision.reasons import Reason
from fp8tune.model.candidates import Candidate, LeftOut
from fp8tune.model.copies import plain_twin
from fp8tune.model.experts import home_of
from fp8tune.model.linears import named_gemms
from fp8tune.model.screen import Takes, why_not_plain
from fp8tune.model.sharding import as_computed

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import nn

__all__ = ["rescreen"]


def rescreen(
    module: nn.Module,
    screened: Sequence[Candidate | LeftOut],
    recipes: Sequence[Takes],
    transformed: Collection[str] = (),
) -> list[Candidate | LeftOut]:
    """The model's layers as they are now, with what was found when it was wrapped.

    Args:
        module: the model.
        screened: what ``screen`` returned; candidates may be converted.
        recipes: what candidates could be converted to.
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
            twin = plain_twin(linear)
            reason = why_not_plain(twin)
            if fqn in transformed:
                reason = Reason.FUNCTION_TRANSFORM
            if reason is None:
                record = _without_wrong_dtype(record, twin, recipes)
            return LeftOut(fqn, linear, reason) if reason else record
        return record

    return [now(fqn, linear) for fqn, linear in named_gemms(module)]


def _without_wrong_dtype(
    record: Candidate, twin: nn.Linear, recipes: Sequence[Takes]
) -> Candidate | LeftOut:
    """The record without the recipes that do not take the weight's dtype by now."""
    known = dict(record.excluded)
    local = as_computed(twin, fsdp=False)
    left = [x for x in recipes if x.name not in known]
    wrong = [x.name for x in left if x.supports(local) is Reason.UNSUPPORTED_DTYPE]
    if len(wrong) == len(left):
        return LeftOut(record.fqn, record.linear, Reason.UNSUPPORTED_DTYPE)
    refused = [(name, Reason.UNSUPPORTED_DTYPE) for name in wrong]
    return replace(record, excluded=(*record.excluded, *refused))
