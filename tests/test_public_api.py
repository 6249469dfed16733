"""The surface: what can be imported, what an import costs, what is documented."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fp8tune

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fp8tune.__path__, "fp8tune.")
    if not module.name.endswith("__main__")
)


def own_members(module):
    """(name, class or function) of what a module defines for others."""
    members = inspect.getmembers(
        module, lambda x: inspect.isclass(x) or inspect.isfunction(x)
    )
    return [
        (f"{module.__name__}.{name}", member)
        for name, member in members
        if member.__module__ == module.__name__ and not name.startswith("_")
    ]


def own_methods(name, kind):
    methods = [
        (f"{name}.{attribute}", inspect.unwrap(getattr(value, "__func__", value)))
        for attribute, value in vars(kind).items()
        if not attribute.startswith("_")
    ]
    return [
        (method, value)
        for method, value in methods
        if inspect.isfunction(value) or isinstance(value, property)
    ]


def documentable(module):
    """(name, object) of a module and everything public that it defines."""
    yield module.__name__, module
    for name, member in own_members(module):
        yield name, member
        if inspect.isclass(member):
            yield from own_methods(name, member)


def run_python(code):
    run = subprocess.run(  # noqa: S603 - runs the few lines of a test
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def test_names_are_sorted_and_listed_once():
    assert fp8tune.__all__ == sorted(set(fp8tune.__all__))


def test_every_name_has_a_home():
    assert set(fp8tune.__all__) == set(fp8tune._HOMES)


@pytest.mark.parametrize("name", fp8tune.__all__)
def test_every_name_can_be_imported(name):
    home = importlib.import_module(f"fp8tune.{fp8tune._HOMES[name]}")
    assert getattr(fp8tune, name) is getattr(home, name)
    assert name in home.__all__


def test_a_star_import_gives_every_name():
    namespace = {}
    exec("from fp8tune import *", namespace)  # noqa: S102 - the statement under test
    assert set(fp8tune.__all__) <= namespace.keys()


def test_an_unknown_name_is_said():
    with pytest.raises(AttributeError, match="'fp8tune' has no attribute 'AutoFloat9'"):
        fp8tune.AutoFloat9  # noqa: B018 - the access is what raises


def test_importing_loads_no_torch():
    assert run_python("import sys, fp8tune; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("name", ["TuneConfig", "Decision", "Verdict", "ConfigError"])
def test_names_that_need_no_torch_load_none(name):
    code = f"import sys; from fp8tune import {name}; print('torch' in sys.modules)"
    assert run_python(code) == "False"


def test_importing_leaves_logging_alone():
    code = (
        "import logging, fp8tune.auto; print(logging.getLogger('fp8tune').handlers, "
        "logging.getLogger('fp8tune').level)"
    )
    assert run_python(code) == "[] 0"


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_documented(name):
    module = importlib.import_module(name)
    bare = [what for what, x in documentable(module) if not (x.__doc__ or "").strip()]
    assert bare == []


@pytest.mark.parametrize("name", MODULES)
def test_what_a_module_exports_is_there(name):
    module = importlib.import_module(name)
    assert [x for x in getattr(module, "__all__", []) if not hasattr(module, x)] == []


def test_modules_stay_short():
    folder = Path(fp8tune.__file__).parent
    lengths = {x: len(x.read_text().splitlines()) for x in folder.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n >= 300} == {}


def test_types_are_offered_to_type_checkers():
    assert Path(fp8tune.__file__).with_name("py.typed").exists()
