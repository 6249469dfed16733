"""Which devices are said to have float8 and mx GEMMs, NVIDIA's and AMD's."""

from types import SimpleNamespace

import pytest
import torch
from torchao.float8 import Float8LinearConfig

from fp8tune.recipes import resolve_recipes
from fp8tune.recipes.hardware import has_float8_gemms, has_mx_gemms, runs_converted
from fp8tune.recipes.registry import get_recipe, resolve_recipe
from fp8tune.store.environment import describe_environment

GPU = torch.device("cuda")


@pytest.fixture
def pretend(monkeypatch):
    """A GPU of that capability, or of that architecture of AMD's."""

    def device(capability, architecture=None):
        hip = "7.0" if architecture else None
        properties = SimpleNamespace(
            gcnArchName=architecture or "", name="Imaginary", multi_processor_count=1
        )
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    return device


@pytest.fixture
def kernels(monkeypatch):
    """Which recipes' small layer runs; those of the others raise."""

    def running(*names):
        def runs(name, convert, device):
            del convert, device
            return name in names

        for module in ("torchao", "mx"):
            monkeypatch.setattr(f"fp8tune.recipes.{module}.runs_converted", runs)

    return running


@pytest.mark.parametrize(
    ("capability", "float8", "mx"),
    [
        ((8, 8), False, False),
        ((8, 9), True, False),
        ((9, 0), True, False),
        ((10, 0), True, True),
        ((12, 0), True, True),
    ],
)
def test_nvidia(pretend, capability, float8, mx):
    pretend(capability)
    assert has_float8_gemms(GPU) is float8
    assert has_mx_gemms(GPU) is mx


@pytest.mark.parametrize(
    ("capability", "architecture", "float8"),
    [
        ((9, 0), "gfx90a:sramecc+:xnack-", False),
        ((9, 4), "gfx942:sramecc+:xnack-", True),
        ((9, 5), "gfx950:sramecc+:xnack-", True),
        ((11, 0), "gfx1100", False),
        ((12, 0), "gfx1201", True),
    ],
)
def test_amd_is_told_by_its_architecture(pretend, capability, architecture, float8):
    pretend(capability, architecture)
    assert has_float8_gemms(GPU) is float8
    assert has_mx_gemms(GPU) is False


def test_a_cpu_has_none():
    assert not has_float8_gemms(torch.device("cpu"))
    assert not has_mx_gemms(torch.device("cpu"))


def test_auto_takes_what_the_device_runs_natively(pretend, kernels):
    pretend((8, 9))
    kernels("tensorwise")
    assert resolve_recipes("auto", "cuda").names == ["bf16", "tensorwise"]
    kernels("rowwise", "rowwise_with_gw_hp", "tensorwise")
    names = ["bf16", "rowwise", "rowwise_with_gw_hp", "tensorwise"]
    assert resolve_recipes("auto", "cuda").names == names
    pretend((9, 4), "gfx942")
    assert resolve_recipes("auto", "cuda").names == names
    pretend((8, 6))
    assert resolve_recipes("auto", "cuda").names == ["bf16"]


@pytest.mark.parametrize("runs", [True, False])
def test_rowwise_on_an_l40s_is_emulated_only_if_its_kernels_do_not_run(
    pretend, kernels, runs
):
    pretend((8, 9))
    kernels(*(["rowwise"] if runs else []))
    assert get_recipe("rowwise", "cuda").emulated is not runs
    assert f"emulate={not runs}" in get_recipe("rowwise", "cuda").settings
    assert get_recipe("rowwise", "cpu").emulated


CPU = torch.device("cpu")


def test_the_layer_that_is_tried_runs_as_in_training_and_leaves_no_trace():
    seen = []

    def convert(linear):
        def note(module, args, output):
            del module
            grad, cast = output.requires_grad, torch.is_autocast_enabled("cpu")
            seen.append((args[0].dtype, grad, cast))

        linear.register_forward_hook(note)

    before = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert runs_converted("rowwise", convert, CPU)
        assert not torch.is_grad_enabled()
    assert seen == [(torch.bfloat16, True, False)]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("error", "runs"),
    [
        (RuntimeError("no kernel for sm_89\nmore"), False),
        (AssertionError("requires 9.0"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
    ],
)
def test_a_layer_that_fails_says_why_unless_memory_ran_out(error, runs, caplog):
    def convert(linear):
        del linear
        raise error

    assert runs_converted("rowwise", convert, CPU) is runs
    said = "rowwise is emulated on cpu: " in caplog.text
    assert said is not runs
    assert "more" not in caplog.text


def test_where_there_is_no_driver_meta_models_run_on_the_cpu(monkeypatch):
    """As torch's CUDA build answers on a laptop."""

    def current_accelerator(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert get_recipe("rowwise", "meta").emulated
    assert resolve_recipe(Float8LinearConfig(), "meta").emulated


def test_the_environment_names_the_platform(pretend):
    pretend((9, 4), "gfx942")
    amd = dict(describe_environment(GPU))
    assert amd["rocm"] == "7.0"
    assert "cuda" not in amd
    pretend((9, 0))
    nvidia = dict(describe_environment(GPU))
    assert "cuda" in nvidia
    assert "rocm" not in nvidia
