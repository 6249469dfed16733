"""Accuracy is watched while training goes on, and layers that lose it go back."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fp8tune import AutoFloat8, Plan, StaticFilter, TuneConfig
from fp8tune.commands.cli import main
from fp8tune.decision.reasons import Reason
from fp8tune.errors import ConfigError
from tests.helpers import TwiceAsFast, graph_texts, hooks_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Ranks


class Drifting(nn.Module):
    """Two layers; `drift` puts outliers of 1e4 where `first` has no weights, or has."""

    answers = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(64)
        self.drop = nn.Dropout(0.1)
        self.second = nn.Linear(64, 64)
        if not self.answers:
            with torch.no_grad():
                self.first.weight[:, 0] = 0
        self.drift = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.drift:
            x = torch.cat([torch.full_like(x[:, :1], 1e4), x[:, 1:]], 1)
        h = self.drop(self.norm(self.first(x)))
        return self.second(F.relu(h))


class Training:
    """Steps of a model on batches whose numbers are about 0.01."""

    def __init__(self, model: nn.Module, lr: float = 0.0) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        self.generator = torch.Generator().manual_seed(1)

    def run(
        self,
        steps: int,
        micro_batches: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        for _ in range(steps):
            for _ in range(micro_batches):
                x = 0.01 * torch.randn(32, 64, generator=self.generator)
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss = self.model(x).square().mean()
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def watching(model: nn.Module, **kwargs: Any) -> AutoFloat8:
    settings = {"min_sqnr_db": None, "watch_every": 0} | kwargs.pop("settings", {})
    return AutoFloat8(
        model,
        recipe=kwargs.pop("recipe", "tensorwise"),
        warmup_steps=1,
        clock=TwiceAsFast(),
        config=TuneConfig(
            static_filter=StaticFilter.DIVISIBLE,
            timing="eager",
            trial_steps=0,
            **settings,
        ),
        **kwargs,
    )


WATCH = {"min_sqnr_db": 15, "watch_every": 20, "on_quality": "revert"}


def drifted(steps: int = 50, more: int = 11, **kwargs: Any) -> AutoFloat8:
    """Trained so many steps, and then more of them with outliers."""
    settings = WATCH | kwargs.pop("settings", {})
    auto = watching(Drifting(), settings=settings, **kwargs)
    training = Training(auto)
    training.run(steps)
    auto.module.drift = True
    training.run(more)
    return auto


def test_a_layer_whose_input_drifts_is_reverted_at_the_next_check(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    auto = drifted(more=10)
    assert auto.plan.converted_fqns == ["first", "second"]
    auto = drifted(more=15)
    assert auto.plan.converted_fqns == ["second"]
    assert type(auto.module.first) is nn.Linear
    decision = auto.plan["first"]
    assert decision.reason is Reason.ACCURACY_FELL
    assert decision.sqnr_db < 15
    assert "60 steps after the freeze" in decision.detail
    warned = [x.message for x in caplog.records if x.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "first" in warned[0]
    assert "60 steps after the freeze" in warned[0]
    assert "accuracy fell" in str(auto.report())
    auto.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == auto.plan


class Answering(Drifting):
    """The outliers are nearly all of what `first` computes, and hide what is lost."""

    answers = True


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_outliers_that_hide_the_others_in_the_sums_are_seen(recipe: str) -> None:
    settings = WATCH | {"watch_every": 2}
    auto = watching(Answering(), settings=settings, recipe=recipe)
    training = Training(auto)
    training.run(4)
    auto.module.drift = True
    training.run(3)
    assert auto.plan.converted_fqns == ["second"]
    assert auto.plan["first"].reason is Reason.ACCURACY_FELL


def test_warn_only_says_so(caplog: pytest.LogCaptureFixture) -> None:
    auto = drifted(more=15, settings={"on_quality": "warn"})
    assert auto.plan.converted_fqns == ["first", "second"]
    assert auto.plan["first"].sqnr_db < 15
    assert "on_quality='revert' would take them back" in caplog.text


def again(cache: str, **settings: Any) -> AutoFloat8:
    """A later run with the cache, frozen."""
    auto = watching(Drifting(), settings=WATCH | settings, cache=cache)
    Training(auto).run(2)
    assert auto.frozen
    return auto


@pytest.mark.parametrize("kind", ["file", "store"])
def test_a_later_run_begins_with_the_layer_in_high_precision(
    kind: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "cache.json"
    cache = str(path) if kind == "file" else (tmp_path / "store").as_uri()
    first = drifted(3, 4, settings={"watch_every": 2}, cache=cache)
    caplog.set_level(logging.INFO, "fp8tune")
    later = again(cache)
    assert later.plan == first.plan
    assert type(later.module.first) is nn.Linear
    assert "the accuracy of first fell in an earlier run" in caplog.text
    # One that allows less converts it; without a threshold that of the first run counts.
    assert "first" in again(cache, min_sqnr_db=-150).plan.converted_fqns
    unwatched = again(cache, min_sqnr_db=None, watch_every=0)
    assert unwatched.plan.converted_fqns == ["second"]
    later.retune()
    Training(later).run(2)
    assert later.plan.converted_fqns == ["first", "second"]
    assert "first" in again(cache).plan.converted_fqns


def test_what_was_only_warned_of_stays_converted_in_a_later_run(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache.json")
    settings = {"watch_every": 2, "on_quality": "warn"}
    first = drifted(3, 4, settings=settings, cache=cache)
    later = again(cache, on_quality="warn")
    assert later.plan == first.plan
    assert later.plan.converted_fqns == ["first", "second"]
    assert "below min_sqnr_db=15" in later.plan["first"].detail


@pytest.mark.parametrize("on_quality", ["revert", "warn"])
def test_show_and_explain_tell_what_fell(
    on_quality: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache.json")
    settings = {"watch_every": 2, "on_quality": on_quality}
    sqnr_db = drifted(3, 2, settings=settings, cache=cache).plan["first"].sqnr_db
    found = (
        f"2 steps after the freeze a check found an SQNR of {sqnr_db:.1f} dB, below "
        "min_sqnr_db=15"
    )
    assert main(["show", cache]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"first: {found}" in shown
    assert ("accuracy fell" in shown) is (on_quality == "revert")
    assert main(["explain", cache, "first"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"While it trained, {found}." in told
    ending = {
        "revert": "went back to high precision, and later runs with this cache begin so",
        "warn": "stayed converted, since on_quality was 'warn'",
    }
    assert f"It {ending[on_quality]}." in told
    assert main(["explain", cache, "second", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fallen"] is None
    for command in (["show", cache], ["explain", cache, "first"]):
        assert main([*command, "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        schema = Path(__file__).parents[2] / "docs" / "schema" / f"{command[0]}.json"
        jsonschema.validate(data, json.loads(schema.read_text()))


def test_what_stays_accurate_stays_converted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    auto = watching(Drifting(), settings=WATCH)
    Training(auto).run(45)
    assert auto.plan.converted_fqns == ["first", "second"]
    assert caplog.text.count("2 layers, the lowest SQNR is") == 2
    assert not [x for x in caplog.records if x.levelno == logging.WARNING]


class Checkpointed(Drifting):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("compile", "kind", "dtype"),
    [
        (False, Drifting, torch.bfloat16),
        (False, Checkpointed, None),
        (True, Drifting, None),
        (True, Checkpointed, torch.bfloat16),
    ],
)
def test_training_is_the_same_as_without_the_watch(
    compile: bool, kind: type[nn.Module], dtype: torch.dtype | None
) -> None:
    """Weights, running statistics and random numbers; autocast's cache too."""

    def train(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
        torch._dynamo.reset()
        backend = {"backend": "aot_eager"} if compile else False
        # One layer stays plain, whose weight autocast casts and keeps.
        plain = ["second"] if dtype else []
        auto = watching(kind(), settings=settings, compile=backend, filter_fqns=plain)
        training = Training(auto, lr=0.1)
        training.run(8, micro_batches=2, dtype=dtype)
        return {**auto.state_dict(), "random": torch.rand(4)}

    plain = train({})
    watched = train(WATCH | {"watch_every": 2, "min_sqnr_db": -100})
    assert plain.keys() == watched.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, watched[name]), (name, tensor, watched[name])


