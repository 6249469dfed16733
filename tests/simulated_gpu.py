"""A discrete-event simulation of torch.cuda, for what a machine without a GPU can show.

The CPU has a clock of its own, in microseconds, and pays for each launch. Each stream
runs what was launched on it in order; what a kernel begins with is known when it is
launched, since it waits for nothing but its stream and the events that the stream was
told to wait for. The queue of a device holds 1,024 entries; a launch into a full one
waits for the oldest to end.

    gpu = SimulatedGpu()
    gpu.install(monkeypatch)          # torch.cuda is the simulation from here on
    clock = CudaClock(torch.device("cuda", 0))
    clock.time_ms([gpu.work([5.0, 7.0])])     # two kernels of 5 and 7 us
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from fp8tune.decision.records import REFERENCE
from tests.helpers import signature as a_signature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pytest

    from fp8tune.decision.records import Signature

__all__ = ["SimulatedGpu", "Work"]


@dataclass(eq=False)
class Stream:
    """What was launched here runs in order."""

    device: int
    free_at: float = 0.0

    def wait_stream(self, other: Stream) -> None:
        self.free_at = max(self.free_at, other.free_at)


@dataclass
class Memory:
    """What torch's allocator accounts for on one device."""

    total: int = 80 * 2**30
    allocated: int = 0
    peak: int = 0
    reserved: int = 0
    resets: int = 0

    def allocate(self, size: int) -> None:
        if self.allocated + size > self.total:
            raise torch.OutOfMemoryError(f"tried to allocate {size} bytes")
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, self.allocated)

    def reset(self) -> None:
        self.resets += 1
        self.peak = self.allocated

    def free(self) -> tuple[int, int]:
        return self.total - self.reserved, self.total


@dataclass
class Device:
    index: int
    default: Stream
    pending: deque[float] = field(default_factory=deque)
    cached: OrderedDict[str, int] = field(default_factory=OrderedDict)
    memory: Memory = field(default_factory=Memory)


