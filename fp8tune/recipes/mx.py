"""mxfp8 through torchao's MXFP8Linear, a prototype: every 32 values share a scale.

Each GEMM sums over blocks of 32: K in forward, N for grad_input, M for grad_weight. K and
N must be multiples of 32; M is padded with rows of zeros, since a last batch may have any
number of rows. Grouped GEMMs of experts are the same, each group padded by itself.

The class came to ``torchao.prototype.moe_training.mxfp8_linear`` with torchao 0.18, with
which this was tested. Where it is missing the recipe is refused with a message that says
so, and nothing else of fp8tune changes.
"""

from collections.abc import Iterator
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fp8tune.decision.reasons import Reason
from fp8tune.model.convert import change_class, restore_class
from fp8tune.model.experts import GroupedLinear
from fp8tune.recipes.casts import CastOperand
from fp8tune.recipes.groups import PaddedExperts
from fp8tune.recipes.hardware import has_mx_gemms, runs_converted, runs_experts
from fp8tune.recipes.prototypes import load, on_padded_rows

__all__ = ["BLOCK", "MXFP8Experts", "MXFP8Recipe"]

# Values that share a scale; fixed by the format (OCP Microscaling Formats 1.0).
BLOCK = 32

_ELEMENTS = torch.float8_e4m3fn
_HOME = "torchao.prototype.moe_training.mxfp8_linear"
# All that is used of it.
_NAMES = (
    "KernelPreference",
    "MXFP8Linear",
    "ScaleCalculationMode",
    "_to_mxfp8_then_scaled_mm",
)
_HOME_OF_GROUPED = "torchao.prototype.moe_training.mxfp8_grouped_mm"
_GROUPED = "_to_mxfp8_then_scaled_grouped_mm"


class MXFP8Recipe:
    """torchao's MXFP8Linear against high precision.

    Args:
        name: what the user calls it.
        mode: how a block's scale is rounded to a power of two: "rceil" up, so that
            nothing overflows, or "floor" down, as the format's specification has it.
        device: where the model runs; decides whether the GEMMs are emulated.
        grad_weight_hp: compute the gradient of the weight in high precision.

    Raises:
        ConfigError: this torchao has no MXFP8Linear.
    """

    reference = "bfloat16"

    def __init__(
        self,
        name: str,
        mode: str,
        device: torch.device,
        *,
        grad_weight_hp: bool = False,
    ) -> None:
        torchao = _torchao()
        self.name = name
        self._mode = mode
        self._device = device
        self._kind = _padded_linear()
        self._attributes: dict[str, Any] = {
            "kernel_preference": torchao.KernelPreference.AUTO,
            "scale_calculation_mode": torchao.ScaleCalculationMode(mode),
            "wgrad_with_hp": grad_weight_hp,
        }
        self.emulated = not (
            has_mx_gemms(device) and runs_converted(self.name, self.convert, device)
        )
        if self.emulated:
            self._attributes["kernel_preference"] = torchao.KernelPreference.EMULATED
        self.settings = f"MXFP8Linear, {mode}, emulate={self.emulated}"
        if grad_weight_hp:
            self.settings += ", wgrad_with_hp=True"

    def supports(self, linear: nn.Linear) -> Reason | None:
        """Blocks of 32 must fill K and N."""
        if linear.weight.dtype not in (torch.bfloat16, torch.float32):
            return Reason.UNSUPPORTED_DTYPE
        n, k = linear.weight.shape[-2:]  # of experts, either of them first
        return Reason.NOT_DIVISIBLE_BY_32 if k % BLOCK or n % BLOCK else None

    def static_filter(self, linear: nn.Linear) -> Reason | None:
        """No published table."""
        del linear

    def convert(self, linear: nn.Linear) -> None:
        """Give the Linear torchao's class and attributes, or the grouped GEMM its own."""
        change_class(linear, *self._change_for(linear))

    def revert(self, linear: nn.Linear) -> None:
        """Take the class and the attributes away."""
        restore_class(linear, *self._change_for(linear))

    def _change_for(self, linear: nn.Linear) -> tuple[type[nn.Linear], dict[str, Any]]:
        if isinstance(linear, GroupedLinear):
            own = {"product": _grouped_mm(), "arguments": self._attributes}
            return MXFP8Experts, own
        return self._kind, self._attributes

    @cached_property
    def takes_experts(self) -> bool:
        """Whether torchao has the grouped GEMM, and it runs."""
        return runs_experts(self.name, self.convert, self._device)

    def casts(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        grad_output: torch.Tensor,
        *,
        grad_input: bool,
        grad_weight: bool,
    ) -> Iterator[CastOperand]:
        """See ``fp8tune.recipes.casts``; blocks lie along what a GEMM sums over."""
        in_mx = grad_weight and not self._attributes["wgrad_with_hp"]
        operands = [input, weight]
        operands += [grad_output, weight.t()] if grad_input else []
        operands += [grad_output.t(), input.t()] if in_mx else []
        for operand in operands:
            padded = F.pad(operand, (0, -operand.shape[1] % BLOCK))
            blocks = padded.reshape(-1, BLOCK)
            yield CastOperand(blocks, self._scale(blocks), _ELEMENTS)

    def _scale(self, blocks: torch.Tensor) -> torch.Tensor:
        """What each block is multiplied with: a power of two."""
        largest = blocks.abs().amax(1, keepdim=True).float()
        if self._mode == "floor":
            _, exponent = torch.frexp(largest)  # largest = mantissa * 2**exponent
            power = exponent - 1 - 8  # e4m3's largest power of two is 2**8
        else:
            mantissa, exponent = torch.frexp(largest / torch.finfo(_ELEMENTS).max)
            power = torch.where(mantissa > 0.5, exponent, exponent - 1)
        return torch.where(largest > 0, torch.exp2(-power.float()), 1.0)


@cache
def _torchao() -> Any:
    return load(_HOME, _NAMES, "mxfp8", "MXFP8Linear")


@cache
def _grouped_mm() -> Any:
    return getattr(load(_HOME_OF_GROUPED, [_GROUPED], "mxfp8", _GROUPED), _GROUPED)


class MXFP8Experts(PaddedExperts):
    """A grouped GEMM of experts in mxfp8, by torchao's function for it."""

    multiple = BLOCK


@cache
def _padded_linear() -> type[nn.Linear]:
    """MXFP8Linear that takes any number of rows, any layout, mixed dtypes, autocast."""
    torchao = _torchao()

    class PaddedMXFP8Linear(torchao.MXFP8Linear):
        """torchao's MXFP8Linear on padded, contiguous rows of one dtype."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            """Shape (*, K) -> (*, N)."""
            gemm = partial(
                torchao._to_mxfp8_then_scaled_mm,  # noqa: SLF001
                kernel_preference=self.kernel_preference,
                scale_calculation_mode=self.scale_calculation_mode,
                wgrad_with_hp=self.wgrad_with_hp,
            )
            return on_padded_rows(self, input, BLOCK, gemm)

    PaddedMXFP8Linear.__qualname__ = PaddedMXFP8Linear.__name__
    return PaddedMXFP8Linear


def __getattr__(name: str) -> Any:
    """The class by its name, as pickle looks it up."""
    if name == "PaddedMXFP8Linear":
        return _padded_linear()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
