"""What Inductor asks of a CPU is answered ahead, by what torch knows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fp8tune.compiling.vector_isa import listed_by_cpu
from tests.helpers import TORCH_2_11

ROOT = Path(__file__).parents[2]

# In a process of its own, whose Inductor has asked nothing yet.
_COUNT_PROCESSES = """
import sys
import torch
from fp8tune.compiling.vector_isa import prepare_inductor

started = []
sys.addaudithook(lambda name, _: name == "subprocess.Popen" and started.append(name))
if sys.argv[1] == "prepared":
    prepare_inductor({}, torch.device("cpu"))
ahead = len(started)
from torch._inductor.cpu_vec_isa import valid_vec_isa_list
usable = valid_vec_isa_list()
prepare_inductor({}, torch.device("cpu"))
print(ahead, len(started), *("+".join(str(x).split()) for x in usable))
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
@pytest.mark.slow
def test_inductor_has_the_sets_that_it_would_have_found(tmp_path: Path) -> None:
    ahead, at_all, *granted = output_of(_COUNT_PROCESSES, "prepared", cache=tmp_path)
    assert ahead == at_all  # Inductor itself asks no more
    _, one_by_one, *tried = output_of(_COUNT_PROCESSES, "not", cache=tmp_path)
    assert granted == tried != []
    assert int(one_by_one) > int(at_all)


_LOADED_IN = """
import sys
import torch
from fp8tune.compiling.vector_isa import prepare_inductor

started = []
sys.addaudithook(lambda name, x: name == "subprocess.Popen" and started.append(x[0]))
prepare_inductor({}, torch.device("cpu"))
from torch._inductor.cpu_vec_isa import VecISA
print(started.count(sys.executable), VecISA._probe_load.__name__)
"""


@needs_x86
@pytest.mark.skipif(TORCH_2_11, reason="torch 2.11 loads where it builds")
def test_what_was_built_is_not_loaded_in_another_process(tmp_path: Path) -> None:
    """And Inductor's own question is put back."""
    assert output_of(_LOADED_IN, cache=tmp_path) == ["0", "_probe_load"]


_LIST_AHEAD = """
import torch
from fp8tune.compiling.vector_isa import prepare_inductor
from torch._inductor.cpu_vec_isa import valid_vec_isa_list

prepare_inductor({}, torch.device("cpu"))
print(valid_vec_isa_list.cache_info().currsize)
"""


@needs_x86
@pytest.mark.parametrize(
    ("variables", "listed"),
    [
        ({}, "1"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "0"),
        ({"TORCHINDUCTOR_VEC_ISA_OK": "0"}, "0"),
    ],
)
def test_nothing_is_taken_for_granted_that_torch_or_the_user_denies(
    variables: dict[str, str], listed: str, tmp_path: Path
) -> None:
    assert output_of(_LIST_AHEAD, cache=tmp_path, **variables) == [listed]


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
