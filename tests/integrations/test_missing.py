"""An optional package that is not installed: one line that says what to install."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fp8tune import MissingPackageError
from fp8tune.integrations import needs
from fp8tune.plan.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGES = ("accelerate", "lightning", "torchtitan", "transformers")
PLAN = Plan((), "rowwise", "bfloat16", True, "eager", ())


def use(package: str) -> None:
    module = importlib.import_module(f"fp8tune.integrations.{package}")
    uses: dict[str, Callable[[], object]] = {
        "accelerate": lambda: module.ao_recipe_kwargs(PLAN),
        "torchtitan": lambda: module.plan_converter(PLAN),
    }
    uses.get(package, object)()


@pytest.mark.parametrize("package", PACKAGES)
def test_what_to_install_is_said_in_one_line(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [x for x in sys.modules if x.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"fp8tune.integrations.{package}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingPackageError,
        match=rf"^fp8tune\.integrations\.{package} needs the package '{package}', which "
        rf"is not installed; run: pip install 'fp8tune\[{package}\]'$",
    ) as raised:
        use(package)
    assert isinstance(raised.value, ImportError)
    assert "\n" not in str(raised.value)
    monkeypatch.delitem(sys.modules, f"fp8tune.integrations.{package}", raising=False)


def test_a_package_may_lack_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with (
        pytest.raises(
            MissingPackageError,
            match=r"torchtitan needs the package 'triton', .* triton$",
        ),
        needs("torchtitan"),
    ):
        importlib.import_module("triton")


def test_no_package_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, fp8tune.integrations.accelerate, fp8tune.integrations.torchtitan; "
        f"print([x for x in {PACKAGES} if x in sys.modules])"
    )
    run = subprocess.run(  # noqa: S603 - runs the few lines above
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
