"""Which devices are said to have float8 and mx GEMMs, NVIDIA's and AMD's."""

from types import SimpleNamespace

import pytest
import torch

from fp8tune.environment import describe_environment
from fp8tune.hardware import has_float8_gemms, has_mx_gemms
from fp8tune.recipes import resolve_recipes

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


@pytest.mark.parametrize(
    ("capability", "tensorwise", "rowwise", "mx"),
    [
        ((8, 8), False, False, False),
        ((8, 9), True, False, False),
        ((9, 0), True, True, False),
        ((10, 0), True, True, True),
        ((12, 0), True, True, True),
    ],
)
def test_nvidia(pretend, capability, tensorwise, rowwise, mx):
    pretend(capability)
    assert has_float8_gemms(GPU, rowwise=False) is tensorwise
    assert has_float8_gemms(GPU, rowwise=True) is rowwise
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
    assert has_float8_gemms(GPU, rowwise=False) is float8
    assert has_float8_gemms(GPU, rowwise=True) is float8
    assert has_mx_gemms(GPU) is False


def test_a_cpu_has_none():
    assert not has_float8_gemms(torch.device("cpu"), rowwise=False)
    assert not has_mx_gemms(torch.device("cpu"))


def test_auto_takes_what_the_device_runs_natively(pretend):
    pretend((8, 9))
    assert resolve_recipes("auto", "cuda").names == ["bf16", "tensorwise"]
    pretend((9, 4), "gfx942")
    names = ["bf16", "rowwise", "rowwise_with_gw_hp", "tensorwise"]
    assert resolve_recipes("auto", "cuda").names == names


def test_the_environment_names_the_platform(pretend):
    pretend((9, 4), "gfx942")
    amd = dict(describe_environment(GPU))
    assert amd["rocm"] == "7.0"
    assert "cuda" not in amd
    pretend((9, 0))
    nvidia = dict(describe_environment(GPU))
    assert "cuda" in nvidia
    assert "rocm" not in nvidia
