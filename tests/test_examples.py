"""The demo, run as its docstring says. No verdict is looked at: machines are busy."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
DEMO = str(ROOT / "examples" / "train_llama.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Threads that wait for each other are slow where other programs run too.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(*arguments: str, seconds: float = 150) -> subprocess.CompletedProcess[str]:
    """Python with these arguments."""
    return subprocess.run(  # noqa: S603
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        cwd=ROOT,
        env=ENVIRONMENT,
    )


def demo(*arguments: str) -> str:
    """What the demo prints on the CPU."""
    done = run(DEMO, "--device", "cpu", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(310)
def test_the_second_run_finds_the_plan_of_the_first(tmp_path: Path) -> None:
    options = ("--steps", "6", "--cache", str(tmp_path / "folder" / "cache.json"))
    first = demo(*options, "--no-compare")
    assert " of 29 Linears are candidates for bf16" in first
    assert "[4/4] M=128 K=1024 N=256, float32" in first
    assert "layers.{0..3}.feed_forward.w1" in first
    assert "step    6  loss" in first
    assert "tokens/s" not in first

    second = demo(*options, "--rounds", "3")
    # What a busy machine timed is not kept.
    unsteady = first.count("UNSTEADY")
    if unsteady:
        assert f"[1/{unsteady}]" in second
    else:
        assert "plan from the cache, nothing is timed" in second
        assert "[1/" not in second
    header, *rows = second.splitlines()[-4:]
    assert header.split() == ["training", "steps", "tokens/s", "ratio"]
    assert [row[:20].rstrip() for row in rows] == [
        "all float32",
        "all bf16",
        "fp8tune's plan",
    ]
    assert rows[0].endswith(" 1.00")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_float8_is_emulated_on_a_cpu_and_it_is_said(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache.json")
    # The plan freezes after the last of three steps.
    options = ("--recipe", "rowwise", "--steps", "3", "--cache", cache, "--no-compare")
    output = demo(*options)
    # Without instructions for bfloat16 the reference is slower than the emulation.
    kept = "0" if "bf16" in Path("/proc/cpuinfo").read_text() else r"\d+"
    assert re.search(rf"converted {kept} of 29 Linears to rowwise \(emulated\)", output)
    assert "rowwise is emulated here" in output


def test_a_typo_in_an_argument() -> None:
    done = run(DEMO, "--stpes", "6")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == "train_llama.py: error: unrecognized arguments: --stpes 6"
    assert done.stdout == ""


def test_a_recipe_that_nobody_knows() -> None:
    done = run(DEMO, "--recipe", "rowwize")
    assert done.returncode == 2
    assert done.stderr.count("rowwize") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.fixture
def heeded_ctrl_c() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored, children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_ctrl_c")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("line", ["candidates for bf16", "[1/4]"])
def test_ctrl_c(line: str, tmp_path: Path) -> None:
    command = [sys.executable, DEMO, "--device", "cpu", "--steps", "1000000"]
    with subprocess.Popen(  # noqa: S603
        [*command, "--cache", str(tmp_path / "cache.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout
            assert any(line in said for said in process.stdout)
            time.sleep(0.2)  # into a training step, or into timing
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(250)
@pytest.mark.parametrize(
    ("kind", "steps"),
    # The fourth step compiles the blocks; under DDP test_ranks.py does that.
    [("dp", 3), ("fsdp", 4), ("tp", 4)],
)
def test_two_processes(kind: str, steps: int, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache.json")
    options = ("--device", "cpu", "--steps", str(steps), "--cache", cache)
    command = (*TORCHRUN, DEMO, *options, f"--{kind}", "2", "--no-compare")
    done = run(*command, seconds=240)
    assert done.returncode == 0, done.stderr
    output = done.stdout
    assert output.count(" of 29 Linears are candidates for bf16") == 1
    assert output.count(f"step    {steps}  loss") == 1
    assert " on rank 0" in output
    assert " on rank 1" in output
    assert ("512 of 1024" in output) == (kind == "tp")


@pytest.mark.dist
def test_processes_without_a_use() -> None:
    done = run(*TORCHRUN, DEMO, "--device", "cpu")
    assert done.returncode == 1
    assert "the product must be the number of processes, which is 2" in done.stderr


@pytest.mark.parametrize(
    ("sizes", "processes", "message"),
    [
        ((1, 1, 2), 1, "--dp 1 --fsdp 1 --tp 2: the product must be .*, which is 1;"),
        ((2, 2, 1), 8, "--dp 2 --fsdp 2 --tp 1: the product must be .*, which is 8;"),
        ((-1, -1, 2), 2, "--dp -1 --fsdp -1 --tp 2: the product must be"),
        ((1, 1, 4), 4, "--tp 4 does not divide 2 key and value heads"),
    ],
)
def test_sizes_that_do_not_fit(
    sizes: tuple[int, int, int],
    processes: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parallel = runpy.run_path(str(ROOT / "examples" / "parallel.py"))
    dp, fsdp, tp = sizes
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    arguments = Namespace(device="cpu", dp=dp, fsdp=fsdp, tp=tp)
    with pytest.raises(ValueError, match=message):
        parallel["Processes"](arguments, kv_heads=2)
