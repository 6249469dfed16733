"""Plans in real experiment trackers, without a network."""

import json

import mlflow
import pytest
import torch
import wandb
from torch import nn

from fp8tune import AutoFloat8, ConfigError, PhaseError, Plan, TuneConfig
from tests.helpers import widening


@pytest.fixture(scope="module")
def auto(scripted_clock):
    """A model of which one Linear is converted, and one is not."""
    auto = AutoFloat8(
        nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)),
        "bf16",
        config=TuneConfig(include_output_layer=True),
        clock=scripted_clock(widening),
    )
    for _ in range(4):
        auto(torch.randn(32, 64)).square().mean().backward()
        auto.zero_grad()
    assert auto.plan.converted_fqns == ["0"]
    return auto


# MLflow


@pytest.fixture
def client(tmp_path, monkeypatch):
    """MLflow on a folder of its own."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


def test_mlflow_holds_the_table_the_speedups_and_the_plan(auto, client, tmp_path):
    with mlflow.start_run() as run:
        auto.report().log_to(run, step=7)
        auto.report().log_to(run, step=8)  # a later plan may replace it
    stored = client.get_run(run.info.run_id).data
    assert stored.metrics == {
        "fp8tune/converted_share": 0.5,
        "fp8tune_speedup/0": 2.0,
        "fp8tune_speedup/1": 0.5,
    }
    steps = client.get_metric_history(run.info.run_id, "fp8tune_speedup/0")
    assert [x.step for x in steps] == [7, 8]
    assert stored.tags["fp8tune/recipe"] == "bf16"
    assert stored.tags["fp8tune/converted"] == "1"

    files = {
        name: client.download_artifacts(run.info.run_id, f"fp8tune/{name}", tmp_path)
        for name in ("table.json", "plan.json", "report.html")
    }
    assert Plan.load(files["plan.json"]) == auto.plan
    with open(files["table.json"], encoding="utf-8") as file:  # noqa: PTH123
        table = json.load(file)
    assert table["layer"] == ["0", "1"]
    assert table["speedup"] == ["2.00 [2.00, 2.00]", "0.50 [0.50, 0.50]"]
    assert table["verdict"] == ["converted", "reference"]
    with open(files["report.html"], encoding="utf-8") as file:  # noqa: PTH123
        assert "converted 1 of 2 Linears" in file.read()


# Weights & Biases


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A run that writes into a folder and to nowhere else."""
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / name.lower()))
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = wandb.Settings(console="off", x_disable_stats=True)
    run = wandb.init(mode="offline", project="fp8tune-test", settings=settings)
    yield run
    run.finish()
    wandb.teardown()


def stored_value(data, name):
    """The JSON behind a name: field 16 of wandb's records, a tag, a length, a text."""
    start = data.index(name.encode() + b"\x82\x01") + len(name) + 2
    return json.loads(data[start + 1 : start + 1 + data[start]])


def test_wandb_holds_the_table_the_speedups_and_the_plan(auto, offline, tmp_path):
    auto.report().log_to(offline)
    offline.finish()
    wandb.teardown()  # the process behind it writes until it ends
    (log,) = tmp_path.rglob("*.wandb")  # what `wandb sync` sends
    data = log.read_bytes()
    assert stored_value(data, "fp8tune/converted_share") == 0.5
    assert stored_value(data, "fp8tune_speedup/0") == 2.0
    assert stored_value(data, "fp8tune_speedup/1") == 0.5
    assert stored_value(data, "fp8tune/recipe") == "bf16"
    assert b"fp8tune-plan" in data
    (table,) = (log.parent / "files").rglob("*.table.json")
    rows = json.loads(table.read_text())
    speedup = rows["columns"].index("speedup")
    assert [(row[0], row[speedup]) for row in rows["data"]] == [
        ("0", "2.00 [2.00, 2.00]"),
        ("1", "0.50 [0.50, 0.50]"),
    ]
    (page,) = (log.parent / "files").rglob("*.html")
    assert "converted 1 of 2 Linears" in page.read_text(encoding="utf-8")
    staged = [x for x in (tmp_path / "data_dir").rglob("*") if x.is_file()]
    assert auto.plan in [
        Plan.load(x) for x in staged if b"fp8tune-plan" in x.read_bytes()
    ]


# What is neither


def test_another_object_is_refused(auto):
    with pytest.raises(ConfigError, match=r"log_to got a builtins\.dict; it takes the"):
        auto.report().log_to({})


def test_there_is_nothing_to_log_before_the_freeze(client):
    auto = AutoFloat8(nn.Linear(64, 64), "bf16")
    with (
        mlflow.start_run() as run,
        pytest.raises(PhaseError, match="no plan to write to a tracker yet"),
    ):
        auto.report().log_to(run)
