"""Profiler traces of what is timed: files, ranges, and what may go wrong."""

import gzip
import json
import logging
import re

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from fp8tune import AutoFloat8, ConfigError, TuneConfig
from fp8tune.decision.records import REFERENCE, Layer, Shape, Signature
from fp8tune.model.candidates import Sample
from fp8tune.recipes import get_recipe
from fp8tune.timing.measure import measure
from fp8tune.timing.traces import Traces, for_plugin, profiler_is_running, write_trace

SHAPE = Shape(16, 32, 48, "float32", "float32", None, True)
SIGNATURE = Signature(SHAPE, True, True, True)
FOLDER = "0.wq-m16-k32-n48-bf16"
# As torch-tb-profiler 0.4.3 knows them.
PLUGIN_FILE = re.compile(r"^(.*?)(\.\d+)?\.pt\.trace\.json(?:\.gz)?$")


def layers(*fqns):
    return [Layer(x, 32, 48, "float32", True, None, ((SIGNATURE, 3),)) for x in fqns]


def traced(clock, folder, *fqns):
    sample = Sample(SIGNATURE, nn.Linear(32, 48), torch.randn(16, 32), None)
    record = Traces(folder, layers(*(fqns or ("0.wq", "1.wq")))).record
    config = TuneConfig(max_samples=8)
    return measure(sample, get_recipe("bf16", "cpu"), clock, config, trace=record)


@pytest.fixture
def clock(scripted_clock):
    return scripted_clock(lambda _, variant: 2.0 if variant == REFERENCE else 1.0)


def read(path):
    return json.loads(gzip.decompress(path.read_bytes()))


def ranges(trace):
    return [
        (x["name"], x["cat"])
        for x in trace["traceEvents"]
        if x.get("ph") == "X" and x["name"].startswith("fp8tune::")
    ]


def test_each_signature_gets_a_folder_with_both_files(tmp_path, clock):
    traced(clock, tmp_path / "new" / "deep")
    (folder,) = (tmp_path / "new" / "deep").iterdir()
    assert folder.name == FOLDER
    names = sorted(path.name for path in folder.iterdir())
    assert [bool(PLUGIN_FILE.match(name)) for name in names] == [True, False]
    assert names[1] == "raw.json.gz"


def test_ranges_name_the_first_layer_and_the_variant(tmp_path, clock):
    traced(clock, tmp_path)
    (path,) = (tmp_path / FOLDER).glob("*.pt.trace.json.gz")
    roles = ("reference", "candidate")
    both = [(f"fp8tune::0.wq::{role}", "cpu_op") for role in roles]
    assert ranges(read(path)) == both * 3


def test_the_raw_trace_is_as_the_profiler_wrote_it(tmp_path, clock):
    traced(clock, tmp_path)
    raw = read(tmp_path / FOLDER / "raw.json.gz")
    assert {category for _, category in ranges(raw)} == {"user_annotation"}


def test_forward_and_backward_lie_inside_the_ranges(tmp_path, clock):
    traced(clock, tmp_path)
    raw = read(tmp_path / FOLDER / "raw.json.gz")
    events = [x for x in raw["traceEvents"] if x.get("ph") == "X"]
    spans = [x for x in events if x["name"].startswith("fp8tune::")]
    products = [x for x in events if x["name"] in ("aten::mm", "aten::addmm")]
    inside = [
        x
        for x in products
        if any(
            span["ts"] <= x["ts"] <= span["ts"] + span["dur"]
            and span["tid"] == x["tid"]
            for span in spans
        )
    ]
    # Forward and two gradients, of two variants, three times.
    assert len(inside) == len(products) == 3 * 2 * 3