class SimulatedGpu:
    """Devices, streams, events and the CPU that launches.

    Attributes:
        now_us: the CPU's clock.
        launch_us: what a launch costs the CPU.
        jitter: a launch costs up to this share more or less.
        pauses: microseconds that the CPU stops for, before the launch of that number.
        sleep_factor: how much longer ``_sleep`` takes than when 1,900 cycles were 1 us.
        slowdown: how much longer a kernel takes that begins at this time of the GPU.
        blocking: as with CUDA_LAUNCH_BLOCKING=1.
        launches: kernels so far.
    """

    QUEUE = 1024
    CYCLES_PER_US = 1900.0
    L2_BYTES = 50 * 2**20
    # What the CPU pays for an event, a question and a wait; and the GPU for an event.
    EVENT_CPU_US = 1.5
    EVENT_GPU_US = 0.5
    # CUDA's documentation of cudaEventElapsedTime: about half a microsecond.
    RESOLUTION_US = 0.5
    # Bytes that a second of zeroing writes, 2.5 TB.
    ZEROED_PER_US = 2.5e6

    def __init__(self, devices: int = 1, seed: int = 0) -> None:
        self.devices = [Device(i, Stream(i)) for i in range(devices)]
        self.current = 0
        self.streams = {i: x.default for i, x in enumerate(self.devices)}
        self.now_us = 0.0
        self.launch_us = 5.0
        self.jitter = 0.0
        self.pauses: dict[int, float] = {}
        self.sleep_factor: Callable[[], float] = lambda: 1.0
        self.slowdown: Callable[[float], float] = lambda at: 1.0
        self.blocking = False
        self.launches = 0
        self.after_block: Callable[[float], None] = lambda at: None
        self._sides: list[Stream] = []
        self._random = random.Random(seed)  # noqa: S311 - jitter

    # The CPU

    def cpu(self, microseconds: float) -> None:
        """The CPU is busy for so long."""
        self.now_us += microseconds

    def seconds(self) -> float:
        """``time.perf_counter``."""
        self.now_us += 0.05
        return self.now_us / 1e6

    # Kernels

    def launch(
        self, microseconds: float, stream: Stream | None = None, reads: str = ""
    ) -> None:
        """A kernel on a stream, by default the current one.

        Args:
            microseconds: what it takes with cold caches.
            stream: where.
            reads: a name of what it reads, 10 MB that are read in 60% of the time if
                they lie in L2.
        """
        self.launches += 1
        self.cpu(self.pauses.pop(self.launches, 0.0))
        self.cpu(self.launch_us * (1 + self.jitter * self._random.uniform(-1, 1)))
        stream = stream or self.streams[self.current]
        device = self.devices[stream.device]
        if reads and self.touch(device, reads, 10 * 2**20):
            microseconds *= 0.6
        self.enqueue(stream, microseconds, scaled=True)

    def touch(self, device: Device, name: str, size: int) -> bool:
        """Whether it lay in L2, where it lies now."""
        found = device.cached.pop(name, None) is not None
        device.cached[name] = min(size, self.L2_BYTES)
        while sum(device.cached.values()) > self.L2_BYTES:
            device.cached.popitem(last=False)
        return found

    def enqueue(
        self, stream: Stream, microseconds: float, *, scaled: bool = False
    ) -> float:
        """When it ends on the GPU."""
        pending = self.devices[stream.device].pending
        while len(pending) >= self.QUEUE:
            self.now_us = max(self.now_us, pending.popleft())
        while pending and pending[0] <= self.now_us:
            pending.popleft()
        start = max(self.now_us, stream.free_at)
        if scaled:
            microseconds *= self.slowdown(start)
        stream.free_at = start + microseconds
        pending.append(stream.free_at)
        if self.blocking:
            self.now_us = max(self.now_us, stream.free_at)
        return stream.free_at

    def sleep(self, cycles: int) -> None:
        """``torch.cuda._sleep``."""
        self.cpu(self.launch_us)
        microseconds = cycles / self.CYCLES_PER_US * self.sleep_factor()
        end = self.enqueue(self.streams[self.current], microseconds)
        self.after_block(end)

    def synchronize(self, device: Any = None) -> None:
        """Wait for every stream of a device."""
        index = self.index(device)
        known = [self.devices[index].default, *self._sides]
        ends = [x.free_at for x in known if x.device == index]
        self.now_us = max(self.now_us + 1.0, *ends)

    def index(self, device: Any) -> int:
        if device is None:
            return self.current
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return self.current if index is None else index

    # What torch.cuda is replaced by

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the simulation in the place of torch.cuda and of the timing's clock."""
        functions = {**self._work_functions(), **self._memory_functions()}
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch, "empty", partial(self._empty, torch.empty))
        counter = SimpleNamespace(perf_counter=self.seconds, monotonic=self.seconds)
        for module in ("cuda_clock", "warming"):
            monkeypatch.setattr(f"fp8tune.timing.{module}.time", counter)

    def _work_functions(self) -> dict[str, Any]:
        return {
            "Event": partial(Event, self),
            "Stream": self._side_stream,
            "stream": self._on_stream,
            "device": self._on_device,
            "current_stream": lambda device=None: self.streams[self.index(device)],
            "current_device": lambda: self.current,
            "device_count": lambda: len(self.devices),
            "is_available": lambda: True,
            "is_current_stream_capturing": lambda: False,
            "synchronize": self.synchronize,
            "_sleep": self.sleep,
            "get_device_properties": self._properties,
            "get_device_capability": lambda device=None: (9, 0),
        }

    def _memory_functions(self) -> dict[str, Any]:
        return {
            "memory_allocated": lambda device=None: self.memory(device).allocated,
            "memory_reserved": lambda device=None: self.memory(device).reserved,
            "max_memory_allocated": lambda device=None: self.memory(device).peak,
            "reset_peak_memory_stats": lambda device=None: self.memory(device).reset(),
            "mem_get_info": lambda device=None: self.memory(device).free(),
            "empty_cache": self._trim,
        }

    def memory(self, device: Any = None) -> Memory:
        return self.devices[self.index(device)].memory

    def _trim(self) -> None:
        for x in self.devices:
            x.memory.reserved = x.memory.allocated

    def _side_stream(self, device: Any = None) -> Stream:
        stream = Stream(self.index(device))
        self._sides.append(stream)
        return stream

    @contextmanager
    def _on_device(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, self.index(device)
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def _on_stream(self, stream: Stream) -> Iterator[None]:
        before = self.streams[stream.device]
        self.streams[stream.device] = stream
        with self._on_device(stream.device):
            try:
                yield
            finally:
                self.streams[stream.device] = before

    def _properties(self, device: Any = None) -> Any:
        return SimpleNamespace(
            name="Simulated GPU",
            L2_cache_size=self.L2_BYTES,
            total_memory=self.memory(device).total,
            multi_processor_count=132,
            gcnArchName="",
        )

    def _empty(self, empty: Callable[..., Any], *size: Any, **options: Any) -> Any:
        device = torch.device(options.get("device") or "cpu")
        if device.type != "cuda":
            return empty(*size, **options)
        return Buffer(self, self.index(device), int(size[0]))

    def work(
        self,
        kernels: Sequence[float],
        variant: str = REFERENCE,
        *,
        signature: Signature | None = None,
        **options: Any,
    ) -> Work:
        """Kernels of so many microseconds each, launched one after the other."""
        return Work(
            self,
            list(kernels),
            variant,
            signature or a_signature(16, 16, 16),
            **options,
        )


class Event:
    """``torch.cuda.Event``."""

    def __init__(self, gpu: SimulatedGpu, enable_timing: bool = False) -> None:
        self._gpu = gpu
        self._timing = enable_timing
        self._at: float | None = None
        self.device = -1

    def record(self, stream: Stream | None = None) -> None:
        gpu = self._gpu
        gpu.cpu(gpu.EVENT_CPU_US)
        place = stream or gpu.streams[gpu.current]
        self.device = place.device
        self._at = gpu.enqueue(place, gpu.EVENT_GPU_US)

    def query(self) -> bool:
        self._gpu.cpu(self._gpu.EVENT_CPU_US)
        return self._at is None or self._at <= self._gpu.now_us

    def synchronize(self) -> None:
        if self._at is not None:
            self._gpu.now_us = max(self._gpu.now_us, self._at)

    def wait(self, stream: Stream | None = None) -> None:
        place = stream or self._gpu.streams[self._gpu.current]
        place.free_at = max(place.free_at, self._at or 0.0)

    def elapsed_time(self, end: Event) -> float:
        if self._at is None or end._at is None:
            raise RuntimeError("Both events must be recorded")
        if not (self._timing and end._timing):
            raise RuntimeError("Both events must be created with timing")
        if self.device != end.device:
            raise RuntimeError("events of two devices")
        if max(self._at, end._at) > self._gpu.now_us:
            raise RuntimeError("CUDA error: device not ready")
        ticks = round((end._at - self._at) / self._gpu.RESOLUTION_US)
        return ticks * self._gpu.RESOLUTION_US / 1e3


class Buffer:
    """Bytes on a simulated device."""

    def __init__(self, gpu: SimulatedGpu, device: int, size: int) -> None:
        self._gpu = gpu
        self._device = device
        self.nbytes = size
        gpu.devices[device].memory.allocate(size)

    def __del__(self) -> None:
        self._gpu.devices[self._device].memory.allocated -= self.nbytes

    def zero_(self) -> None:
        gpu, device = self._gpu, self._gpu.devices[self._device]
        gpu.cpu(gpu.launch_us)
        gpu.touch(device, f"buffer {id(self)}", self.nbytes)
        # As a CUDA memset does, whichever device is current.
        gpu.enqueue(gpu.streams[self._device], self.nbytes / gpu.ZEROED_PER_US)


@dataclass(eq=False)
class Work:
    """Work for a clock.

    Attributes:
        kernels: microseconds of each.
        device: where they run.
        python_us: what the CPU needs besides launching.
        waits: whether the CPU waits for the GPU in between, as ``.item()`` does.
        allocates: bytes that are allocated while it runs, which blocks the CPU until
            the GPU is done if there are none left.
        error: raised after the first kernel.
        reads: see ``SimulatedGpu.launch``.
    """

    gpu: SimulatedGpu
    kernels: list[float]
    variant: str
    signature: Signature
    device: Any = None
    python_us: float = 0.0
    waits: bool = False
    allocates: int = 0
    error: Exception | None = None
    reads: str = ""
    calls: int = 0
    side: Any = None

    def __call__(self) -> None:
        gpu = self.gpu
        self.calls += 1
        gpu.cpu(self.python_us)
        index = gpu.index(self.device)
        memory = gpu.devices[index].memory
        if memory.reserved + self.allocates > memory.total:
            # cudaFree waits for all that was launched.
            gpu.synchronize(index)
        memory.allocate(self.allocates)
        try:
            self._launch(index)
        finally:
            memory.allocated -= self.allocates

    @property
    def works(self) -> list[Work]:
        return [self]

    def _launch(self, index: int) -> None:
        gpu = self.gpu
        main = gpu.streams[index]
        stream = self.side or main
        stream.free_at = (
            max(stream.free_at, main.free_at) if self.side else main.free_at
        )
        for kernel in self.kernels:
            gpu.launch(kernel, stream, self.reads)
            if self.error:
                raise self.error
        if self.side:
            main.free_at = max(main.free_at, stream.free_at)
        if self.waits:
            gpu.synchronize(index)

    @property
    def true_ms(self) -> float:
        """What a clock should find with cold caches at the GPU's usual speed."""
        return sum(self.kernels) / 1e3