def test_a_compiled_model_is_compiled_once_more_for_a_revert(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also where Dynamo's limit is reached."""
    made: list[AutoFloat8] = []

    def run(backend: Callable[..., object]) -> None:
        options = {"backend": backend, "fullgraph": True}
        auto = watching(Drifting(), settings=WATCH, compile=options)
        made.append(auto)
        training = Training(auto)
        training.run(19)
        auto.module.drift = True
        training.run(11)

    with torch._dynamo.config.patch(recompile_limit=2):
        texts = graph_texts(run)
    assert made[0].plan.converted_fqns == ["second"]
    assert len(texts) == 3  # plain, with outliers, and after the revert
    assert "compiled once more" in caplog.text


def test_layers_inside_of_compiled_parts_are_seen() -> None:
    def compile_parts(model: nn.Module) -> None:
        for child in model.children():
            child.compile(backend="eager")

    torch._dynamo.reset()
    auto = drifted(3, 4, settings={"watch_every": 2}, compile=compile_parts)
    assert auto.plan.converted_fqns == ["second"]


def test_off_leaves_nothing_and_on_leaves_the_graph_as_it_is() -> None:
    def graphs(settings: dict[str, Any]) -> tuple[list[str], AutoFloat8]:
        made: list[AutoFloat8] = []

        def run(backend: Callable[..., object]) -> None:
            options = {"backend": backend, "fullgraph": True}
            auto = watching(Drifting(), settings=settings, compile=options)
            Training(auto).run(12)
            made.append(auto)

        return graph_texts(run), made[0]

    off, auto = graphs({})
    assert not hooks_of(auto.module)
    assert "forward" not in vars(auto.module)
    assert off == graphs(WATCH | {"watch_every": 2})[0]
    assert len(off) == 1


def test_a_forward_that_cannot_be_repeated_ends_the_watch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, batches: Any) -> torch.Tensor:
            return self.layer(next(batches))

    auto = watching(Once(), settings=WATCH | {"watch_every": 2})
    optimizer = torch.optim.SGD(auto.parameters(), lr=0.0)
    for _ in range(8):
        auto(iter([torch.randn(16, 64)])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert caplog.text.count("it takes an iterator") == 1
    assert auto.plan.converted_fqns == ["layer"]


def test_a_model_that_is_compiled_from_outside_is_said_to_be_unseen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch._dynamo.reset()
    auto = watching(Drifting(), settings=WATCH | {"watch_every": 2})
    Training(auto).run(2)
    compiled = torch.compile(auto.module, backend="eager", fullgraph=True)
    Training(compiled).run(12)
    assert "without a call of the model that could be watched" in caplog.text


def test_abandon_and_copies_leave_no_watch() -> None:
    auto = watching(Drifting(), settings=WATCH)
    Training(auto).run(3)
    twin = copy.deepcopy(auto)
    assert "forward" not in vars(twin.module)
    assert twin.plan == auto.plan
    auto.abandon()
    assert "forward" not in vars(auto.module)
    assert not hooks_of(auto.module)


def test_a_watch_needs_something_to_watch_for() -> None:
    with pytest.raises(ConfigError, match="set min_sqnr_db to the least SQNR"):
        TuneConfig(watch_every=100)


@pytest.mark.parametrize("every", [-1, 0.5, True])
def test_steps_between_checks_are_counted(every: object) -> None:
    with pytest.raises(ConfigError, match="watch_every is"):
        TuneConfig(watch_every=every, min_sqnr_db=20)


def one_rank_drifts() -> object:
    auto = watching(Drifting(), settings=WATCH | {"watch_every": 4})
    model = nn.parallel.DistributedDataParallel(auto)
    training = Training(model)
    training.run(6)
    auto.module.drift = dist.get_rank() == 1
    training.run(5)
    return auto.plan.converted_fqns, auto.plan["first"].detail, weights_under_fsdp()


def weights_under_fsdp() -> bool:
    """Whether a watched model that is sharded ends with the weights of one that is not watched."""

    def train(settings: dict[str, Any]) -> list[torch.Tensor]:
        model = Drifting()
        mesh = init_device_mesh("cpu", (2,))
        for module in (model.first, model.second, model):
            fully_shard(module, mesh=mesh)
        Training(watching(model, settings=settings), lr=0.1).run(6)
        return [x.full_tensor() for x in model.parameters()]

    watched = train(WATCH | {"watch_every": 2, "min_sqnr_db": -100})
    return all(map(torch.equal, train({}), watched))


@pytest.mark.dist
def test_what_drifts_on_one_rank_goes_back_on_both(ranks: Ranks) -> None:
    """And an additional forward under FSDP2 changes nothing."""
    answers = ranks(2, one_rank_drifts)
    assert answers[0] == answers[1]
    converted, detail, same = answers[0]
    assert converted == ["second"]
    assert "4 steps after the freeze" in detail
    assert same