def test_a_second_run_keeps_the_first_ones_traces(tmp_path, clock):
    traced(clock, tmp_path)
    traced(clock, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [FOLDER, f"{FOLDER}-2"]


def test_names_of_layers_make_safe_names_of_folders(tmp_path, clock):
    traced(clock, tmp_path, "../a b/ü" + "x" * 200)
    (folder,) = tmp_path.iterdir()
    assert re.fullmatch(r"\.\._a_b_üx{92}-m16-k32-n48-bf16", folder.name)


def test_a_model_that_is_a_linear_has_a_name(tmp_path, clock):
    traced(clock, tmp_path, "")
    assert [x.name for x in tmp_path.iterdir()] == ["root-m16-k32-n48-bf16"]


def test_timing_comes_first_and_is_not_touched(tmp_path, clock):
    result = traced(clock, tmp_path)
    assert result.ratios == [2.0] * 8


def test_nothing_that_the_plugin_reads_is_ever_half_written(tmp_path, monkeypatch):
    """Whatever name holds incomplete data is none that the plugin looks at."""
    seen = []
    compress = gzip.compress

    def watching(data):
        (folder,) = tmp_path.iterdir()
        seen.append([x.name for x in folder.iterdir()])
        return compress(data)

    monkeypatch.setattr(gzip, "compress", watching)
    write_trace(b'{"traceEvents": []}', tmp_path, "run")
    assert seen == [[], ["raw.json.gz"]]
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert len(names) == 2


@pytest.mark.parametrize(
    ("category", "expected"),
    [
        ("cuda_runtime", "runtime"),
        ("cuda_driver", "runtime"),
        ("xpu_runtime", "runtime"),
        ("kernel", "kernel"),
        ("cpu_op", "cpu_op"),
        ("gpu_user_annotation", "gpu_user_annotation"),
    ],
)
def test_categories_become_those_that_the_plugin_knows(category, expected):
    event = {"ph": "X", "name": "fp8tune::x", "cat": category, "ts": 1, "dur": 1}
    trace = {"traceEvents": [event], "schemaVersion": 1}
    assert for_plugin(trace) == {
        "traceEvents": [{**event, "cat": expected}],
        "schemaVersion": 1,
    }
    assert event["cat"] == category


def test_annotations_of_others_stay_annotations():
    event = {"ph": "X", "name": "Optimizer.step", "cat": "user_annotation"}
    assert for_plugin({"traceEvents": [event]})["traceEvents"] == [event]


def test_a_running_profiler_is_left_alone(tmp_path, clock, caplog):
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as users_own:
        traced(clock, tmp_path)
        with record_function("later"):
            torch.ones(1).add(1)
    assert "a profiler is running already" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert "later" in {event.key for event in users_own.key_averages()}


def test_a_running_profiler_is_noticed():
    """Fails loudly when torch moves what profiler_is_running asks."""
    assert not profiler_is_running()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True):
        assert profiler_is_running()
    assert not profiler_is_running()


def test_a_folder_that_cannot_be_made_costs_the_trace_only(tmp_path, clock, caplog):
    (tmp_path / "file").write_text("")
    result = traced(clock, tmp_path / "file")
    assert result.failure is None
    (warning,) = caplog.records
    assert "no trace of 0.wq was written" in warning.getMessage()


def test_training_with_traces_is_training_without(tmp_path, clock, caplog):
    def weights(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        auto = AutoFloat8(
            model,
            recipe="bf16",
            warmup_steps=1,
            clock=clock,
            config=TuneConfig(max_samples=8, **options),
        )
        optimizer = torch.optim.SGD(auto.parameters(), 0.1)
        for _ in range(3):
            auto(torch.randn(16, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters()), torch.get_rng_state()

    with_traces, rng_with = weights(profile_dir=tmp_path)
    without, rng_without = weights()
    assert all(map(torch.equal, with_traces, without))
    assert torch.equal(rng_with, rng_without)
    assert len(list(tmp_path.glob("*/*.pt.trace.json.gz"))) == 2
    assert [x for x in caplog.records if x.levelno >= logging.WARNING] == []


def test_a_folder_must_be_a_path():
    with pytest.raises(ConfigError, match="profile_dir is 7; it must be None, or the"):
        TuneConfig(profile_dir=7)
