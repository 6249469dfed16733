"""FSDP2's all-gather in float8 in tuned models: as asked for, checkpointed, taken away."""

from __future__ import annotations

import copy
import dataclasses
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
from torch.distributed.tensor import DTensor
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear
from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

from fp8tune import AutoFloat8, Plan, StaticFilter, TuneConfig
from fp8tune.decision.decisions import after_trial
from fp8tune.decision.trials import GATHER, TrialRecord
from fp8tune.model.copies import is_ours
from fp8tune.recipes.all_gather import precompute_scales, sharded_weights
from fp8tune.report.gathering import gathered_line
from tests.helpers import TwiceAsFast, all_faster, hooks_of, sharded, two_blocks

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Ranks, StepScript

GATHERS = Float8LinearConfig(
    emulate=True, pad_inner_dim=True, enable_fsdp_float8_all_gather=True
)


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
        self.losses: list[float] = []

    def run(self, steps: int, *, ahead: bool = False) -> None:
        """Train; with torchao's call after each step that finds the scales ahead."""
        for _ in range(steps):
            x = torch.randn(8, 32, generator=self.generator)
            dtype = next(self.model.parameters()).dtype
            loss = self.model(x.to(dtype)).float().square().mean()
            loss.backward()
            self.losses.append(loss.item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            if ahead:
                modules = self.model.modules()
                precompute_scales(x for x in modules if isinstance(x, nn.Linear))

    @property
    def weights(self) -> list[torch.Tensor]:
        return [x.full_tensor().detach() for x in self.model.parameters()]

    @property
    def exp_avg(self) -> list[torch.Tensor]:
        states = [self.optimizer.state[x] for x in self.model.parameters()]
        return [x["exp_avg"].full_tensor() for x in states]


def converted_by_torchao(
    other: Training, state: tuple[set[str], bool], layout: str = "fsdp"
) -> Training:
    """A model that torchao converted before fully_shard, where the other's is now.

    Args:
        other: its weights, its optimizer's state and its batches are taken over.
        state: (names that are converted, whether they are gathered in float8).
        layout: that of the other.
    """
    names, gathers = state
    config = dataclasses.replace(GATHERS, enable_fsdp_float8_all_gather=gathers)
    model = convert_to_float8_training(
        two_blocks(), config=config, module_filter_fn=lambda _, fqn: fqn in names
    )
    fresh = Training(sharded(model, layout))
    pairs = zip(fresh.model.parameters(), other.model.parameters(), strict=True)
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.copy_(theirs)
    fresh.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
    fresh.generator.set_state(other.generator.get_state())
    return fresh


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
    found["watched"] = reverted_by_a_watch()
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


def checkpoints(
    training: Training, folder: str, layout: str = "fsdp"
) -> dict[str, bool]:
    """Into bare models, by DCP and as a whole; and back into the tuned one."""
    auto = training.model
    state = get_model_state_dict(auto)
    dcp.save({"model": state}, checkpoint_id=folder)
    by_dcp = sharded(two_blocks(), layout)
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


def reverted_by_a_watch() -> tuple[list[str], list[str], bool]:
    """An outlier takes the range of some layers' inputs while they are gathered so."""
    config = TuneConfig(
        static_filter=StaticFilter.DIVISIBLE,
        include_output_layer=True,
        timing="eager",
        float8_all_gather=True,
        min_sqnr_db=15,
        watch_every=2,
        on_quality="revert",
    )
    auto = AutoFloat8(
        sharded(two_blocks()),
        "tensorwise",
        warmup_steps=1,
        config=config,
        clock=TwiceAsFast(),
    )
    training = Training(auto)
    training.run(2)
    outlier = torch.ones(32, dtype=torch.bfloat16)
    outlier[0] = 1e6
    auto.module.register_forward_pre_hook(lambda _, args: (args[0] * outlier,))
    training.run(4)
    return gathered(auto), auto.plan.converted_fqns, training.losses[-1] > 0


def in_other_layouts(folder: str) -> object:
    found: dict[str, object] = {}
    for layout in ("tp", "hsdp"):
        model = tuned(sharded(two_blocks(), layout), float8_all_gather=True)
        training = Training(model)
        training.run(4)
        theirs = Training(sharded(two_blocks(), layout))
        # Gathered as ever in the warmup.
        for steps, gathers in ((1, False), (3, True)):
            state = {x.removesuffix(".weight") for x in WEIGHTS}, gathers
            theirs = converted_by_torchao(theirs, state, layout)
            theirs.run(steps, ahead=True)
        found[layout] = {
            "gathered": gathered(training.model) == WEIGHTS,
            "losses": training.losses[1:] == theirs.losses,
            "weights": all(map(torch.equal, training.weights, theirs.weights)),
            "exp_avg": all(map(torch.equal, training.exp_avg, theirs.exp_avg)),
            **checkpoints(training, f"{folder}/{layout}", layout),
        }
    return found


@pytest.mark.dist
def test_tensor_parallel_and_hybrid_models_train_and_load_as_torchaos(
    ranks: Ranks, tmp_path: Path
) -> None:
    for answer in ranks(4, in_other_layouts, str(tmp_path)).values():
        assert isinstance(answer, dict), answer
        for layout, equal in answer.items():
            assert all(equal.values()), (layout, equal)


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
        left, converted, trains = answer["watched"]
        assert left == [f"{x}.weight" for x in converted]
        assert trains
        assert "0.up" not in converted
        assert "0.down" in converted


def unevenly() -> object:
    """64, 32 and 16 rows on three ranks, asked for and not."""
    asked = tuned(sharded(two_blocks()), float8_all_gather=True)
    plain = tuned(sharded(two_blocks()), float8_all_gather=False)
    for auto in (asked, plain):
        Training(auto).run(3)
    gathering = asked.tuner._pipeline.conversions.gathering
    found: dict[str, object] = {
        "converted": len(asked.plan.converted_fqns),
        "gathered": gathered(asked),
        "reasons": sorted(set(gathering.refusals(asked.tuner.converted))),
    }
    weights = [Training(auto).weights for auto in (asked, plain)]
    found["same"] = all(map(torch.equal, *weights))
    theirs = sharded(convert_to_float8_training(two_blocks(), config=GATHERS))
    params = [x._param for x in sharded_weights(theirs).values()]
    # What torchao's own route gathers: nobody takes unlike sizes.
    found["theirs"] = [x.all_gather_inputs[0].numel() for x in params]
    return found


@pytest.mark.dist
def test_uneven_shards_are_gathered_in_high_precision_and_it_is_said(
    ranks: Ranks,
) -> None:
    answers = ranks(3, unevenly)
    ending = "make out_features a multiple of 3"
    for answer in answers.values():
        assert isinstance(answer, dict), answer
        assert answer["converted"] == 5
        assert answer["gathered"] == []
        assert answer["same"]
        assert [x.split()[1] for x in answer["reasons"]] == ["16", "32", "64"]
        assert all(x.endswith(ending) for x in answer["reasons"])
    # If torchao pads some day, the refusal can go.
    assert answers[0]["theirs"] == answers[1]["theirs"] != answers[2]["theirs"]


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


def step_by_step() -> dict[str, object]:
    """A trial's steps, each also made by a model of torchao's own route."""
    script = gather_saves
    tuned_training = Training(
        tuned(sharded(two_blocks()), steps=script, trial_steps=60)
    )
    theirs = Training(sharded(two_blocks()))
    states: set[tuple[bool, int]] = set()
    unlike: list[tuple[int, set[str], bool]] = []
    for i in range(MIRRORED):
        tuned_training.run(1)
        model = tuned_training.model
        names = {x for x, y in model.named_modules() if isinstance(y, Float8Linear)}
        gathers = bool(gathered(model))
        states.add((gathers, len(names)))
        theirs = converted_by_torchao(theirs, (names, gathers))
        theirs.run(1)
        same = tuned_training.losses == theirs.losses
        for name in ("weights", "exp_avg"):
            pair = getattr(tuned_training, name), getattr(theirs, name)
            same = same and all(map(torch.equal, *pair))
        tuned_training.losses.clear()
        if not same:
            unlike.append((i, names, gathers))
    return {"unlike": unlike, "gathered": {x for x, _ in states}, "plans": len(states)}


# Steps of the trial that are made twice.
MIRRORED = 14


def by_trial(folder: str) -> object:
    found: dict[str, object] = {"step by step": step_by_step()}
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
        mirrored = answer["step by step"]
        assert mirrored["unlike"] == []
        assert mirrored["gathered"] == {False, True}
        assert mirrored["plans"] > 2
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
