"""``fp8tune bench``: sizes of the workloads, arithmetic of the table, the command itself."""

from __future__ import annotations

import json

import pytest
import torch

from fp8tune.bench import race
from fp8tune.bench.agreement import Agreement
from fp8tune.bench.blocks import Model
from fp8tune.bench.cost import tuning_cost
from fp8tune.bench.policies import Setting, compare_policies
from fp8tune.bench.suite import Findings, GpuSuite
from fp8tune.bench.workloads import WORKLOADS, find_workloads, scaled_down
from fp8tune.commands.cli import main
from fp8tune.errors import BenchError
from fp8tune.model.experts import experts_in
from fp8tune.model.linears import named_gemms
from fp8tune.recipes import get_recipe
from fp8tune.timing.cpu_clock import CpuClock

CPU = torch.device("cpu")
NAMES = list(dict.fromkeys(x.name for x in WORKLOADS))

pytestmark = pytest.mark.usefixtures("one_thread")


def shapes(workload):
    with torch.device("meta"):
        model = Model(workload, torch.device("meta"), torch.bfloat16)
    return {
        name.rsplit(".", 1)[-1]: (x.in_features, x.out_features, experts_in(x))
        for name, x in named_gemms(model)
    }


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("llama3-8b@2048", {"wk": (4096, 1024), "w2": (14336, 4096)}),
        ("llama3-70b-tp8@8192", {"wq": (8192, 1024), "wk": (8192, 128)}),
        ("llama3-70b-tp8@16384", {"wo": (1024, 8192), "w1": (8192, 3584)}),
        ("llama3-405b-tp8", {"wq": (16384, 2048), "w2": (6656, 16384)}),
        ("qwen3-14b", {"wq": (5120, 5120), "wv": (5120, 1024), "w3": (5120, 17408)}),
        ("llama3.2-1b", {"wq": (2048, 2048), "wk": (2048, 512), "w1": (2048, 8192)}),
        ("vit-l", {"wqkv": (1024, 3072), "fc1": (1024, 4096), "fc2": (4096, 1024)}),
        ("torchtitan-debug", {"wqkv": (256, 768), "wo": (256, 256), "w1": (256, 768)}),
    ],
)
def test_sizes_are_the_published_ones(label, expected):
    found = shapes(find_workloads([label])[0])
    assert {name: found[name][:2] for name in expected} == expected


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (
            "mixtral-8x7b",
            {
                "wk": (4096, 1024, 0),
                "gate_up_proj": (4096, 28672, 8),
                "down_proj": (14336, 4096, 8),
            },
        ),
        (
            "qwen3-30b-a3b",
            {
                "wq": (2048, 4096, 0),
                "wk": (2048, 512, 0),
                "gate_up_proj": (2048, 1536, 128),
                "down_proj": (768, 2048, 128),
            },
        ),
        (
            "deepseek-v3-ep8",
            {
                "q_a": (7168, 1536, 0),
                "q_b": (1536, 24576, 0),
                "kv_a": (7168, 576, 0),
                "kv_b": (512, 32768, 0),
                "wo": (16384, 7168, 0),
                "gate_up_proj": (7168, 4096, 32),
                "down_proj": (2048, 7168, 32),
                "w1": (7168, 2048, 0),
                "w2": (2048, 7168, 0),
                "w3": (7168, 2048, 0),
            },
        ),
        (
            "gpt-oss-20b",
            {
                "wq": (2880, 4096, 0),
                "wo": (4096, 2880, 0),
                "gate_up_proj": (2880, 5760, 32),
                "down_proj": (2880, 2880, 32),
            },
        ),
    ],
)
def test_sizes_of_experts_are_the_published_ones(label, expected):
    found = shapes(find_workloads([label])[0])
    assert {name: found[name] for name in expected} == expected


