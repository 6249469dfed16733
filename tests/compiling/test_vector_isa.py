"""What Inductor asks of a CPU is asked once, ahead, and side by side."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fp8tune.compiling.vector_isa import listed_by_cpu

ROOT = Path(__file__).parents[2]

# In a process of its own, whose Inductor has asked nothing yet.
_COUNT_PROCESSES = """
import sys
import torch
from fp8tune.compiling.vector_isa import listed_by_cpu, prepare_inductor

started = []
sys.addaudithook(lambda name, _: name == "subprocess.Popen" and started.append(name))
prepare_inductor({}, torch.device("cpu"))
ahead = len(started)
from torch._inductor.cpu_vec_isa import valid_vec_isa_list
usable = valid_vec_isa_list()
prepare_inductor({}, torch.device("cpu"))
print(ahead, len(started), len(listed_by_cpu()), len(usable))
"""

_SAY_IF_ASKED = """
import sys
import torch
from fp8tune.compiling.vector_isa import prepare_inductor

prepare_inductor({"backend": sys.argv[1]}, torch.device(sys.argv[2]))
print("torch._inductor.cpu_vec_isa" in sys.modules)
"""

needs_x86 = pytest.mark.skipif(
    not listed_by_cpu(), reason="Inductor has nothing to ask of this CPU"
)


def output_of(code: str, *arguments: str, cache: Path, **also: str) -> list[str]:
    variables = {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(cache), **also}
    found = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **variables},
        check=True,
        capture_output=True,
        text=True,
    )
    return found.stdout.split()


@needs_x86
def test_inductor_asks_no_more_of_the_cpu_once_it_is_prepared(tmp_path: Path) -> None:
    counts = map(int, output_of(_COUNT_PROCESSES, cache=tmp_path))
    ahead, at_all, listed, usable = counts
    assert ahead == at_all  # what Inductor asks itself is answered already
    assert ahead >= 2 * listed >= 2 * usable > 0  # each is built, and loaded


@needs_x86
def test_the_sets_that_the_cpu_lists_are_known() -> None:
    assert any("avx2" in str(x) for x in listed_by_cpu())


@pytest.mark.parametrize(
    ("backend", "device"), [("aot_eager", "cpu"), ("inductor", "meta")]
)
def test_nothing_is_asked_where_inductor_compiles_nothing_for_a_cpu(
    backend: str, device: str, tmp_path: Path
) -> None:
    assert output_of(_SAY_IF_ASKED, backend, device, cache=tmp_path) == ["False"]


_PREPARE_AND_COMPILE = """
import logging
import torch
from fp8tune.compiling.vector_isa import prepare_inductor

logging.getLogger("fp8tune").setLevel(logging.DEBUG)
logging.getLogger("fp8tune").addHandler(logging.StreamHandler())
prepare_inductor({}, torch.device("cpu"))
print("prepared")
try:
    torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
except Exception as error:
    print(type(error).__name__)
"""


@needs_x86
def test_without_a_compiler_it_is_inductor_that_says_so(tmp_path: Path) -> None:
    found = output_of(_PREPARE_AND_COMPILE, cache=tmp_path, CXX="no-such-compiler")
    assert found == ["prepared", "InductorError"]
