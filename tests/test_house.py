"""The layout of the package: few files at the top, and arrows that only lead down."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fp8tune"
MOST_FILES = 8


def lint(folder):
    """Run import-linter on the package in a folder; returns its exit code and words."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run = subprocess.run(  # noqa: S603 - the linter of the test extra
        [sys.executable, "-c", code, "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stdout + run.stderr


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fp8tune")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_top_has_rooms_and_few_files():
    files = [x for x in PACKAGE.iterdir() if x.is_file()]
    assert len(files) <= MOST_FILES


def test_every_room_says_what_lives_there():
    rooms = [x for x in PACKAGE.iterdir() if x.is_dir() and x.name != "__pycache__"]
    assert all((x / "__init__.py").read_text().startswith('"""') for x in rooms)
    assert len(rooms) > 10


def test_the_rules_hold(copy):
    code, words = lint(copy)
    assert code == 0, words
    assert "Contracts: 4 kept, 0 broken." in words


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("decision/judge.py", "from fp8tune.store import codec", "A room imports"),
        ("model/screen.py", "from fp8tune.recipes import recipe", "A room imports"),
        ("decision/judge.py", "import torch", "Deciding needs no torch BROKEN"),
        ("timing/memory.py", "import torchao", "Only recipes import torchao BROKEN"),
        ("plan/cover.py", "from fp8tune.plan import plan", "No circles BROKEN"),
    ],
)
def test_an_upward_import_is_refused_be_it_for_types_only(copy, module, line, broken):
    path = copy / "fp8tune" / module
    guarded = f"\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {line}\n"
    path.write_text(path.read_text() + guarded)
    code, words = lint(copy)
    assert code == 1
    assert broken in words