def test_rows_of_the_vision_transformer_are_no_multiple_of_16():
    (vit,) = find_workloads(["vit-l"])
    assert vit.m % 16
    assert scaled_down(vit).m % 16


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda x: x.label)
def test_scaled_down_keeps_the_proportions(workload):
    small = scaled_down(workload)
    assert 256 <= small.dim <= 2048
    full = shapes(workload)
    assert (small.moe is None) == (workload.moe is None)
    for name, (k, n, experts) in shapes(small).items():
        assert k % 16 == n % 16 == 0
        assert experts == full[name][2]
        if small.latent and name in ("q_b", "kv_a"):  # a head's rotary part keeps 16
            continue
        assert k * full[name][1] == n * full[name][0]


def setting_of(**changes):
    common = {"recipe": get_recipe("bf16", CPU), "device": CPU, "clock": CpuClock()}
    times = {"max_seconds": 1, "max_compile_seconds": 60}
    return Setting(**{**common, **times, "compiled": True, **changes})


def bench(*arguments, clock=None, recipe="bf16", capsys):
    extra = {"clock": clock} if clock else {}
    code = main(
        ["bench", "--device", "cpu", "--recipe", recipe, "--eager", *arguments], **extra
    )
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def policies(found, workload=0):
    return {x["policy"]: x for x in found["workloads"][workload]["policies"]}


@pytest.mark.parametrize("name", NAMES)
def test_every_workload_runs_on_a_cpu(name, scripted_clock, capsys):
    # All but the smallest run a few steps, and their times are scripted.
    real = name == "torchtitan-debug"
    clock = CpuClock() if real else scripted_clock(attention_keys_lose)
    arguments = ("--workload", name, "--m", "16", "--max-seconds", "0.01", "--json")
    code, text, errors = bench(*arguments, clock=clock, capsys=capsys)
    assert (code, errors) == (0, "")
    found = json.loads(text)
    rows = policies(found)
    assert {"all reference", "all converted", "fp8tune", "oracle"} == set(rows)
    gemms = found["workloads"][0]["gemms"]
    assert sorted(rows["all converted"]["converted"]) == sorted(gemms)
    assert rows["all reference"]["speedup"]["middle"] == 1
    assert rows["oracle"]["regret"]["middle"] == 1
    assert found["workloads"][0]["rounds"] >= 8
    fastest = min(x["step_ms"] for x in rows.values())
    assert rows["oracle"]["step_ms"] == fastest


def attention_keys_lose(signature, variant):
    """Alone wk and wv lose; in the block w2 loses too, which layers alone cannot know."""
    if signature is not None:
        loses = signature.shape.n == 128
        return 0.5 if (variant == "reference") == loses else 1.0
    names = {x.rsplit(".", 1)[-1] for x in variant.split("+")}
    gains = {"wq": 5, "wo": 5, "wk": -1, "wv": -1, "w1": 12, "w3": 12, "w2": -2}
    return 100.0 - sum(gains.get(x, 0) for x in names)


def test_speedups_and_regrets_of_the_policies(scripted_clock, capsys):
    clock = scripted_clock(attention_keys_lose)
    arguments = ("--workload", "llama3-8b@8192", "--json")
    code, text, _ = bench(*arguments, clock=clock, capsys=capsys)
    assert code == 0
    rows = policies(json.loads(text))
    ms = {name: row["step_ms"] for name, row in rows.items()}
    chosen = {
        "all reference": 100,
        "all converted": 70,
        "fp8tune": 68,
        "oracle": 66,
    }
    assert ms == chosen
    assert rows["fp8tune"]["regret"]["middle"] == pytest.approx(68 / 66)
    assert rows["fp8tune"]["speedup"]["low"] == pytest.approx(100 / 68)
    ends = {x.rsplit(".", 1)[-1] for x in rows["oracle"]["converted"]}
    assert ends == {"wq", "wo", "w1", "w3"}


