"""What the casts of a recipe do to the operands of its GEMMs, if it says what it casts.

Sums are dominated by their largest terms, so the SQNR of a product does not fall where an
outlier takes the whole range of the dtype and is itself the largest part of the product:
its own energy is the signal. What it does to the other numbers shows in the operands, a
row or a column at a time: each is compared with its own energy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from fp8tune.recipes.casts import Casts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp8tune.recipes.casts import CastOperand
    from fp8tune.timing.replay import Replay

__all__ = ["noise_of_typical_lines", "rows_that_fit", "shares_of"]


def rows_that_fit(cells: int, width: int, length: int) -> int:
    """How many of ``length`` rows of that width go into so many cells; at least one."""
    return max(1, min(length, cells // max(1, width)))


def noise_of_typical_lines(replay: Replay, budget_bytes: int) -> float | None:
    """Noise / signal of the median row or column of an operand; the worst operand's.

    For outliers in a channel the columns of the input tell, for those in a row its rows;
    where a recipe scales blocks, rows are blocks. Lines of zeros are left out. The
    gradient of the output, which a forward does not have, is not looked at.

    Args:
        replay: the converted layer with its input and weight.
        budget_bytes: about how much may be allocated besides.

    Returns:
        noise / signal in energy, or None if the recipe does not say what it casts.
    """
    if not isinstance(replay.recipe, Casts) or replay.signature.shape.experts:
        return None
    n, k = replay.operands.weight.shape
    x = replay.operands.input.detach().reshape(-1, k)
    signature = replay.signature
    with torch.no_grad():
        casts = replay.recipe.casts(
            x,
            replay.operands.weight.detach(),
            x.new_zeros(x.shape[0], n),
            grad_input=signature.grad_input,
            grad_weight=signature.grad_weight,
        )
        return max((_typical(cast, budget_bytes // 8) for cast in casts), default=0.0)


def _typical(cast: CastOperand, cells: int) -> float:
    rows: list[torch.Tensor] = []
    columns = cast.values.new_zeros(2, cast.values.shape[1], dtype=torch.float64)
    for part in _parts(cast, cells):
        exact = part.values.float()
        noise = (_kept(part) - exact).square_()
        energies = torch.stack([exact.square(), noise])
        rows.append(energies.sum(2, dtype=torch.float64))
        columns += energies.sum(1, dtype=torch.float64)
    return max(_median(torch.cat(rows, 1)), _median(columns))


def _kept(cast: CastOperand) -> torch.Tensor:
    """The values as they are after the cast."""
    largest = torch.finfo(cast.dtype).max
    scaled = (cast.values.float() * cast.scale).clamp_(-largest, largest)
    return scaled.to(cast.dtype).float().div_(cast.scale)


def _median(energies: torch.Tensor) -> float:
    """Of noise / signal over the lines that have a signal, or 0 if none has."""
    signal, noise = energies[:, energies[0] > 0]
    return float((noise / signal).median()) if len(signal) else 0.0


class _Counts(NamedTuple):
    nonzero: int
    flushed: int
    saturated: int


def shares_of(
    replay: Replay,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cells: int,
) -> tuple[float | None, float | None]:
    """Underflow and saturation share, if the recipe says what it casts.

    Args:
        replay: the converted layer.
        operands: input (M, K), weight (N, K) and gradient of the output (M, N).
        cells: about how many numbers may be alive besides.
    """
    if not isinstance(replay.recipe, Casts):
        return None, None
    signature = replay.signature
    casts = replay.recipe.casts(
        *operands, grad_input=signature.grad_input, grad_weight=signature.grad_weight
    )
    counts = [_count(part) for cast in casts for part in _parts(cast, cells)]
    nonzero = sum(x.nonzero for x in counts)
    if not nonzero:
        return 0.0, 0.0
    flushed, saturated = (sum(column) for column in list(zip(*counts, strict=True))[1:])
    return flushed / nonzero, saturated / nonzero


def _parts(cast: CastOperand, cells: int) -> Iterator[CastOperand]:
    """The rows of an operand, so many at a time that their copies fit."""
    step = rows_that_fit(cells // 4, cast.values.shape[1], cast.values.shape[0])
    for i in range(0, cast.values.shape[0], step):
        part = slice(i, i + step)
        scale = (
            cast.scale[part] if cast.scale.dim() and len(cast.scale) > 1 else cast.scale
        )
        yield cast._replace(values=cast.values[part], scale=scale)


def _count(cast: CastOperand) -> _Counts:
    # Not in place: of float32 values, float() is the tensor itself.
    scaled = (cast.values.float() * cast.scale).abs_()
    limits = torch.finfo(cast.dtype)
    kept = scaled.clamp(max=limits.max).to(cast.dtype).float()
    nonzero = cast.values != 0
    return _Counts(
        int(nonzero.sum()),
        int(((kept == 0) & nonzero).sum()),
        int((scaled > limits.max * _ROUNDING).sum()),
    )


# A scale is itself rounded, so the largest value may come out a hair above the limit.
_ROUNDING = 1 + 1e-5
