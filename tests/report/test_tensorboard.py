"""A real TensorBoard on a real log: HTTP answers, and what a browser renders."""

import gc
import gzip
import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from fp8tune import AutoFloat8, ConfigError, PhaseError, TuneConfig
from fp8tune.decision.records import REFERENCE
from fp8tune.report.step_log import StepLog
from fp8tune.report.tensorboard import write_plan
from fp8tune.store.runs import load_runs
from fp8tune.timing.traces import write_trace
from tests.helpers import all_faster, load_example

PROFILER = "/data/plugin/pytorch_profiler"
STEPS, FREEZE = 12, 4  # optimizer steps, and the first of them after the freeze


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def train(model, steps, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(steps):
        x = torch.randn(128, 64, requires_grad=True)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def up_is_faster(signature, variant):
    """The wide layers gain, the others lose."""
    faster = signature.shape.n == 256
    return {REFERENCE: 2.0}.get(variant, 1.0 if faster else 4.0)


def synthetic_cuda_trace():
    """Two ranges, each with one operator that launches one kernel, as Kineto says it."""
    ranges = [("reference", 100, 40), ("candidate", 1100, 25)]
    events = [{"ph": "X", "name": "no category", "ts": 1, "dur": 1, "pid": 1, "tid": 1}]
    for i, (role, ts, kernel_us) in enumerate(ranges, 1):
        cpu = {"ph": "X", "pid": 1, "tid": 1}
        kernel = {"External id": i, "correlation": i, "device": 0, "stream": 7}
        events += [
            cpu
            | {"cat": "user_annotation", "name": f"fp8tune::wq::{role}"}
            | {"ts": ts, "dur": 500, "args": {"External id": 100 + i}},
            cpu
            | {"cat": "cpu_op", "name": "aten::mm", "ts": ts + 10, "dur": 300}
            | {"args": {"External id": i}},
            cpu
            | {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": ts + 20}
            | {"dur": 5, "args": {"External id": i, "correlation": i}},
            {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7}
            | {"ts": ts + 50, "dur": kernel_us, "args": kernel},
        ]
    device = {"id": 0, "name": "Imaginary 1000", "totalGlobalMem": 1, "numSms": 1}
    return {"deviceProperties": [device], "traceEvents": events}


@pytest.fixture(scope="module")
def log(tmp_path_factory, scripted_clock):
    """What a training run with all of it leaves behind."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4)), nn.Linear(64, 16))
    config = TuneConfig(
        profile_dir=folder / "profile", max_samples=8, include_output_layer=True
    )
    auto = AutoFloat8(
        model,
        recipe="bf16",
        filter_fqns=["4"],
        tensorboard=folder,
        config=config,
        clock=scripted_clock(up_is_faster),
    )
    train(auto, STEPS)
    with SummaryWriter(folder / "by hand") as writer:
        auto.report().to_tensorboard(writer, STEPS)
    write_trace(
        json.dumps(synthetic_cuda_trace()).encode(), folder / "profile", "synthetic"
    )
    del auto  # closes the log
    gc.collect()
    return folder


@pytest.fixture
def clock(scripted_clock):
    return scripted_clock(up_is_faster)


screenshots = load_example("screenshots")


class Server(screenshots.TensorBoard):
    """TensorBoard on a free port, and what it answers."""

    def get(self, path, **query):
        url = f"{self.url}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - http
            data = answer.read()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data

    def json(self, path, **query):
        return json.loads(self.get(path, **query))

    def wait_for(self, path, ready, **query):
        """Ask until it is loaded."""
        for _ in range(150):
            answer = self.json(path, **query)
            if ready(answer):
                return answer
            time.sleep(0.2)
        raise AssertionError(f"{path} stayed at {answer!r}")


@pytest.fixture(scope="module")
def server(log):
    with Server(log) as server:
        tags = "/data/plugin/scalars/tags"
        server.wait_for(tags, lambda x: "fp8tune/step_ms" in x.get(".", {}))
        yield server


# Over HTTP


def test_all_plugins_are_there(server):
    listing = server.json("/data/plugins_listing")
    wanted = {"text", "scalars", "images", "hparams", "pytorch_profiler"}
    assert wanted <= listing.keys()
    assert all(listing[name]["enabled"] for name in wanted)


@pytest.mark.parametrize("run", [".", "by hand"])
def test_the_table_is_shown_as_html(server, run):
    tag = "fp8tune/plan/text_summary"
    (text,) = server.json("/data/plugin/text/text", run=run, tag=tag)
    html = text["text"]
    assert "<th>speedup</th>" in html
    assert "<code>{0..3}.up</code> x4" in html
    assert "<td>2.00 [2.00, 2.00]</td>" in html
    assert "bf16: faster" in html
    assert "reference: filtered by name" in html


def scalars(server, tag, run="."):
    points = server.json("/data/plugin/scalars/scalars", run=run, tag=tag)
    return {int(step): value for _, step, value in points}


@pytest.mark.parametrize("run", [".", "by hand"])
def test_each_kind_of_layer_has_its_speedup(server, run):
    tags = server.json("/data/plugin/scalars/tags")[run]
    layers = [tag for tag in tags if tag.startswith("fp8tune_speedup/")]
    values = {x: list(scalars(server, x, run).values()) for x in layers}
    assert values == {
        "fp8tune_speedup/{0..3}.up": [2.0],
        "fp8tune_speedup/{0..3}.down": [0.5],
    }


def test_the_freeze_is_seen_in_the_step_times(server):
    share = scalars(server, "fp8tune/converted_share")
    converted = {step: value * 9 for step, value in share.items()}
    assert converted == pytest.approx(
        {step: 8 if step < FREEZE else 4 for step in range(1, STEPS + 1)}
    )
    times = scalars(server, "fp8tune/step_ms")
    assert sorted(times) == list(range(2, STEPS + 1))
    assert all(0 < value < 60_000 for value in times.values())
    # The step in which the layers were timed and traced took longest.
    assert max(times, key=times.get) == FREEZE


@pytest.mark.parametrize("tag", ["fp8tune/speedups", "fp8tune/heat_map"])
def test_the_pictures_are_there(server, tag):
    tags = server.json("/data/plugin/images/tags")
    assert tag in tags["."]
    (image,) = server.json("/data/plugin/images/images", run=".", tag=tag, sample=0)
    query = dict(urllib.parse.parse_qsl(image["query"]))
    png = server.get("/data/plugin/images/individualImage", **query)
    assert png.startswith(b"\x89PNG")
    width = int.from_bytes(png[16:20], "big")
    assert width == 1000


def test_the_plan_is_hparams_of_the_same_run(server):
    runs = server.json("/data/runs")
    assert sorted(runs) == [".", "by hand"]
    request = json.dumps({"experimentName": ""})
    experiment = server.json("/data/plugin/hparams/experiment", request=request)
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert {"fp8tune/recipe", "fp8tune/converted", "fp8tune/torch"} <= names


def profiler_runs(server):
    ready = lambda x: not x["loading"] and len(x["runs"]) == 3  # noqa: E731
    return server.wait_for(f"{PROFILER}/runs", ready)["runs"]


def operators(server, run):
    """The rows of the profiler's table of operators, by name."""
    (worker,) = server.json(f"{PROFILER}/workers", run=run, view="Operator")
    (span,) = server.json(f"{PROFILER}/spans", run=run, worker=worker)
    query = {"run": run, "worker": worker, "span": span, "group_by": "Operation"}
    table = server.json(f"{PROFILER}/operation/table", **query)
    return {row["name"]: row for row in table["data"]}


def test_the_profiler_shows_our_ranges_as_operators(server):
    runs = profiler_runs(server)
    run = next(name for name in runs if "0.up-m128-k64-n256" in name)
    assert server.json(f"{PROFILER}/views", run=run) == [
        "Overview",
        "Operator",
        "Trace",
    ]
    rows = operators(server, run)
    for role in ("reference", "candidate"):
        row = rows[f"fp8tune::0.up::{role}"]
        assert row["calls"] == 3
        assert row["host_total_duration"] > 0


def test_the_profiler_overview_and_trace_answer(server):
    run = profiler_runs(server)[0]
    (worker,) = server.json(f"{PROFILER}/workers", run=run, view="Overview")
    (span,) = server.json(f"{PROFILER}/spans", run=run, worker=worker)
    query = {"run": run, "worker": worker, "span": span, "view": "Overview"}
    assert server.json(f"{PROFILER}/overview", **query)["steps"]["rows"]
    trace = server.json(f"{PROFILER}/trace", run=run, worker=worker, span=span)
    names = {event.get("name") for event in trace["traceEvents"]}
    assert any(str(name).startswith("fp8tune::") for name in names)


def test_ranges_on_a_gpu_have_device_times(server):
    run = next(name for name in profiler_runs(server) if "synthetic" in name)
    rows = operators(server, run)
    times = {
        role: rows[f"fp8tune::wq::{role}"]["device_total_duration"]
        for role in ("reference", "candidate")
    }
    assert times == {"reference": 40, "candidate": 25}
    assert rows["aten::mm"]["device_self_duration"] == 65


# In a browser


@pytest.mark.parametrize("tab", ["text", "scalars", "images"])
def test_a_browser_renders_the_tab(server, browser, tab, tmp_path):
    address, words, images = screenshots.TABS[tab]
    text = browser.show(f"{server.url}/{address}", words=words, images=images)
    if tab == "text":
        # Markdown became a table: no pipes are left, and names are whole.
        assert "|" not in text
        assert "{0..3}.up x4 128 64 256 2.000 1.000 2.00 [2.00, 2.00]" in text
    if tab == "scalars":
        assert "fp8tune_speedup" in text
    browser.screenshot(tmp_path / "tab.png")
    assert (tmp_path / "tab.png").read_bytes().startswith(b"\x89PNG")


def test_the_documentation_shows_the_tabs():
    images = Path(__file__).parents[2] / "docs" / "images"
    page = (images.parent / "seeing-it.md").read_text()
    for name in ("plot", *(f"tensorboard-{tab}" for tab in screenshots.TABS)):
        assert (images / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(images/{name}.png)" in page


# What costs nothing to get wrong


def test_a_trial_is_written_too(tmp_path, tried_cache):
    (run,) = load_runs(tried_cache, TuneConfig())
    with SummaryWriter(tmp_path) as writer:
        write_plan(run.plan, writer)
    (file,) = tmp_path.glob("events.*")
    events = EventAccumulator(str(file)).Reload()
    tags = events.Tags()["images"]
    assert {f"fp8tune/trial_{x}" for x in ("plans", "roles", "steps")} <= set(tags)
    (image,) = events.Images("fp8tune/trial_steps")
    assert (image.width, image.encoded_image_string[:4]) == (1000, b"\x89PNG")


def test_a_writer_of_the_users_own_is_written_to(tmp_path, clock):
    with SummaryWriter(tmp_path) as writer:
        auto = AutoFloat8(Block(), recipe="bf16", tensorboard=writer, clock=clock)
        train(auto, 5)
        del auto
        writer.add_scalar("mine", 1.0)
    # One file: hparams, too, are written without torch's extra file, which makes
    # TensorBoard drop points. Fails loudly when torch moves what that needs.
    assert len(list(tmp_path.iterdir())) == 1


def test_steps_of_other_models_are_not_counted(tmp_path, clock):
    seen = Steps()
    auto = AutoFloat8(Block(), recipe="bf16", tensorboard=seen, clock=clock)
    train(Block(), 3)
    first, second = (
        torch.optim.SGD(x, 1e-3)
        for x in (list(auto.parameters())[:1], list(auto.parameters())[1:])
    )
    train(auto, 1, first)
    train(auto, 2, second)
    train(auto, 1, first)
    assert seen.steps("fp8tune/converted_share") == [1, 2]


def test_nothing_is_counted_once_the_model_is_gone(clock):
    seen = Steps()
    auto = AutoFloat8(Block(), recipe="bf16", tensorboard=seen, clock=clock)
    train(auto, 1)
    model = auto.module
    del auto
    gc.collect()
    train(model, 2)
    assert seen.steps("fp8tune/converted_share") == [1]


class Steps:
    """The part of a SummaryWriter that is used, in memory."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def add_text(self, *args):
        pass

    def add_figure(self, *args, **options):
        pass

    def add_hparams(self, *args, **options):
        pass

    def flush(self):
        pass

    def steps(self, tag):
        return [step for name, _, step in self.scalars if name == tag]


def test_writing_is_no_part_of_a_step(clock):
    seen, ticks = Steps(), iter([10.0, 11.0, 13.0, 14.0, 14.5, 15.0])
    model = Block()
    auto = AutoFloat8(model, recipe="bf16", clock=clock)
    log = StepLog(auto, auto._tuner, seen, now=lambda: next(ticks))
    train(auto, 3)
    log.close()
    # Steps end at 10, 13 and 14.5; writing lasts until 11 and 14.
    assert [x for x in seen.scalars if x[0] == "fp8tune/step_ms"] == [
        ("fp8tune/step_ms", 2000.0, 2),
        ("fp8tune/step_ms", 500.0, 3),
    ]


def test_a_compiled_optimizer_is_counted(tmp_path, clock):
    seen = Steps()
    auto = AutoFloat8(Block(), recipe="bf16", tensorboard=seen, clock=clock)
    optimizer = torch.optim.SGD(auto.parameters(), 1e-3)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    train(auto, 3, optimizer)
    assert seen.steps("fp8tune/converted_share") == [1, 2, 3]


def test_the_graph_of_the_model_is_the_same_with_a_log(tmp_path, scripted_clock):
    class Clock(scripted_clock):
        """Whole steps take equally long, whatever is converted."""

        def mark(self):
            return 0.0

        def elapsed_ms(self, start, end, what):
            del start, end, what
            return 1.0

    def graphs(**options):
        texts = []

        def backend(graph, inputs):
            del inputs
            texts.append(graph.print_readable(print_output=False))
            return graph.forward

        torch.manual_seed(0)
        torch.compiler.reset()
        compile = {"backend": backend, "fullgraph": True}
        auto = AutoFloat8(
            Block(),
            recipe="bf16",
            compile=compile,
            clock=Clock(all_faster),
            **options,
        )
        train(auto, 8)
        auto.freeze()
        return [text for text in texts if "relu" in text]

    assert graphs(tensorboard=tmp_path) == graphs() != []


def test_what_is_no_folder_and_no_writer_is_refused():
    with pytest.raises(ConfigError, match="tensorboard is 7; it must be a folder or"):
        AutoFloat8(Block(), recipe="bf16", tensorboard=7)


def test_there_is_nothing_to_write_before_the_freeze(tmp_path, clock):
    auto = AutoFloat8(Block(), recipe="bf16", clock=clock)
    with pytest.raises(PhaseError, match="no plan to write to TensorBoard yet"):
        auto.report().to_tensorboard(Steps())


def test_a_missing_tensorboard_says_what_to_install(tmp_path):
    """In a process of its own, in which it cannot be imported."""
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "from torch import nn; from fp8tune import AutoFloat8\n"
        f"AutoFloat8(nn.Linear(8, 8), 'bf16', tensorboard={str(tmp_path)!r})"
    )
    run = subprocess.run(  # noqa: S603 - runs these lines
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert 'pip install "fp8tune[plot]"' in run.stderr.splitlines()[-1]
