"""What is clear before it is timed: which table, which shapes, which recipes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from fp8tune.config import TuneConfig
from fp8tune.decision.intervals import Interval
from fp8tune.decision.kinds import kind_of
from fp8tune.decision.records import Layer
from fp8tune.decision.trust import Prior, clear_kinds
from fp8tune.store.cache import Key
from fp8tune.store.tables import published_table, table_for
from tests.helpers import signature

if TYPE_CHECKING:
    from fp8tune.decision.records import Signature

LARGE = signature(16384, 8192, 8192)
SMALL = signature(1024, 1024, 1024)


@pytest.mark.parametrize(
    ("device", "timing", "recipe", "fits"),
    [
        ("NVIDIA H100 80GB HBM3", "compiled", "rowwise", True),
        ("NVIDIA H100 80GB HBM3", "compiled(mode='max-autotune')", "rowwise", True),
        ("NVIDIA H100 80GB HBM3", "compiled, norm_act", "rowwise", False),
        ("NVIDIA H100 80GB HBM3", "eager", "rowwise", False),
        ("NVIDIA H100 80GB HBM3", "compiled", "tensorwise", False),
        ("NVIDIA H200", "compiled", "rowwise", False),
        ("AMD EPYC", "compiled", "rowwise", False),
    ],
)
def test_the_table_counts_on_its_own_device(
    device: str, timing: str, recipe: str, *, fits: bool
) -> None:
    key = Key((("device", device),), recipe, "", timing)
    assert (table_for(key) is not None) == fits


def test_the_table_is_asked_where_no_shape_is_near() -> None:
    prior = Prior("rowwise", {}, published_table("rowwise"))
    found = prior.expect(LARGE)
    assert found is not None
    assert found.speedup.verdict(1.0) == "faster"
    assert "torchao" in found.source
    assert prior.expect(replace(LARGE, recompute=True)) is None
    own = replace(prior, timed={LARGE: Interval(0.7, 0.8, 0.9)}).expect(LARGE)
    assert own is not None
    assert own.speedup.verdict(1.0) == "slower"
    assert own.source == "timings of other shapes"


def test_other_gradients_or_dtypes_are_no_neighbours() -> None:
    prior = Prior("bf16", {LARGE: Interval(1.9, 2.0, 2.1)})
    assert prior.expect(LARGE)
    assert prior.expect(replace(LARGE, grad_input=False)) is None
    shape = replace(LARGE.shape, weight_dtype="float32")
    assert prior.expect(replace(LARGE, shape=shape)) is None


def _layer(*calls: tuple[Signature, int]) -> Layer:
    return Layer("a", 1, 1, "bfloat16", True, None, calls)


def _clear(
    layer: Layer, *names: str, known: tuple[Signature, ...] = (), **knobs: Any
) -> bool:
    both = {
        "fast": Prior("fast", {LARGE: Interval(1.9, 2.0, 2.1)}),
        "also": Prior("also", {LARGE: Interval(1.4, 1.5, 1.6)}),
        "slow": Prior("slow", {LARGE: Interval(0.4, 0.5, 0.6)}),
    }
    wanted = {x: names for x, _ in layer.calls}
    config = TuneConfig(trust_prior=True, **knobs)
    found = clear_kinds([layer], wanted, known, both, config)
    return kind_of(LARGE) in found


def test_what_would_have_to_race_or_add_up_is_timed() -> None:
    layer = _layer((LARGE, 1))
    assert _clear(layer, "fast")
    assert _clear(layer, "fast", "slow")
    assert not _clear(layer, "fast", "also")
    assert not _clear(layer, "fast", known=(LARGE,))
    assert not _clear(_layer((LARGE, 1), (replace(LARGE, recompute=True), 1)), "fast")
    # Every M has to be clear.
    assert not _clear(_layer((SMALL, 1), (LARGE, 1)), "fast")
    assert not _clear(
        _layer((replace(LARGE, shape=replace(LARGE.shape, m=64)), 1), (LARGE, 1)),
        "fast",
    )


def test_a_loss_is_clear_without_accuracy_a_gain_is_not() -> None:
    layer = _layer((LARGE, 1))
    assert _clear(layer, "slow", min_sqnr_db=20)
    assert not _clear(layer, "fast", min_sqnr_db=20)
    assert not _clear(layer, "fast", objective="memory")
    assert not _clear(layer, "fast", min_speedup=2.0)