def test_torchaos_filter_is_a_policy_where_it_has_thresholds(scripted_clock, capsys):
    clock = scripted_clock(attention_keys_lose)
    arguments = ("--workload", "llama3-8b@2048", "--json")
    *_, text, _ = bench(*arguments, clock=clock, recipe="rowwise", capsys=capsys)
    assert policies(json.loads(text))["torchao's static filter"]["converted"] == []
    *_, text, _ = bench(
        *arguments, clock=clock, recipe="rowwise_with_gw_hp", capsys=capsys
    )
    found = json.loads(text)
    assert "torchao's static filter" not in policies(found)
    notes = found["workloads"][0]["notes"]
    assert notes == ["torchao's static filter has no thresholds for rowwise_with_gw_hp"]
    assert found["emulated"] is True


def test_compiled_it_also_shows_what_layers_alone_would_choose(
    scripted_clock, monkeypatch
):
    # Inductor takes seconds for each plan.
    monkeypatch.setitem(race.COMPILE, "backend", "eager")
    (workload,) = find_workloads(["torchtitan-debug"])
    clock = scripted_clock(attention_keys_lose, lambda names: 100.0 - len(names))
    setting = setting_of(clock=clock)
    outcome = compare_policies(scaled_down(workload), setting)
    rows = {x.policy: x for x in outcome.rows}
    assert {"layers alone", "layers in context", "fp8tune"} < set(rows)
    assert rows["fp8tune"].steps > rows["layers alone"].steps
    assert rows["fp8tune"].tried > rows["layers alone"].tried == 0
    assert outcome.plans == 8


def test_out_of_memory_is_said_and_the_others_go_on(scripted_clock, capsys):
    class FullOnce(scripted_clock):
        full = True

        def time_ms(self, work):
            if work[0].signature is None and self.full:
                self.full = False
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().time_ms(work)

    arguments = ["--m", "16", "--max-seconds", "0.01"]
    arguments += ["--workload", "vit-l", "--workload", "torchtitan-debug"]
    clock = FullOnce(attention_keys_lose)
    code, text, _ = bench(*arguments, clock=clock, capsys=capsys)
    assert code == 0
    assert "out of memory" in text
    assert "in 0 of 1 workloads" in text


def test_json_goes_to_a_file_and_ctrl_c_keeps_what_is_finished(
    tmp_path, scripted_clock, capsys
):
    class Interrupted(scripted_clock):
        races = 0

        def warm_up(self, work):
            if work[0].signature is None and work[0].variant == "reference":
                self.races += 1
            if self.races == 2:
                raise KeyboardInterrupt
            super().warm_up(work)

    path = tmp_path / "bench.json"
    arguments = ["--m", "16", "--max-seconds", "0.01", "--json", str(path)]
    arguments += ["--workload", "torchtitan-debug", "--workload", "vit-l"]
    clock = Interrupted(attention_keys_lose)
    code, text, _ = bench(*arguments, clock=clock, capsys=capsys)
    assert code == 130
    assert "torchtitan-debug@16" in text
    written = json.loads(path.read_text())
    assert [x["workload"]["name"] for x in written["workloads"]] == ["torchtitan-debug"]


def test_an_unknown_workload_is_named_with_the_known_ones(capsys):
    code, _, errors = bench("--workload", "llama4", capsys=capsys)
    assert code == 2
    assert "no workload 'llama4'" in errors
    assert all(name in errors for name in NAMES)


def test_the_gpu_suite_needs_a_gpu(capsys):
    code, _, errors = bench("--suite", "gpu", capsys=capsys)
    assert code == 2
    assert "--suite gpu runs on a GPU, and the device is cpu" in errors


def test_the_gpu_suite_skips_what_does_not_fit_into_ten_minutes(monkeypatch):
    """Scripted: each workload takes 150 s, the rest nothing."""
    seconds = [0.0]
    record = Agreement(1, 1, 1, "reference", 1.0, 1.0, 1.0, 1.0, 1.0, 3, 0)

    def compared(workload, setting):
        del setting
        seconds[0] += 150
        return workload.label

    monkeypatch.setattr("fp8tune.bench.suite.clock_agreement", lambda _: [record])
    monkeypatch.setattr("fp8tune.bench.suite.compare_policies", compared)
    monkeypatch.setattr("fp8tune.bench.suite.tuning_cost", lambda *_: {"cold": {}})
    setting = setting_of(device=torch.device("cuda"))
    found, saved = Findings(), []
    suite = GpuSuite(setting, found, lambda: saved.append(1), now=lambda: seconds[0])
    suite.run()
    assert found.outcomes == [
        "llama3-70b-tp8@8192",
        "llama3-8b@8192",
        "llama3-8b@2048",
    ]
    assert found.agreement == [record]
    assert set(found.cost) == {"cold"}
    assert len(found.missing) == len(WORKLOADS) - 3
    assert found.missing[0] == "llama3-8b@16384: no time left"
    assert len(saved) == 6


