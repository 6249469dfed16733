"""The short programs of docs/integrations.md, run against the packages themselves."""

from __future__ import annotations

import gc
import re
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torchao.float8.float8_linear import Float8Linear

from tests.helpers import widening

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fp8tune import Plan

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("with_*.py"))


def in_the_docs() -> dict[str, str]:
    text = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    blocks = re.findall(
        r"`examples/(\w+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL
    )
    return dict(blocks)


@pytest.mark.parametrize("name", EXAMPLES)
def test_docs_and_examples_are_the_same(name: str) -> None:
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    assert in_the_docs()[name] == text
    assert len(text.splitlines()) <= 25


def test_the_docs_show_no_other_program() -> None:
    assert sorted(in_the_docs()) == EXAMPLES


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scripted_clock: type
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Runs an example in an empty folder, with a clock that has made up its mind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "fp8tune.timing.clocks.CpuClock", lambda *_: scripted_clock(widening)
    )

    def run_example(name: str) -> dict[str, Any]:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        return runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")

    yield run_example
    AcceleratorState._reset_state(reset_partial_state=True)
    # Loops of references hold the trainers' data loaders until here.
    gc.collect()


def assert_follows(model: nn.Module, plan: Plan) -> None:
    """The model's float8 layers are the plan's; there are some, and some that are not."""
    found = [x for x, y in model.named_modules() if isinstance(y, Float8Linear)]
    assert found == plan.converted_fqns
    assert plan.converted_fqns
    assert plan.reference_fqns


def test_torchao(run: Callable[[str], dict[str, Any]]) -> None:
    names = run("with_torchao.py")
    assert_follows(names["bare"], names["plan"])
    assert_follows(names["model"], names["plan"])
    assert names["model"][0].weight.grad is not None


def test_accelerate(run: Callable[[str], dict[str, Any]]) -> None:
    names = run("with_accelerate.py")
    plan = names["plan"]
    assert_follows(names["accelerator"].unwrap_model(names["model"]), plan)
    names = run("with_accelerate_fp8.py")
    assert names["plan"] == plan
    assert_follows(names["accelerator"].unwrap_model(names["model"]), plan)


def test_transformers(run: Callable[[str], dict[str, Any]]) -> None:
    names = run("with_transformers.py")
    plan = names["callback"].plan
    assert_follows(names["model"], plan)
    assert plan.converted_fqns == [
        f"model.layers.{i}.mlp.{role}_proj" for i in (0, 1) for role in ("gate", "up")
    ]


def test_lightning(run: Callable[[str], dict[str, Any]]) -> None:
    names = run("with_lightning.py")
    callback = names["callback"]
    assert_follows(callback.auto.module, callback.plan)
    assert callback.plan.converted_fqns == ["0"]


def test_fabric(run: Callable[[str], dict[str, Any]]) -> None:
    names = run("with_fabric.py")
    assert_follows(names["bare"], names["plan"])
    assert_follows(names["again"], names["plan"])
    assert torch.equal(names["again"][0].weight, names["bare"][0].weight)
