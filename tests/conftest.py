"""What several test files share: scripted clocks, and processes that form ranks."""

from __future__ import annotations

import math
import multiprocessing
import os
import uuid
import weakref
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Layer, Measurement, Signature
from fp8tune.recipes import registry
from fp8tune.store.cache import Cache, Key
from fp8tune.trial.search import Role
from fp8tune.tuner import ending
from tests.helpers import load_example, signature, tried
from tests.simulated_gpu import SimulatedGpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from fp8tune.timing.clock import Work
    from fp8tune.trial.search import TrialPlan

    Script = Callable[[Signature, str], float]
    StepScript = Callable[[set[str]], float]


class ScriptedClock:
    """Answers with the script's milliseconds and never runs the work.

    A training step in a trial is answered by its own script, which gets the names of the
    roles that are converted in it.

    Attributes:
        timed: how often each (signature, variant) was timed.
        warmed: how often each was warmed up.
    """

    def __init__(self, script: Script, steps: StepScript | None = None) -> None:
        self._script = script
        self._steps = steps
        self._seconds = 0.0
        self.timed: Counter[tuple[Signature, str]] = Counter()
        self.warmed: Counter[tuple[Signature, str]] = Counter()

    def warm_up(self, work: Sequence[Work]) -> None:
        self.warmed.update((item.signature, item.variant) for item in work)

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        self.timed.update((item.signature, item.variant) for item in work)
        times = [self._script(item.signature, item.variant) for item in work]
        self._seconds += sum(times) / 1e3
        return times

    def now(self) -> float:
        return self._seconds

    def mark(self) -> None:
        return None

    def elapsed_ms(self, start: None, end: None, what: TrialPlan) -> float:
        del start, end
        assert self._steps is not None, "no script for training steps"
        return self._steps({role.name for role in what})


class WorkingClock(ScriptedClock):
    """A scripted clock that does run what it warms up, so that accuracy is measured."""

    def warm_up(self, work: Sequence[Work]) -> None:
        super().warm_up(work)
        for item in work:
            item()


@pytest.fixture(autouse=True)
def _no_late_words(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test leaves untuned is not said in the log of another."""
    made: list[weakref.finalize[..., Any]] = []

    def noted(*arguments: Any) -> None:
        made.append(weakref.finalize(*arguments))

    monkeypatch.setattr(ending, "finalize", noted)
    yield
    for finalizer in made:
        finalizer.detach()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window, as examples/screenshots.py drives it."""
    screenshots = load_example("screenshots")
    if screenshots.CHROMIUM is None:
        pytest.skip("there is no program chromium here (Debian: apt install chromium)")
    with screenshots.Browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def scripted_clock() -> type[ScriptedClock]:
    return ScriptedClock


def _refuse(signature: Signature, variant: str) -> float:
    raise AssertionError(f"{variant} of {signature} was timed")


@pytest.fixture(scope="session")
def working_clock() -> type[WorkingClock]:
    return WorkingClock


@pytest.fixture
def silent_clock() -> ScriptedClock:
    """A clock that must not be asked."""
    return ScriptedClock(_refuse)


def _rank_main(
    rank: int,
    group: tuple[int, str, float],
    answers: multiprocessing.Queue[tuple[int, object]],
    function: Callable[..., object],
    arguments: tuple[object, ...],
) -> None:
    world, store, seconds = group
    torch.set_num_threads(1)
    file = f"{store}-present"
    present = torch.distributed.FileStore(file, world)  # pyright: ignore[reportPrivateImportUsage]
    # Before and after, or one that dies early or comes late ends the others' connecting.
    _wait_for_all(present, "started", rank, world)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=seconds),
    )
    _wait_for_all(present, "connected", rank, world)
    try:
        answer: object = function(*arguments)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        answer = f"{type(error).__name__}: {error}"
    answers.put((rank, answer))
    answers.close()
    answers.join_thread()
    # Not destroy_process_group, which may wait for a rank that died.
    os._exit(0)


def _wait_for_all(store: Any, what: str, rank: int, world: int) -> None:
    store.set(f"{what} {rank}", "")
    store.wait([f"{what} {x}" for x in range(world)], timedelta(seconds=60))