def test_a_part_of_the_gpu_suite_that_fails_does_not_end_the_others(monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernels\nseen")

    monkeypatch.setattr("fp8tune.bench.suite.clock_agreement", fails)
    monkeypatch.setattr("fp8tune.bench.suite.tuning_cost", fails)
    monkeypatch.setattr("fp8tune.bench.suite.compare_policies", lambda x, _: x.label)
    setting = setting_of(device=torch.device("cuda"))
    found = Findings()
    GpuSuite(setting, found, lambda: None).run()
    assert len(found.outcomes) == len(WORKLOADS)
    assert found.missing == [
        "clock: RuntimeError: no kernels",
        "tuning cost of llama3-8b@8192: RuntimeError: no kernels",
    ]


def test_a_clock_that_cannot_be_compared_to_the_end_keeps_the_rows_before(monkeypatch):
    record = Agreement(1, 1, 1, "reference", 1.0, 1.0, 1.0, 1.0, 1.0, 3, 0)

    def one_row(_):
        yield record
        raise RuntimeError("the profiler saw 3 kernels")

    monkeypatch.setattr("fp8tune.bench.suite.clock_agreement", one_row)
    monkeypatch.setattr("fp8tune.bench.suite.tuning_cost", lambda *_: {})
    monkeypatch.setattr("fp8tune.bench.suite.compare_policies", lambda x, _: x.label)
    found = Findings()
    GpuSuite(setting_of(device=torch.device("cuda")), found, lambda: None).run()
    assert found.agreement == [record]
    assert found.missing == ["clock: RuntimeError: the profiler saw 3 kernels"]


def test_plans_that_are_not_compiled_in_time_are_not_the_oracles(scripted_clock):
    setting = setting_of(
        clock=scripted_clock(attention_keys_lose), compiled=False, max_compile_seconds=0
    )
    (workload,) = find_workloads(["llama3-8b@2048"])
    outcome = compare_policies(scaled_down(workload), setting)
    assert outcome.plans == 3
    assert "13 plans were not compiled in time for the oracle" in outcome.notes


def test_what_fails_in_the_process_that_tunes_is_said():
    expected = "tuning torchtitan-debug in a process of its own failed: .*'no such'"
    with pytest.raises(BenchError, match=expected):
        tuning_cost("torchtitan-debug", "no such", CPU)


def test_the_suite_of_costs_is_a_command(monkeypatch, capsys):
    cost = {"cold": {"tuning_s": 20.0, "warm_up_s": 18.0}}
    monkeypatch.setattr("fp8tune.commands.bench.tuning_cost", lambda *_: cost)
    code, text, _ = bench("--suite", "cost", capsys=capsys)
    assert code == 0
    assert "tuning with a cold compile cache: 20.0 s, 18.0 s of it compiling" in text


def test_without_groups_that_are_few_there_is_no_oracle(scripted_clock, monkeypatch):
    monkeypatch.setattr("fp8tune.bench.policies._MOST_EAGER_GROUPS", 2)
    setting = setting_of(clock=scripted_clock(attention_keys_lose), compiled=False)
    (workload,) = find_workloads(["llama3-8b@2048"])
    outcome = compare_policies(scaled_down(workload), setting)
    assert "no oracle: more than 2 groups of equal GEMMs" in outcome.notes
    assert [x.regret for x in outcome.rows] == [None] * 3
