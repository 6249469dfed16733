"""The first run on a GPU, tried on a CPU and on a simulated GPU, and the page of it."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fp8tune.timing.cuda_clock import CudaClock
from fp8tune.timing.replay import Replay

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "measurements" / "gpu.md"
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def script(name):
    path = ROOT / "tests" / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_run, gpu_page = script("gpu"), script("gpu_page")


class Launches(TorchDispatchMode):
    """Every operation on the CPU is one kernel of the simulated GPU too."""

    def __init__(self, gpu):
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            slow = 1.0 if result.dtype is torch.bfloat16 else 2.0
            self._gpu.launch(2.0 + slow * result.numel() / 1e4)
        return result


@pytest.fixture
def simulated(gpu, monkeypatch):
    """A run of the parts in this process, timed by the simulated GPU's clock."""
    clock = CudaClock(torch.device("cuda", 0))
    monkeypatch.setattr(Replay, "device", clock.device)
    monkeypatch.setattr("fp8tune.bench.race._MOST_ROUNDS", 8)

    def run(name, command, folder, device, seconds):
        if command:
            raise OSError("no such file")
        with Launches(gpu):
            gpu_run.PARTS[name](folder, torch.device(device), clock, seconds)
        return "done"

    return run


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_folder_and_the_page_of_a_simulated_gpu(simulated, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "GPU_ONLY", set())
    ended = gpu_run.run_all(tmp_path, "cpu", simulated)
    own = {"environment", "queue", "bench", "trial"}
    assert {x for x, y in ended.items() if y["outcome"] == "done"} == own
    assert ended["demo"]["outcome"] == "failed: OSError: no such file"
    assert json.loads((tmp_path / "parts.json").read_text()) == ended
    bench = json.loads((tmp_path / "bench.json").read_text())
    assert bench["with_gaps"] == 0
    trial = json.loads((tmp_path / "trial.json").read_text())
    assert len(trial["spans_ms"]) > 4
    assert trial["timing_sm_mhz"][0] is None  # no driver here to ask
    # As on a GPU, whose environment has this field.
    where = json.loads((tmp_path / "environment.json").read_text())
    gpu_run.write(tmp_path / "environment.json", {**where, "sm_count": "132"})
    gpu_run.write(tmp_path / "queue.json", {"launches": 1022})
    text = gpu_page.page(tmp_path)
    (workload,) = bench["workloads"]
    for row in workload["policies"]:
        assert f"| {row['policy']} | {len(row['converted'])} |" in text
        assert f"| {row['step_ms']:.3f} |" in text
    assert "| demo | failed: OSError: no such file |" in text
    assert "driver's queue: 1022" in text
    assert "| warmup |" in text
    assert "not yet measured" not in text.lower().replace(
        "against the profiler: not yet measured", ""
    )


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_run_on_a_cpu_ends_with_every_part_named(tmp_path, monkeypatch):
    order = [x for x in gpu_run.ORDER if x[0] in ("environment", "trial", "demo")]
    monkeypatch.setattr(gpu_run, "ORDER", order)
    ended = gpu_run.run_all(tmp_path, "cpu", order=order)
    assert [ended[x]["outcome"] for x in ("environment", "trial", "demo")] == [
        "done",
        "done",
        "needs a GPU",
    ], (tmp_path / "trial.log").read_text()
    assert "Not yet measured. No GPU timing of ours exists." in gpu_page.page(tmp_path)


def test_parts_that_fail_or_hang_cost_only_themselves(tmp_path):
    order = [
        ("fails", 20, ["-c", "raise SystemExit(3)"]),
        ("hangs", 5, ["-c", "import time; time.sleep(60)"]),
        ("works", 20, ["-c", "print('here')"]),
        ("data", 20, ["-c", "print('{{}}')", "--json"]),
    ]
    ended = gpu_run.run_all(tmp_path, "cuda:0", order=order)
    assert [ended[x]["outcome"] for x in ("fails", "hangs", "works")] == [
        "failed with 3",
        "cut after 5 s",
        "done",
    ]
    assert (tmp_path / "works.txt").read_text() == "here\n"
    assert json.loads((tmp_path / "data.json").read_text()) == {}


def test_the_whole_never_takes_more_than_ten_minutes(tmp_path):
    seconds = [0.0]

    def run(name, command, folder, device, most):
        del name, command, folder, device
        seconds[0] += most
        return "cut"

    ended = gpu_run.run_all(tmp_path, "cuda:0", run, now=lambda: seconds[0])
    assert seconds[0] <= 600
    assert ended["environment"]["outcome"] == "cut"
    assert ended["sweep-tensorwise"]["outcome"] == "no time left"


def test_figures_of_a_gpu_become_rows(tmp_path):
    gpu_run.write(tmp_path / "environment.json", {"device": "H", "sm_count": "132"})
    row = {"m": 8, "k": 16, "n": 32, "variant": "rowwise", "event_ms": 1.0}
    row |= {"span_ms": 0.98, "ratio": 1.02, "kernels": 130}
    found = {"recipe": "rowwise", "workloads": [], "clock_agreement": [row]}
    cost = {"cold": {"tuning_s": 61.5, "warm_up_s": 50.0}}
    found |= {"tuning_cost": cost, "missing": ["x: no time left"], "discarded": 2}
    gpu_run.write(tmp_path / "bench.json", {**found, "with_gaps": 0})
    report = '<testsuites><testsuite tests="2" failures="1" errors="0"><testcase'
    report += ' classname="a" name="b"><failure/></testcase><testcase classname="a"'
    report += ' name="c"/></testsuite></testsuites>'
    (tmp_path / "tests.xml").write_text(report)
    text = gpu_page.page(tmp_path)
    assert "| 8 x 16 x 32 | rowwise | 130 | 1.0000 | 0.9800 | 1.020 |" in text
    assert "Batches thrown away: 2; timed with launch gaps: 0." in text
    assert "cold compile cache: 61.5 s, 50.0 s of it compiling" in text
    assert "Not run: x: no time left." in text
    assert "2 tests, 1 failures, 0 errors." in text
    assert "`a::b`" in text
    assert "`a::c`" not in text


def test_the_page_is_what_the_folder_says():
    assert PAGE.read_text() == gpu_page.page(PAGE.parent / "gpu")


def test_a_queue_is_as_deep_as_it_is(gpu, monkeypatch):
    from fp8tune.bench.agreement import queue_depth  # noqa: PLC0415

    class Cell:
        def zero_(self):
            gpu.launch(1.0)

    monkeypatch.setattr(torch, "zeros", lambda *_, **__: Cell())
    assert queue_depth(torch.device("cuda", 0)) == gpu.QUEUE - 1