class Ranks:
    """Runs a function in several processes that form a gloo process group."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["fp8tune.auto"])

    def __call__(
        self,
        world: int,
        function: Callable[..., object],
        *arguments: object,
        seconds: float = 60,
        dying: int = 0,
    ) -> dict[int, object]:
        """Each rank's answer, or its error as text; ranks that died have none.

        Args:
            world: number of ranks.
            function: a function of a test module, called with the arguments.
            arguments: what can be pickled.
            seconds: timeout of the process group.
            dying: how many ranks are expected to die without an answer.
        """
        answers = self._context.Queue()
        store = str(self._folder / uuid.uuid4().hex)
        shared = ((world, store, seconds), answers, function, arguments)
        processes = [
            self._context.Process(target=_rank_main, args=(rank, *shared))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            return dict(answers.get(timeout=150) for _ in range(world - dying))
        finally:
            for process in processes:
                process.kill()
                process.join()


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


# A cache file such as two trainings leave, for what shows caches.

_SIZES = {
    "attention.wq": (4096, 4096),
    "attention.wk": (4096, 1024),
    "attention.wv": (4096, 1024),
    "attention.wo": (4096, 4096),
    "feed_forward.w1": (4096, 14336),
    "feed_forward.w2": (14336, 4096),
    "feed_forward.w3": (4096, 14336),
}


def _llama_layers(rows: int, blocks: int) -> tuple[Layer, ...]:
    layers = [
        Layer(
            f"layers.{i}.{name}",
            k,
            n,
            "bfloat16",
            True,
            None,
            ((signature(17, k, n), 1), (signature(rows, k, n), 12))
            if name == "attention.wo"
            else ((signature(rows, k, n), 12),),
        )
        for i in range(blocks)
        for name, (k, n) in _SIZES.items()
    ]
    left_out = Reason.FILTERED_BY_NAME
    return (*layers, Layer("output", 4096, 128256, "bfloat16", True, left_out))


def _timed(signature: Signature, gain: float, recorded: str) -> Measurement:
    """32 pairs; large layers gain more, and every fourth pair is disturbed."""
    shape = signature.shape
    reference = 6 * shape.m * shape.k * shape.n / 6e11
    speedup = gain * (0.62 + 0.09 * math.log2(shape.m * shape.n / 2**20 + 1))
    wobbles = [1 + 0.004 * (i % 7) + 0.03 * (i % 4 == 0) for i in range(32)]
    return Measurement(
        signature,
        "rowwise",
        tuple(round(reference * x, 6) for x in wobbles),
        tuple(round(reference / speedup * x, 6) for x in reversed(wobbles)),
        recorded=recorded,
    )


@pytest.fixture
def llama_cache(tmp_path: Path) -> Path:
    """llama.json holds a run with torch 2.12 and a later one with torch 2.13."""
    path = tmp_path / "llama.json"
    runs = [("2.12.0", 8192, 1.0, "2026-01-31"), ("2.13.0", 2048, 1.1, "2026-03-01")]
    for version, rows, gain, recorded in runs:
        environment = (("device", "Imaginary 1000"), ("torch", version))
        key = Key(environment, "rowwise", "rowwise, emulate=False", "compiled")
        layers = _llama_layers(rows, 32)
        called = sorted({signature for x in layers for signature, _ in x.calls})
        timed = [_timed(signature, gain, recorded) for signature in called]
        Cache(path).save(key, layers, timed)
    return path


# What converting each role saves a training step: by its own timing, and in the step.
_SAVED = {
    "attention.wq": (3.0, 3.5),
    "attention.wk": (-1.0, 1.5),
    "attention.wv": (-1.0, 1.25),
    "attention.wo": (2.0, -4.0),
    "feed_forward.w1": (8.0, 7.0),
    "feed_forward.w2": (8.0, 9.0),
    "feed_forward.w3": (8.0, 7.0),
}


@pytest.fixture
def tried_cache(llama_cache: Path) -> Path:
    """tried.json, beside llama.json, holds a run of two blocks with a trial."""
    path = llama_cache.with_name("tried.json")
    environment = (("device", "Imaginary 1000"), ("torch", "2.13.0"))
    key = Key(environment, "rowwise", "rowwise, emulate=False", "compiled")
    layers = _llama_layers(2048, 2)
    called = sorted({signature for x in layers for signature, _ in x.calls})
    roles = tuple(
        Role(
            name=f"layers.{{}}.{name}",
            fqns=tuple(f"layers.{i}.{name}" for i in range(2)),
            family="" if name.endswith(("wo", "w2")) else name.split(".")[0],
            gain_ms=alone,
            spread_ms=0.25,
        )
        for name, (alone, _) in _SAVED.items()
    )
    trial = tried(roles, tuple(saved for _, saved in _SAVED.values()))
    timed = [_timed(x, 1.1, "2026-03-01") for x in called]
    Cache(path).save(key, layers, timed, trial)
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads on two busy cores mostly wait for each other at barriers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of recipes that forgets what the test registers."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    """torch.cuda is a simulation with one device; see tests/simulated_gpu.py."""
    simulated = SimulatedGpu()
    simulated.install(monkeypatch)
    return simulated
