"""The protocol of a recipe: one way to convert a Linear, in place and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import nn

    from fp8tune.decision.reasons import Reason

__all__ = ["ByGemm", "Recipe"]


@runtime_checkable
class Recipe(Protocol):
    """One way to convert a Linear, in place and back.

    Attributes:
        name: what the user calls it.
        reference: name of the dtype that it is compared with, for the report.
        settings: everything that changes its speed or numerics, as text; timings in the
            cache hold for equal settings only.
        emulated: whether the device lacks the GEMMs, so that only numerics are real.

    A recipe may also have ``takes_experts``, True if it converts grouped GEMMs of experts
    too (see ``fp8tune.model.experts.GroupedLinear``), ``for_any_rows``, itself for layers
    whose calls may have no rows, ``inductor_settings`` (see ``fp8tune.compiling.inductor``), ``casts`` (see
    ``fp8tune.recipes.casts``), what ``ByGemm`` has, and ``has_static_filter``: True if its
    ``static_filter`` has thresholds of torchao's, so that tables compare with them.
    """

    name: str
    reference: str
    settings: str
    emulated: bool

    def supports(self, linear: nn.Linear) -> Reason | None:
        """Why this Linear cannot run with the recipe at all, or None if it can."""
        ...

    def static_filter(self, linear: nn.Linear) -> Reason | None:
        """Why a published table calls this K, N not worth trying, or None."""
        ...

    def convert(self, linear: nn.Linear) -> None:
        """Switch a plain nn.Linear to the recipe, in place."""
        ...

    def revert(self, linear: nn.Linear) -> None:
        """Switch it back to a plain nn.Linear, in place."""
        ...


@runtime_checkable
class ByGemm(Protocol):
    """A recipe that can leave some of a Linear's GEMMs in high precision.

    Attributes:
        gemms: those that it converts, of "output", "grad_input" and "grad_weight".
    """

    gemms: tuple[str, ...]

    def only(self, gemms: tuple[str, ...]) -> Recipe:
        """The recipe that converts these of them, and always the same object.

        Its name is that of the whole and the GEMMs, such as "rowwise:output+grad_input";
        its settings are those of the whole.
        """
        ...
