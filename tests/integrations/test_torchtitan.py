"""torchtitan 0.3: tune in its Trainer in run 1, convert by the plan in run 2."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fp8tune import ConfigError, ExportError, Plan, PlanMismatchError, TuneConfig
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Decision, Verdict
from fp8tune.integrations.torchtitan import plan_converter, profiled
from fp8tune.model.linears import normalize_fqn
from fp8tune.plan.export import export_lines
from tests.conftest import ScriptedClock
from tests.helpers import all_faster

if TYPE_CHECKING:
    from collections.abc import Iterator

# torchtitan needs triton, which is for Linux only.
titan = pytest.importorskip("torchtitan.models.llama3", exc_type=ImportError)
quantization = pytest.importorskip("torchtitan.components.quantization")

SCRIPT = "tests.integrations.torchtitan_on_cpu"
CONVERTED = ("feed_forward.w1", "feed_forward.w3", "attention.qkv_linear.wqkv")


@pytest.fixture(autouse=True)
def _inductor_as_before() -> Iterator[None]:
    """torchtitan's rowwise converter sets this for the whole process."""
    before = torch._inductor.config.emulate_precision_casts
    yield
    torch._inductor.config.emulate_precision_casts = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both runs of the example left their results."""
    path = tmp_path_factory.mktemp("torchtitan")
    run = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, "-m", SCRIPT, str(path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return path


def names_of(step: dict[str, str], kind: str) -> list[str]:
    return [normalize_fqn(x) for x, found in step.items() if found == kind]


@pytest.mark.slow
@pytest.mark.dist
def test_run_1_tunes_in_torchtitans_trainer(folder: Path) -> None:
    plan = Plan.load(folder / "plan.json")
    steps = json.loads((folder / "runs.json").read_text())["profile"]
    assert [x.fqn for x in plan.decisions] == linear_names(2)
    timed = [x for x in plan.decisions if x.signatures]
    assert plan.converted_fqns == [x.fqn for x in timed if x.n > x.k]
    assert {x.split(".", 2)[-1] for x in plan.converted_fqns} == set(CONVERTED)
    assert plan["lm_head"].verdict is Verdict.REFERENCE
    assert {x.shape.m for x, _ in plan["layers.0.feed_forward.w1"].signatures} == {64}
    assert plan.timing.startswith("compiled")
    # All candidates run in float8 while they are watched, the plan's from then on.
    assert names_of(steps[0], "Float8Linear") == [x.fqn for x in timed]
    assert names_of(steps[-1], "Float8Linear") == plan.converted_fqns


@pytest.mark.slow
@pytest.mark.dist
def test_run_2_trains_the_plans_layers_in_float8(folder: Path) -> None:
    plan = Plan.load(folder / "plan.json")
    steps = json.loads((folder / "runs.json").read_text())["replay"]
    for step in steps:
        assert names_of(step, "Float8Linear") == plan.converted_fqns
        assert len(step) == len(plan.decisions)


def linear_names(layers: int) -> list[str]:
    roles = [
        "attention.qkv_linear.wqkv",
        "attention.wo",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    ]
    return [f"layers.{i}.{role}" for i in range(layers) for role in roles] + ["lm_head"]


def configs() -> dict[str, Any]:
    model = titan.model_registry("debugmodel").model
    found = {fqn: x for fqn, x, *_ in model.traverse(titan.Linear.Config)}
    # The config has lm_head first, the model that it builds has it last.
    head = {"lm_head": found.pop("lm_head")}
    return found | head


def plan_for(*endings: str, recipe: str = "rowwise") -> Plan:
    decisions = [
        Decision(x, y.in_features, y.out_features, Verdict.CONVERTED, Reason.FASTER)
        if x.endswith(endings)
        else Decision(
            x, y.in_features, y.out_features, Verdict.REFERENCE, Reason.SLOWER
        )
        for x, y in configs().items()
    ]
    return Plan(tuple(decisions), recipe, "bfloat16", True, "eager", ())


def float8_names(converter: Any) -> list[str]:
    spec = titan.model_registry("debugmodel", converters=[converter])
    with torch.device("meta"):
        model = spec.model.build()
    model.verify_module_protocol()
    return [
        x for x, y in model.named_modules() if isinstance(y, quantization.Float8Linear)
    ]


def test_configs_are_named_as_the_modules_that_they_build() -> None:
    with torch.device("meta"):
        model = titan.model_registry("debugmodel").model.build()
    modules = [x for x, y in model.named_modules() if isinstance(y, nn.Linear)]
    assert list(configs()) == modules == linear_names(6)


@pytest.mark.parametrize("endings", [CONVERTED, ("w2", "lm_head"), ("layers.1.wo",)])
def test_the_converter_converts_the_plans_layers(endings: tuple[str, ...]) -> None:
    plan = plan_for(*endings)
    assert float8_names(plan_converter(plan)) == plan.converted_fqns


def test_the_converter_is_torchtitans_and_comes_before_lora() -> None:
    converter = plan_converter(plan_for("w1"))
    assert isinstance(converter, quantization.Float8LinearConverter.Config)
    built = converter.build()
    assert built.torchao_config.pad_inner_dim
    assert (
        built.torchao_config.cast_config_input.scaling_granularity.value == "axiswise"
    )


@pytest.mark.parametrize("endings", [CONVERTED, ("lm_head", "wo")])
def test_the_exported_text_is_torchtitans_own_converter(
    endings: tuple[str, ...],
) -> None:
    plan = plan_for(*endings)
    lines = export_lines(plan, "torchtitan")
    converter = eval("\n".join(lines[1:]), vars(quantization))  # noqa: S307 - what is pasted
    converter.emulate = True  # without which torchtitan refuses a CPU
    assert isinstance(converter, quantization.Float8LinearConverter.Config)
    assert float8_names(converter) == plan.converted_fqns


def test_a_plan_for_another_model_is_refused() -> None:
    plan = plan_for("w1")
    fewer = titan.model_registry("debugmodel").model
    fewer.layers = fewer.layers[:1]
    with pytest.raises(
        PlanMismatchError, match=r"converts 'layers\.1\.feed_forward\.w1'"
    ):
        plan_converter(plan).build().convert(fewer)


def test_a_recipe_that_is_not_torchaos_is_refused() -> None:
    with pytest.raises(
        ExportError, match=r"recipe 'bf16', which torchao does not know"
    ):
        plan_converter(plan_for("w1", recipe="bf16"))


def test_a_spec_is_profiled_once_after_what_it_does_already() -> None:
    seen: list[str] = []
    spec = titan.model_registry("debugmodel")
    spec.post_optimizer_build_fn = lambda *_: seen.append("own")
    tuned = profiled(spec, "plan.json")
    parts = [nn.Linear(16, 16), nn.Linear(16, 16)]
    with pytest.raises(ConfigError, match="without pipeline parallelism"):
        tuned.post_optimizer_build_fn(None, parts, SimpleNamespace(pp_enabled=True))
    assert seen == ["own"]


def test_a_run_that_is_too_short_says_that_there_is_no_plan(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = profiled(titan.model_registry("debugmodel"), tmp_path / "plan.json")
    model = nn.Sequential(nn.Linear(4096, 4096))
    tuned.post_optimizer_build_fn(None, [model], SimpleNamespace(pp_enabled=False))
    model(torch.randn(16, 4096)).sum().backward()
    del model
    gc.collect()
    said = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert any("of 3 warmup steps were seen, nothing was measured" in x for x in said)
    assert f"no plan was written to {tmp_path / 'plan.json'}" in said[-1] + said[0]


def test_a_plan_that_cannot_be_written_there_is_elsewhere_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = profiled(
        titan.model_registry("debugmodel"),
        tmp_path / "none" / "plan.json",
        recipe="bf16",
        warmup_steps=1,
        clock=ScriptedClock(all_faster),
        config=TuneConfig(static_filter="divisible", trial_steps=0),
    )
    model = nn.Sequential(nn.Linear(32, 32))
    tuned.post_optimizer_build_fn(None, [model], SimpleNamespace(pp_enabled=False))
    for _ in range(2):
        model(torch.randn(16, 32)).sum().backward()
    (said,) = [x.getMessage() for x in caplog.records if "cannot be written" in x.msg]
    elsewhere = Path(said.rsplit(" instead", 1)[0].rsplit(" in ", 1)[1])
    assert Plan.load(elsewhere).converted_fqns == ["0"]
    shutil.rmtree(elsewhere.parent)
