"""Tensors of calls with many M are kept for timing, within a budget."""

from __future__ import annotations

import torch

from fp8tune.model.kept import Budget, Kept
from tests.helpers import signature

ROW_BYTES = 32 * 4


def filled(budget: Budget, *sizes: int) -> Kept:
    kept = Kept(budget)
    for m in sizes:
        shape = signature(m, 32, 64).shape
        tensor = torch.full((m, 32), float(m))
        if kept.make_room(shape, tensor.nbytes):
            kept.put(shape, tensor)
    return kept


def found(kept: Kept, m: int) -> float | None:
    """What number fills the tensor of a call with so many rows."""
    tensor = kept.get(signature(m, 32, 64).shape)
    if tensor is None:
        return None
    assert tensor.shape == (m, 32)
    return tensor[0, 0].item()


def test_up_to_four_m_have_their_own_tensors() -> None:
    kept = filled(Budget(10**6), 40, 10, 30, 20)
    assert [found(kept, m) for m in (10, 20, 30, 40)] == [10, 20, 30, 40]


def test_a_larger_one_takes_the_place_of_the_smallest() -> None:
    budget = Budget(10**6)
    kept = filled(budget, 10, 20, 30, 40, 25, 50)
    assert budget.bytes == 10**6 - (25 + 30 + 40 + 50) * ROW_BYTES
    assert [found(kept, m) for m in (10, 25, 26, 50)] == [25, 25, 30, 50]
    assert found(kept, 51) is None


def test_in_a_small_budget_the_largest_that_fits_stands_for_all() -> None:
    budget = Budget(35 * ROW_BYTES)
    kept = filled(budget, 10, 20, 30, 36)
    assert budget.bytes == 5 * ROW_BYTES
    assert [found(kept, m) for m in (10, 20, 30)] == [30, 30, 30]
    assert found(kept, 36) is None


def test_one_that_would_not_fit_pushes_nothing_out() -> None:
    kept = filled(Budget(35 * ROW_BYTES), 30, 36)
    assert found(kept, 30) == 30


def test_kinds_share_the_budget_but_not_their_tensors() -> None:
    budget = Budget(35 * ROW_BYTES)
    kept = filled(budget, 30)
    other = signature(4, 32, 128).shape
    assert kept.get(other) is None
    assert not kept.make_room(other, 6 * ROW_BYTES)
    assert kept.make_room(other, 5 * ROW_BYTES)


def test_rows_are_taken_from_batches_of_any_dimensions() -> None:
    kept = Kept(Budget(10**6))
    shape = signature(12, 32, 64).shape
    kept.put(shape, torch.arange(12 * 32).reshape(3, 4, 32))
    rows = kept.get(signature(5, 32, 64).shape)
    assert rows is not None
    assert torch.equal(rows, torch.arange(5 * 32).reshape(5, 32))


def test_what_is_not_finite_makes_room_for_the_next() -> None:
    kept = Kept(Budget(10**6))
    shape = signature(4, 32, 64).shape
    kept.put(shape, torch.full((4, 32), float("nan")))
    kept.drop_if_not_finite(shape)
    assert not kept.is_finite(shape)
    assert kept.make_room(shape, 4 * ROW_BYTES)
    kept.put(shape, torch.ones(4, 32))
    assert found(kept, 4) == 1
    assert kept.is_finite(shape)


def test_rows_of_what_is_not_finite_are_not_taken() -> None:
    kept = filled(Budget(10**6), 30, 40)
    small = signature(10, 32, 64).shape
    kept.get(signature(30, 32, 64).shape)
    kept.put(signature(20, 32, 64).shape, torch.full((20, 32), float("inf")))
    assert found(kept, 10) == 30
    assert kept.is_finite(small)
