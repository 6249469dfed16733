"""FSDP2's all-gather in float8 in tuned models: as asked for, checkpointed, taken away."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

from fp8tune import AutoFloat8, Plan, StaticFilter, TuneConfig
from fp8tune.decision.decisions import after_trial
from fp8tune.decision.trials import GATHER, TrialRecord
from fp8tune.model.copies import is_ours
from fp8tune.report.gathering import gathered_line
from tests.helpers import all_faster, hooks_of, two_blocks

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Ranks, StepScript

GATHERS = Float8LinearConfig(
    emulate=True, pad_inner_dim=True, enable_fsdp_float8_all_gather=True
)


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in list(model)[:2]:
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tuned(
    model: nn.Module,
    recipe: Any = "tensorwise",
    steps: StepScript | None = None,
    plan: Plan | None = None,
    cache: str | None = None,
    **settings: Any,
) -> AutoFloat8:
    from tests.conftest import ScriptedClock  # noqa: PLC0415 - in the rank's process

    config = TuneConfig(
        static_filter=StaticFilter.DIVISIBLE,
        include_output_layer=True,
        **({"trial_steps": 0} | settings),
    )
    clock = ScriptedClock(all_faster, steps)
    return AutoFloat8(
        model,
        recipe,
        warmup_steps=1,
        config=config,
        clock=clock,
        plan=plan,
        cache=cache,
    )


class Training:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.generator = torch.Generator().manual_seed(7)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(8, 32, generator=self.generator)
            dtype = next(self.model.parameters()).dtype
            self.model(x.to(dtype)).float().square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def weights(self) -> list[torch.Tensor]:
        return [x.full_tensor().detach() for x in self.model.parameters()]


def gathered(model: nn.Module) -> list[str]:
    return [
        fqn
        for fqn, x in model.named_parameters()
        if isinstance(x, DTensor)
        and isinstance(x._local_tensor, WeightWithDynamicFloat8CastTensor)
    ]


WEIGHTS = ["0.up.weight", "0.down.weight", "1.up.weight", "1.down.weight", "2.weight"]


def as_asked_for(folder: str) -> object:
    found: dict[str, object] = {}
    theirs = Training(sharded(convert_to_float8_training(two_blocks(), config=GATHERS)))
    theirs.run(6)
    for name, recipe, settings in (
        ("True", "tensorwise", {"float8_all_gather": True}),
        ("config", GATHERS, {}),
    ):
        training = Training(tuned(sharded(two_blocks()), recipe, **settings))
        training.run(1)
        before = gathered(training.model)
        training.run(5)
        same = all(map(torch.equal, training.weights, theirs.weights))
        found[name] = before, gathered(training.model), same
    found["checkpoints"] = checkpoints(training, folder)
    found["left out"] = [
        gathered(train(recipe, **settings))
        for recipe, settings in (
            (GATHERS, {"float8_all_gather": False}),
            ("tensorwise", {}),
            ("rowwise", {"float8_all_gather": True}),
        )
    ]
    found["reference"] = in_reference(training.model)
    training.model.abandon()
    hooks = hooks_of(training.model.module).values()
    ours = [str(x) for each in hooks for x in each.values() if is_ours(x)]
    found["abandoned"] = gathered(training.model), ours
    found["plainly"] = gathered_plainly_meanwhile()
    return found


def train(recipe: Any, **settings: Any) -> AutoFloat8:
    auto = tuned(sharded(two_blocks()), recipe, **settings)
    Training(auto).run(2)
    return auto


def gathered_plainly_meanwhile() -> dict[str, bool]:
    """As a check of the accuracy has it; training goes on as if there were none."""
    weights: list[list[torch.Tensor]] = []
    found: dict[str, bool] = {}
    for often in (0, 2):
        auto = tuned(sharded(two_blocks()), float8_all_gather=True)
        training = Training(auto)
        training.run(2)
        conversions = auto.tuner._pipeline.conversions
        for _ in range(often):
            before = conversions.gathering.scales()
            with conversions.gathered_plainly():
                found["meanwhile"] = gathered(auto) == []
            after = conversions.gathering.scales()
            found["scales"] = all(x is after[i] is not None for i, x in before.items())
        training.run(2)
        found["afterwards"] = gathered(auto) == WEIGHTS
        weights.append(training.weights)
    return found | {"same": all(map(torch.equal, *weights))}


def checkpoints(training: Training, folder: str) -> dict[str, bool]:
    """Into bare models, by DCP and as a whole; and back into the tuned one."""
    auto = training.model
    state = get_model_state_dict(auto)
    dcp.save({"model": state}, checkpoint_id=folder)
    by_dcp = sharded(two_blocks())
    for x in by_dcp.parameters():
        nn.init.zeros_(x)
    loaded = {"model": get_model_state_dict(by_dcp)}
    dcp.load(loaded, checkpoint_id=folder)
    set_model_state_dict(by_dcp, loaded["model"])
    full = get_model_state_dict(auto, options=StateDictOptions(full_state_dict=True))
    alone = two_blocks()
    if dist.get_rank() == 0:
        alone.load_state_dict(full)
    whole = [x.full_tensor() for x in by_dcp.parameters()]
    own = training.weights
    auto.load_state_dict(get_model_state_dict(by_dcp))
    scales = auto.tuner._pipeline.conversions.gathering.scales().values()
    kinds = {type(x._local_tensor) for x in auto.state_dict().values()}
    return {
        "plain": kinds == {torch.Tensor},
        "dcp": all(map(torch.equal, whole, own)),
        "full": dist.get_rank() > 0 or all(map(torch.equal, alone.parameters(), own)),
        "no stale scale": set(scales) == {None},
    }


def in_reference(auto: AutoFloat8) -> tuple[int, int]:
    gathering = auto.tuner._pipeline.conversions.gathering
    with auto.reference():
        auto(torch.ones(8, 32, dtype=torch.bfloat16))
        inside = gathering.number
    auto(torch.ones(8, 32, dtype=torch.bfloat16))
    return inside, gathering.number


@pytest.mark.dist
def test_weights_are_gathered_in_float8_as_asked_for(
    ranks: Ranks, tmp_path: Path
) -> None:
    answers = ranks(2, as_asked_for, str(tmp_path / "checkpoint"))
    for answer in answers.values():
        assert isinstance(answer, dict), answer
        assert answer["True"] == answer["config"] == ([], WEIGHTS, True)
        assert all(answer["checkpoints"].values()), answer["checkpoints"]
        assert answer["left out"] == [[], [], []]
        assert answer["reference"] == (0, len(WEIGHTS))
        assert answer["abandoned"] == ([], [])
        assert all(answer["plainly"].values()), answer["plainly"]


def test_weights_in_float32_are_said_to_be_cast_from_that() -> None:
    assert gathered_line(3, 0) == "FSDP2 gathers 3 weights in float8"
    assert "2 of them are kept in float32" in gathered_line(3, 2)


def test_without_fsdp2_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    training = Training(tuned(two_blocks(), float8_all_gather=True))
    training.run(2)
    said = [x.message for x in caplog.records if x.levelno == logging.WARNING]
    assert len(said) == 1
    assert "5 of 5 converted layers are gathered in high precision" in said[0]
    assert "FSDP2 does not shard it" in said[0]


def gather_saves(names: set[str]) -> float:
    """Milliseconds of a step: layers save 1 each, the gather 3 more, on the slower rank."""
    slow = 2.0 if dist.get_rank() else 0.0
    return 20.0 + slow - len(names - {GATHER}) - 3.0 * (GATHER in names)


def gather_costs(names: set[str]) -> float:
    """It saves on one rank and costs more on the other, for which all wait."""
    if dist.get_rank() == 0:
        return gather_saves(names)
    return 30.0 - len(names - {GATHER}) + 3.0 * (GATHER in names)


def by_trial(folder: str) -> object:
    found: dict[str, object] = {}
    for script in (gather_saves, gather_costs):
        cache = f"{folder}/{script.__name__}.json"
        auto = tuned(sharded(two_blocks()), steps=script, trial_steps=80, cache=cache)
        training = Training(auto)
        seen = {tuple(gathered(auto))}
        for _ in range(90):
            training.run(1)
            seen.add(tuple(gathered(auto)))
            if auto.frozen:
                break
        found[script.__name__] = (
            gathered(auto),
            auto.plan.gathers,
            auto.plan.converted_fqns,
            {(), tuple(WEIGHTS)} <= seen,
        )
        if script is gather_saves:
            path = f"{folder}/plan{dist.get_rank()}.json"
            auto.plan.save(path)
            again = tuned(sharded(two_blocks()), plan=Plan.load(path))
            found["resumed"] = gathered(again)
            later = tuned(sharded(two_blocks()), trial_steps=80, cache=cache)
            replayed = later.phase
            Training(later).run(2)
            found["cached"] = str(replayed), gathered(later)
    return found


@pytest.mark.dist
def test_the_trial_decides_by_whole_steps(ranks: Ranks, tmp_path: Path) -> None:
    answers = ranks(2, by_trial, str(tmp_path))
    layers = [x.removesuffix(".weight") for x in WEIGHTS]
    for answer in answers.values():
        assert isinstance(answer, dict), answer
        assert answer["gather_saves"] == (WEIGHTS, True, layers, True)
        assert answer["gather_costs"] == ([], False, layers, True)
        assert answer["resumed"] == WEIGHTS
        assert answer["cached"] == ("replayed", WEIGHTS)


def test_a_plan_that_gathers_says_so_where_it_cannot(
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = Training(tuned(two_blocks()))
    training.run(2)
    chosen = TrialRecord((*training.model.plan.converted_fqns, GATHER), (), ())
    tuned(two_blocks(), plan=after_trial(training.model.plan, chosen))
    assert "5 of 5 converted layers are gathered in high precision" in caplog.text
