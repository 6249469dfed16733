"""What would be uploaded: the archives, and an installed wheel without a checkout.

The environment that the wheel is installed into has its own site-packages, empty but for
the wheel. What the wheel depends on is read from the environment of the tests by a .pth
file, since downloading torch again would take minutes; that nothing but fp8tune's own
files comes from the wheel, and none from the checkout, is asserted.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import fp8tune

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def run(*arguments, cwd):
    return subprocess.run(  # noqa: S603 - what a release consists of
        [str(x) for x in arguments],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The archives, built from a copy, in which no earlier build has left anything."""
    pytest.importorskip("build", reason="needs pip install build")
    source, folder = (tmp_path_factory.mktemp(x) for x in ("source", "dist"))
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fp8tune", source / "fp8tune", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Without isolation, which would download setuptools.
    command = (
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        folder,
        source,
    )
    made = run(*command, cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


def test_twine_finds_nothing(dist):
    pytest.importorskip("twine", reason="needs pip install twine")
    command = (sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())
    checked = run(*command, cwd=dist)
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.count("PASSED") == 2


def test_the_wheel_holds_what_the_package_is_made_of(wheel):
    there = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "fp8tune"
    files = [x for x in package.rglob("*") if x.is_file() and x.suffix != ".pyc"]
    assert {str(x.relative_to(ROOT)) for x in files} - there == set()
    assert "fp8tune/py.typed" in there
    assert "fp8tune/report/templates/page.js" in there
    assert {x for x in there if not x.startswith(("fp8tune/", "fp8tune-"))} == set()


def test_the_metadata_is_complete(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [x for x in archive.namelist() if x.endswith("METADATA")]
    metadata = message_from_bytes(archive.read(name))
    assert metadata["Name"] == "fp8tune"
    assert metadata["Version"] == fp8tune.__version__
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Requires-Python"] == ">=3.11"
    extras = {"accelerate", "docs", "lightning", "plot", "torchtitan", "transformers"}
    assert extras <= set(metadata.get_all("Provides-Extra"))


def test_the_source_archive_builds_and_has_the_licence(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {x.partition("/")[2] for x in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert "fp8tune/report/templates/run.html" in names


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Python of an environment with the wheel, in a folder without a checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    options = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    done = run(*pip, "install", *options, wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # Behind the environment's own; .pth files in it, as of the checkout, are not read.
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_command_of_the_wheel_says_its_version(installed):
    command = installed.with_name("fp8tune")
    said = run(command, "--version", cwd=installed.parents[2])
    assert said.stdout == f"fp8tune {fp8tune.__version__}\n"


def test_the_example_of_the_readme_runs_from_the_wheel(installed):
    folder = installed.parents[2]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"^```python\n(.*?)^```$", text, re.M | re.S)[1]
    where = "import fp8tune; print(fp8tune.__file__)\n"
    pages = 'auto.report().to_html("report.html")\n'
    (folder / "example.py").write_text(example + where + pages)
    done = run(installed, "example.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Linears to bf16" in done.stdout
    assert str(folder / "venv") in done.stdout.splitlines()[-1]
    assert "Linears to bf16" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_changelog_has_the_version_and_a_date():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.search(r"^## \[(\S+)\] - (\S+)$", text, re.M).groups()
    assert version == fp8tune.__version__
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", date)
