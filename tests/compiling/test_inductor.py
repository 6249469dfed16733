"""Settings of Inductor that recipes need: where they are applied, and that it is said."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, StaticFilter, TuneConfig, get_recipe
from fp8tune.compiling.inductor import unset, with_recipe_settings
from tests.helpers import all_faster, all_slower

EMULATE = {"emulate_precision_casts": True}
ROWWISE = get_recipe("rowwise", "cpu")
CONFIG = TuneConfig(static_filter=StaticFilter.DIVISIBLE, trial_steps=0, max_samples=8)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"options": EMULATE}),
        ({"fullgraph": True}, {"fullgraph": True, "options": EMULATE}),
        (
            {"options": {"epilogue_fusion": False}},
            {"options": {**EMULATE, "epilogue_fusion": False}},
        ),
        (
            {"options": {"emulate_precision_casts": False}},
            {"options": {"emulate_precision_casts": False}},
        ),
        ({"backend": "aot_eager"}, {"backend": "aot_eager"}),
    ],
)
def test_what_a_recipe_needs_is_added_to_what_the_user_asked_for(
    options: dict[str, object], expected: dict[str, object]
) -> None:
    assert with_recipe_settings(options, [ROWWISE]) == expected


def test_a_mode_is_written_out_since_torch_takes_no_options_beside_it() -> None:
    """Fails loudly when torch moves the list of what its modes stand for."""
    found = with_recipe_settings({"mode": "max-autotune-no-cudagraphs"}, [ROWWISE])
    assert "mode" not in found
    assert found["options"]["max_autotune"] is True
    assert found["options"]["emulate_precision_casts"] is True
    torch.compile(nn.Linear(2, 2), **found)


def test_torch_still_has_the_setting() -> None:
    """Fails loudly when Inductor renames it."""
    assert unset(EMULATE) == EMULATE
    with torch._inductor.config.patch(EMULATE):
        assert unset(EMULATE) == {}


@pytest.mark.parametrize("name", ["tensorwise", "rowwise_with_gw_hp", "bf16"])
def test_other_recipes_need_nothing(name: str) -> None:
    options = {"mode": "max-autotune"}
    assert with_recipe_settings(options, [get_recipe(name, "cpu")]) == options
    both = with_recipe_settings({}, [get_recipe(name, "cpu"), ROWWISE])
    assert both == {"options": EMULATE}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What Inductor is given with each graph, which then runs as it is."""
    given: list[dict[str, object]] = []

    def compile_fx(
        model: nn.Module,
        inputs: object,
        *,
        config_patches: dict[str, object] | None = None,
        **_: object,
    ) -> object:
        del inputs
        given.append(dict(config_patches or {}))
        return model.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch.compiler.reset()
    return given


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().bfloat16()


def train(auto: AutoFloat8, steps: int = 3) -> AutoFloat8:
    for _ in range(steps):
        auto(torch.ones(16, 32, dtype=torch.bfloat16)).sum().backward()
    return auto


def test_timed_linears_are_compiled_with_it_and_the_users_config_stays(
    seen: list[dict[str, object]],
) -> None:
    auto = train(AutoFloat8(model(), warmup_steps=1, compile=True, config=CONFIG), 2)
    # Reference and candidate of one signature, with and without the input's gradient.
    assert len(seen) >= 4
    timed = [x for x in seen if "triton.cudagraphs" in x]
    # Parts of a recipe are compiled too where the whole is not clearly faster.
    assert len(timed) >= 4
    assert all(x["emulate_precision_casts"] is True for x in timed)
    assert torch._inductor.config.emulate_precision_casts is False
    assert "emulate_precision_casts" in auto.plan.timing


def test_the_model_is_compiled_with_it_where_it_is_converted(
    seen: list[dict[str, object]],
    scripted_clock: type,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    clock = scripted_clock(all_faster)
    train(AutoFloat8(model(), warmup_steps=1, compile=True, clock=clock, config=CONFIG))
    assert seen
    assert all(x["emulate_precision_casts"] is True for x in seen)
    line = "compiling with {'emulate_precision_casts': True}, as rowwise needs"
    assert line in caplog.messages


def test_the_model_is_compiled_without_it_where_nothing_is_converted(
    seen: list[dict[str, object]], scripted_clock: type
) -> None:
    clock = scripted_clock(all_slower)
    train(AutoFloat8(model(), warmup_steps=1, compile=True, clock=clock, config=CONFIG))
    assert seen
    assert not any("emulate_precision_casts" in x for x in seen)


def test_who_compiles_by_hand_is_told(
    scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    def trained(compile: object) -> list[str]:
        caplog.clear()
        auto = AutoFloat8(
            model(),
            warmup_steps=1,
            compile=compile,
            clock=scripted_clock(all_faster),
            config=CONFIG,
        )
        train(auto)
        return [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]

    def by_hand(module: nn.Module) -> None:
        module.compile(backend="eager")

    (warning,) = trained(by_hand)
    assert (
        "rowwise needs torch._inductor.config.emulate_precision_casts = True" in warning
    )
    with torch._inductor.config.patch(EMULATE):
        assert trained(by_hand) == []
