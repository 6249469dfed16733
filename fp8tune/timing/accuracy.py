"""Stage 3, beside the time: what a recipe costs in accuracy on the captured tensors.

With x, w and g as input (M, K), weight (N, K) and output gradient (M, N), what a variant
computed is compared with the same three products in float32::

    output       x  @ w.T    (M, N)
    grad_input   g  @ w      (M, K)
    grad_weight  g.T @ x     (N, K)

A grouped GEMM is the same for each expert, with its rows and its matrix; one SQNR is of
all of them together. The float32 side is made block by block, so that it needs no more memory than the captured
tensors may.

A product of which an operand holds inf or NaN says nothing of a recipe, nor does one that
overflows in high precision too. Gradients that do, as when a loss scale is still too large,
are compared at a smaller scale; the rest is left out.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fp8tune.decision.accuracy import Accuracy
from fp8tune.timing.casts import rows_that_fit, shares_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from fp8tune.timing.replay import Replay, Results

__all__ = ["SQNR_LIMIT_DB", "accuracy_of", "decibels"]

# Equal tensors have an infinite SQNR and NaN has none, neither of which is JSON. float32
# against itself reaches 140 dB.
SQNR_LIMIT_DB = 200.0

# Blocks smaller than this would take longer than the timing; it is what a GPU's
# workspace for one GEMM takes anyway.
_LEAST_BYTES = 32 * 2**20


def accuracy_of(replay: Replay, budget_bytes: int) -> Accuracy:
    """Run a variant once more and compare what it computes with float32.

    Args:
        replay: the variant; gradients must be enabled.
        budget_bytes: how much may be allocated besides what the variant itself does.
    """
    cells = max(budget_bytes, _LEAST_BYTES) // 4
    compared, peak = _compared(replay, cells)
    if compared.output_db is not None and _LIMIT < peak < math.inf:
        # As a loss scaler does when a step overflows, by a power of two.
        replay.operands.shrink_grad(2.0 ** -math.ceil(math.log2(peak / _LIMIT)))
        compared, _ = _compared(replay, cells)
    return compared


def _compared(replay: Replay, cells: int) -> tuple[Accuracy, float]:
    """The accuracy, and the largest number of the gradients as a share of what fits."""
    results, operands = replay.results(), replay.operands
    w, shape = operands.weight.detach(), replay.signature.shape
    x = operands.input.detach().reshape(-1, shape.k)
    g = operands.grad_output(results.output).detach().reshape(-1, shape.n)
    largest = _largest(replay)
    # Not around the variant: torch 2.15 would compile it anew.
    with torch.no_grad(), _full_precision():
        output, grad_input, grad_weight = (
            _compare(products, cells, largest) if products else _Product(None, 0.0)
            for products in _products(replay, results, (x, w, g))
        )
        known = all(map(_is_finite, (x, w, g))) and not shape.experts
        shares = shares_of(replay, (x, w, g), cells) if known else (None, None)
    accuracy = Accuracy(
        output.sqnr_db, grad_input.sqnr_db, grad_weight.sqnr_db, *shares
    )
    return accuracy, max(grad_input.peak, grad_weight.peak)


@contextmanager
def _full_precision() -> Generator[None]:
    """float32 products that are float32, whatever the user chose for speed."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [_own_precision(backend) for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _own_precision(backend: Any) -> str:
    """What this backend was set to, or "none" if it follows torch.backends.

    torch tells only what holds, so the general setting is moved to see who follows.
    """
    found: str = backend.fp32_precision
    general = torch.backends.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    other = "ieee" if found == "tf32" else "tf32"
    try:
        torch.backends.fp32_precision = other  # pyright: ignore[reportAttributeAccessIssue]
        return "none" if backend.fp32_precision == other else found
    finally:
        torch.backends.fp32_precision = general  # pyright: ignore[reportAttributeAccessIssue]


# Share of the largest number of its dtype up to which a result is compared: what is just
# below that number is rounded to inf by one variant and not by the other.
_LIMIT = 0.5


# Power of two that float32 holds up and down without losing bits.
_MOST = 126


class _Product(NamedTuple):
    """SQNR of a product, and its largest number as a share of what its dtype holds."""

    sqnr_db: float | None
    peak: float


