"""Seconds that large caches and the command line take. Run by `make bench`."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fp8tune.commands.cli import main
from fp8tune.decision.records import Layer, Measurement, Shape, Signature
from fp8tune.store.cache import Cache, Key
from fp8tune.store.contents import Contents, Recorded
from fp8tune.store.local_file import LocalFile

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

KEY = Key((("device", "Imaginary 1000"),), "rowwise", "", "compiled")


def test_help_answers_within_three_tenths_of_a_second(
    benchmark: BenchmarkFixture,
) -> None:
    command = [sys.executable, "-m", "fp8tune", "--help"]
    benchmark.pedantic(
        lambda: subprocess.run(command, capture_output=True, check=True),  # noqa: S603
        rounds=5,
    )
    assert benchmark.stats["min"] < 0.3


def _small_run(number: int) -> tuple[Recorded, list[Measurement]]:
    shape = Shape(number, 1024, 512, "bfloat16", "float32", None, bias=False)
    seen = Signature(shape, grad_input=True, grad_weight=True, grad_bias=False)
    layer = Layer(f"model.{number}", 1024, 512, "float32", True, None, ((seen, 3),))
    times = tuple(1.0 + 0.001 * i for i in range(16))
    return Recorded((layer,)), [Measurement(seen, "rowwise", times, times)]


@pytest.fixture(scope="module")
def ten_thousand_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of a model of one layer, with 16 pairs: 12 MB."""
    path = tmp_path_factory.mktemp("large") / "runs.json"

    def fill(contents: Contents) -> Contents:
        for number in range(1, 10_001):
            contents.add(KEY, *_small_run(number))
        return contents

    LocalFile(path).update(fill)
    return path


def test_ten_thousand_runs_are_loaded_within_a_second(
    benchmark: BenchmarkFixture, ten_thousand_runs: Path
) -> None:
    benchmark.pedantic(Cache, (ten_thousand_runs,), rounds=5)
    assert benchmark.stats["min"] < 1.0


def test_a_run_is_saved_to_ten_thousand_within_a_second(
    benchmark: BenchmarkFixture, ten_thousand_runs: Path
) -> None:
    cache = Cache(ten_thousand_runs)
    numbers = iter(range(20_000, 30_000))

    def save() -> None:
        run, timed = _small_run(next(numbers))
        cache.save(KEY, run.layers, timed)

    benchmark.pedantic(save, rounds=5)
    assert benchmark.stats["min"] < 1.0


@pytest.fixture(scope="module")
def large_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 layers of 24 signatures with 64 pairs each."""
    path = tmp_path_factory.mktemp("large") / "large.json"
    shapes = [
        Shape(m, 4096, 256 * n, "bfloat16", "bfloat16", None, False)
        for n in range(1, 13)
        for m in (17, 8192)
    ]
    signatures = [Signature(shape, True, True, False) for shape in shapes]
    times = [
        Measurement(
            signature,
            "rowwise",
            tuple(1.5 + 0.01 * ((i * 7) % 11) for i in range(64)),
            tuple(1.2 + 0.01 * ((i * 5) % 13) for i in range(64)),
        )
        for signature in signatures
    ]
    layers = tuple(
        Layer(
            f"blocks.{i // 96}.experts.{i // 12 % 8}.w{i % 12}",
            4096,
            256 * (i % 12 + 1),
            "bfloat16",
            True,
            None,
            ((signatures[i % 12 * 2], 3), (signatures[i % 12 * 2 + 1], 9)),
        )
        for i in range(10_000)
    )
    key = Key((("device", "Imaginary 1000"),), "rowwise", "", "compiled")
    Cache(path).save(key, layers, times)
    return path


@pytest.mark.parametrize("options", [[], ["--all"], ["--json"], ["--all", "--json"]])
def test_ten_thousand_layers_are_shown_within_a_second(
    benchmark: BenchmarkFixture, large_cache: Path, options: list[str]
) -> None:
    benchmark.pedantic(main, (["show", str(large_cache), *options],), rounds=3)
    assert benchmark.stats["min"] < 1.0
