"""What several test files share: scripted clocks, and processes that form ranks."""

from __future__ import annotations

import multiprocessing
import os
import uuid
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from fp8tune.clock import Work
    from fp8tune.records import Signature

    Script = Callable[[Signature, str], float]


class ScriptedClock:
    """Answers with the script's milliseconds and never runs the work.

    Attributes:
        timed: how often each (signature, variant) was timed.
        warmed: how often each was warmed up.
    """

    def __init__(self, script: Script) -> None:
        self._script = script
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


@pytest.fixture
def scripted_clock() -> type[ScriptedClock]:
    return ScriptedClock


def _refuse(signature: Signature, variant: str) -> float:
    raise AssertionError(f"{variant} of {signature} was timed")


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
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=seconds),
    )
    try:
        answer: object = function(*arguments)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        answer = f"{type(error).__name__}: {error}"
    answers.put((rank, answer))
    answers.close()
    answers.join_thread()
    # Not destroy_process_group, which may wait for a rank that died.
    os._exit(0)


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
        seconds: float = 30,
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
            return dict(answers.get(timeout=50) for _ in range(world - dying))
        finally:
            for process in processes:
                process.kill()
                process.join()


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)