def _largest(replay: Replay) -> float:
    """The largest number of the dtype that high precision computes in."""
    shape = replay.signature.shape
    dtype: torch.dtype = getattr(torch, shape.autocast_dtype or shape.input_dtype)
    return torch.finfo(dtype).max


# What was computed as a @ b, and both factors.
_Computed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _products(
    replay: Replay,
    results: Results,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> Iterator[list[_Computed]]:
    """Output, gradient of the input and of the weight; of experts, one of each for each."""
    x, w, g = operands
    out, grad_x, grad_w = results.output.reshape(g.shape), *results[1:]
    parts = list(_parts_of(replay, w))
    yield [(out[rows], x[rows], weight.t()) for rows, weight, _ in parts]
    found = None if grad_x is None else grad_x.reshape(x.shape)
    yield [] if found is None else [(found[rows], g[rows], y) for rows, y, _ in parts]
    yield (
        []
        if grad_w is None
        else [(of(grad_w), g[rows].t(), x[rows]) for rows, _, of in parts]
    )


def _parts_of(
    replay: Replay, w: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]:
    """Rows, (N, K) of the weight, and what takes the like out of another of its shape."""
    shape = replay.signature.shape
    if not shape.experts:
        yield slice(None), w, lambda whole: whole
        return
    start = 0
    for i, end in enumerate(replay.operands.offs.tolist()):
        of = partial(_matrix, i, shape.transposed)
        if end > start:
            yield slice(start, end), of(w), of
        start = end


def _matrix(number: int, transposed: bool, whole: torch.Tensor) -> torch.Tensor:
    return whole[number].t() if transposed else whole[number]


def _compare(products: Sequence[_Computed], cells: int, largest: float) -> _Product:
    """SQNR of all together, with about ``cells`` numbers alive at a time."""
    signal = noise = peak = 0.0
    for found, a, b in products:
        if not (_is_finite(a) and _is_finite(b)):
            return _Product(None, math.inf)
        sums = _sums(found, a, b, cells, largest)
        signal, noise, peak = signal + sums[0], noise + sums[1], max(peak, sums[2])
    return _Product(None if peak > _LIMIT else decibels(signal, noise), peak)


def _sums(
    found: torch.Tensor, a: torch.Tensor, b: torch.Tensor, cells: int, largest: float
) -> tuple[float, float, float]:
    """Signal, noise and the largest number of ``found`` against a @ b."""
    signal = noise = peak = 0.0
    inner = a.shape[1]
    columns = rows_that_fit(cells // 3, inner, b.shape[1])
    rows = rows_that_fit(cells // 3, max(inner, columns), a.shape[0])
    for j in range(0, b.shape[1], columns):
        right = b[:, j : j + columns].float()
        for i in range(0, a.shape[0], rows):
            exact = a[i : i + rows].float() @ right
            low, high = exact.aminmax()
            peak = max(peak, -float(low) / largest, float(high) / largest)
            noise += _sum_of_squares(exact - found[i : i + rows, j : j + columns])
            signal += _sum_of_squares(exact)
    return signal, noise, peak


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _sum_of_squares(tensor: torch.Tensor) -> float:
    low, high = map(float, tensor.aminmax())
    largest = max(-low, high)
    if not math.isfinite(largest) or largest == 0:
        return largest
    # Squares of gradients under a large loss scale overflow in float32, and those of
    # unscaled ones vanish. In place, since nobody needs the tensor any more.
    power = max(-_MOST, min(_MOST, -math.frexp(largest)[1]))
    scale = 2.0**power
    total = float(tensor.mul_(scale).square_().sum(dtype=torch.float64))
    return total / scale / scale


def decibels(signal: float, noise: float) -> float:
    """SQNR in dB of these sums of squares, within +-SQNR_LIMIT_DB."""
    if noise == 0:
        return SQNR_LIMIT_DB
    if not math.isfinite(noise) or signal == 0:
        return -SQNR_LIMIT_DB
    if math.isinf(signal):
        return SQNR_LIMIT_DB
    decibels = 10 * (math.log10(signal) - math.log10(noise))
    return max(-SQNR_LIMIT_DB, min(SQNR_LIMIT_DB, decibels))
