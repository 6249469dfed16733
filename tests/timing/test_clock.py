"""Real clocks: the CPU's everywhere, CUDA events where there is a GPU."""

import itertools
import time
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fp8tune.compiling.cuda_graphs import without_cuda_graphs
from fp8tune.decision.records import REFERENCE, Shape, Signature
from fp8tune.model.candidates import Sample
from fp8tune.timing import warming
from fp8tune.timing.clocks import clock_for
from fp8tune.timing.cpu_clock import CpuClock
from fp8tune.timing.cuda_clock import CudaClock, block_gpu
from fp8tune.timing.operands import Operands
from fp8tune.timing.replay import Replay

SHAPE = Shape(16, 16, 16, "bfloat16", "bfloat16", None, False)
SIGNATURE = Signature(SHAPE, grad_input=True, grad_weight=True, grad_bias=False)

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA or ROCm device"
)


class Item:
    """Work that runs a function, after a pause of the CPU."""

    signature = SIGNATURE
    variant = REFERENCE

    def __init__(self, run, pause_s=0.0):
        self._run = run
        self._pause_s = pause_s

    def __call__(self):
        if self._pause_s:
            time.sleep(self._pause_s)
        self._run()


def busy_for(seconds):
    """Work that keeps a core busy for so long."""

    def run():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return Item(run)


@pytest.fixture
def cuda_clock():
    """A clock on a GPU that has left its idle state."""
    device = torch.device("cuda", torch.cuda.current_device())
    operand = torch.zeros(4096, 4096, device=device)
    for _ in range(20):
        operand @ operand
    torch.cuda.synchronize()
    return CudaClock(device)


def small_linear(pause_s=0.0):
    """The forward of a Linear that takes the GPU less time than its launch the CPU."""
    linear = nn.Linear(512, 512, bias=False, device="cuda", dtype=torch.bfloat16)
    tensor = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    return Item(lambda: linear(tensor), pause_s)


def test_each_piece_of_work_has_its_own_time():
    work = [busy_for(0.02), busy_for(0.04)] * 5
    times = CpuClock().time_ms(work)
    assert min(times[0::2]) >= 20
    assert min(times[1::2]) >= 40


def test_cpu_times_are_milliseconds():
    (milliseconds,) = CpuClock().time_ms([busy_for(0.010)])
    assert 10 <= milliseconds < 1000


def test_flushing_the_caches_is_not_timed():
    clock = CpuClock()
    start = time.perf_counter()
    times = clock.time_ms([Item(lambda: None)] * 20)
    all_ms = (time.perf_counter() - start) * 1e3
    assert sum(times) < all_ms / 10


def test_cpu_work_runs_in_order_with_one_time_each():
    order = []
    work = [Item(lambda i=i: order.append(i)) for i in range(5)]
    assert len(CpuClock().time_ms(work)) == 5
    assert order == list(range(5))


class Script:
    """Time that passes only while the work runs, as the test says."""

    def __init__(self, monkeypatch, first_ms, then_ms):
        self._ms = itertools.chain(first_ms, itertools.cycle(then_ms))
        self._now = 0.0
        self.calls = 0
        scripted = SimpleNamespace(perf_counter=lambda: self._now)
        monkeypatch.setattr(warming, "time", scripted)

    def __call__(self):
        self._now += next(self._ms) / 1e3
        self.calls += 1


@pytest.mark.parametrize(
    ("slow_ms", "calls"),
    [((), 3), ((60,), 3), ((60, 20), 4), ((120, 40, 8), 5), ((60, 2, 20), 5)],
    ids=["none", "compiling", "two", "three", "autotuning later"],
)
def test_warming_up_goes_on_until_two_calls_are_as_fast_as_it_gets(
    monkeypatch, slow_ms, calls
):
    run = Script(monkeypatch, slow_ms, [2.0])
    CpuClock().warm_up([Item(run)])
    assert run.calls == calls


def test_warming_up_ends_though_the_work_never_settles(monkeypatch):
    run = Script(monkeypatch, [], [30.0, 0.1])
    CpuClock().warm_up([Item(run)])
    assert run.calls == 10


def test_each_piece_of_work_is_warmed_up_by_itself():
    calls = []
    work = [Item(lambda: calls.append("a")), Item(lambda: calls.append("b"))]
    CpuClock().warm_up(work)
    assert min(calls.count("a"), calls.count("b")) >= 3
    assert calls == sorted(calls)


def test_the_cpu_clock_is_in_seconds():
    clock = CpuClock()
    before = clock.now()
    time.sleep(0.05)
    assert 0.05 <= clock.now() - before < 5


def test_the_cpu_clock_leaves_the_seed():
    before = torch.get_rng_state()
    CpuClock().time_ms([Item(lambda: None)])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cpu_has_a_clock():
    assert isinstance(clock_for(torch.device("cpu")), CpuClock)


@pytest.mark.parametrize("kind", ["meta", "mps", "xpu"])
def test_other_devices_have_none_and_the_error_says_what_to_do(kind):
    expected = f"no clock for device type '{kind}'; pass clock="
    with pytest.raises(NotImplementedError, match=expected):
        clock_for(torch.device(kind))


def test_torch_still_has_the_kernel_that_blocks():
    assert callable(getattr(torch.cuda, "_sleep", None)), (
        "torch.cuda._sleep is gone: without it fp8tune.timing.cuda_clock.block_gpu does nothing, "
        "and times of small layers include launch gaps"
    )


def test_without_that_kernel_nothing_blocks(monkeypatch):
    monkeypatch.delattr(torch.cuda, "_sleep", raising=False)
    block_gpu(10**9)


# CUDA graphs

NO_GRAPHS = {"triton.cudagraphs": False}
AUTOTUNED = {"max_autotune": True, "coordinate_descent_tuning": True}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"options": NO_GRAPHS}),
        ({"mode": "default"}, {"options": NO_GRAPHS}),
        ({"mode": "reduce-overhead"}, {"options": NO_GRAPHS}),
        ({"mode": "max-autotune"}, {"options": AUTOTUNED | NO_GRAPHS}),
        (
            {"fullgraph": True, "options": {"triton.cudagraphs": True, "a": 1}},
            {"fullgraph": True, "options": {"a": 1} | NO_GRAPHS},
        ),
        ({"backend": "cudagraphs"}, {"backend": "aot_eager"}),
        ({"backend": "eager", "mode": None}, {"backend": "eager", "mode": None}),
    ],
)
def test_compile_options_keep_all_but_cuda_graphs(options, expected):
    before = repr(options)
    assert without_cuda_graphs(options) == expected
    assert repr(options) == before


def test_every_mode_of_torch_is_taken():
    for mode in torch._inductor.list_mode_options():
        options = without_cuda_graphs({"mode": mode})
        assert options["options"]["triton.cudagraphs"] is False
        assert torch.compile(nn.Linear(1, 1), **options) is not None


def compiled_linear(device, **options):
    """Work compiled with these options, on float32."""
    shape = Shape(64, 128, 128, "float32", "float32", None, False)
    signature = Signature(shape, grad_input=True, grad_weight=True, grad_bias=False)
    linear = nn.Linear(128, 128, bias=False, device=device)
    return Replay(Operands(Sample(signature, linear, None, None)), None, options)


def test_timing_leaves_the_users_cuda_graphs_their_iterations():
    """One call of cudagraph_mark_step_begin would end torch's own count for good."""
    from torch._inductor import cudagraph_trees as trees  # noqa: PLC0415

    work = compiled_linear("cpu", mode="reduce-overhead")
    clock = CpuClock()
    clock.warm_up([work])
    clock.time_ms([work] * 2)
    assert not trees.CUDAGraphTreeManager.user_invoked_mark_step()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "options", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}]
)
def test_nothing_is_recorded_in_cuda_graphs(cuda_clock, options):
    from torch._inductor import cudagraph_trees as trees  # noqa: PLC0415

    work = compiled_linear("cuda", **options)
    cuda_clock.warm_up([work])
    assert min(cuda_clock.time_ms([work] * 4)) > 0
    device = torch.cuda.current_device()
    assert trees.get_manager(device, create_if_none_exists=False) is None


# On a GPU


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_has_a_clock():
    assert isinstance(clock_for(torch.device("cuda")), CudaClock)


@pytest.mark.gpu
@needs_gpu
def test_blocking_keeps_the_gpu_busy_while_the_cpu_goes_on(cuda_clock):
    done = torch.cuda.Event()
    start = time.perf_counter()
    block_gpu(int(100 * cuda_clock._cycles_per_ms))
    done.record()
    assert not done.query()
    done.synchronize()
    assert 0.05 < time.perf_counter() - start < 1


@pytest.mark.gpu
@needs_gpu
def test_events_agree_with_a_long_run_average(cuda_clock):
    # So large that caches hardly matter; zeros, so that the GPU does not lower its
    # frequency in the long run.
    a = torch.zeros(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    item = Item(lambda: torch.mm(a, a, out=out))
    cuda_clock.warm_up([item])

    def average_ms(repetitions=20):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repetitions):
            item()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repetitions

    ratios = [median(cuda_clock.time_ms([item] * 20)) / average_ms() for _ in range(5)]
    assert median(ratios) == pytest.approx(1, abs=0.05)


@pytest.mark.gpu
@needs_gpu
def test_a_block_that_ends_too_early_is_discarded_and_made_longer(cuda_clock):
    # The first block lasts a few milliseconds.
    item = small_linear(pause_s=0.05)
    cuda_clock.warm_up([item])
    assert cuda_clock.discarded == 0
    (milliseconds,) = cuda_clock.time_ms([item])
    assert cuda_clock.discarded > 0
    assert milliseconds < 5


@pytest.mark.gpu
@needs_gpu
def test_a_block_that_is_long_enough_is_kept(cuda_clock):
    item = small_linear(pause_s=0.05)
    cuda_clock.warm_up([item])
    cuda_clock.time_ms([item])
    discarded = cuda_clock.discarded
    for _ in range(5):
        cuda_clock.time_ms([item])
    # A busy machine may stretch a pause now and then.
    assert cuda_clock.discarded <= discarded + 1


@pytest.mark.gpu
@needs_gpu
def test_python_before_a_launch_is_not_timed(cuda_clock):
    quick = small_linear()
    paused = Item(quick._run, pause_s=0.002)
    cuda_clock.warm_up([quick, paused])
    times = [cuda_clock.time_ms([quick, paused, paused, quick]) for _ in range(10)]
    without = median(x for a, _, _, d in times for x in (a, d))
    with_pause = median(x for _, b, c, _ in times for x in (b, c))
    # Some microseconds each; charged with the pause, the latter would be 2 ms.
    assert with_pause < 1.5 * without
    assert without < 1.5 * with_pause


@pytest.mark.gpu
@needs_gpu
def test_more_launches_than_the_queue_holds_are_timed_without_gaps(cuda_clock, caplog):
    a = torch.zeros(256, device="cuda")
    item = Item(lambda: [a.add_(1) for _ in range(300)])
    cuda_clock.warm_up([item])
    together = cuda_clock.time_ms([item] * 12)
    (alone,) = cuda_clock.time_ms([item])
    assert median(together) < 1.5 * alone
    assert "the GPU waited for the CPU" not in caplog.text


@pytest.mark.gpu
@needs_gpu
def test_work_that_waits_for_the_gpu_itself_is_timed_with_a_warning(cuda_clock, caplog):
    a = torch.zeros(256, device="cuda")
    item = Item(lambda: a.sum().item())
    assert len(cuda_clock.time_ms([item] * 2)) == 2
    assert "the GPU waited for the CPU" in caplog.text
    assert cuda_clock.discarded > 0


@pytest.mark.gpu
@needs_gpu
def test_after_an_error_nothing_runs_on(cuda_clock):
    def fail():
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        cuda_clock.time_ms([Item(fail)])
    assert torch.cuda.current_stream().query()


@pytest.mark.gpu
@needs_gpu
def test_times_come_in_the_order_of_the_work(cuda_clock):
    a = torch.zeros(4096, 4096, device="cuda")
    one, four = Item(lambda: a @ a), Item(lambda: [a @ a for _ in range(4)])
    cuda_clock.warm_up([one, four])
    times = cuda_clock.time_ms([one, four, four, one])
    assert min(times[1:3]) > 2 * max(times[0], times[3])


@pytest.mark.gpu
@needs_gpu
def test_work_runs_on_the_current_stream(cuda_clock):
    stream, seen = torch.cuda.Stream(), []
    item = Item(lambda: seen.append(torch.cuda.current_stream().cuda_stream))
    with torch.cuda.stream(stream):
        cuda_clock.warm_up([item])
        cuda_clock.time_ms([item])
        assert torch.cuda.current_stream() == stream
    assert set(seen) == {stream.cuda_stream}
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.gpu
@needs_gpu
def test_timing_leaves_seeds_device_and_allocator_settings():
    def state():
        return (
            torch.get_rng_state().tolist(),
            torch.cuda.get_rng_state().tolist(),
            torch.cuda.current_device(),
            torch.cuda.get_allocator_backend(),
            torch.cuda.get_per_process_memory_fraction(),
        )

    item = small_linear()
    before = state()
    clock = CudaClock(torch.device("cuda"))
    clock.warm_up([item])
    clock.time_ms([item] * 3)
    assert state() == before


@pytest.mark.gpu
@needs_gpu
def test_a_clock_for_another_gpu_leaves_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one GPU")
    other = torch.device("cuda", 1 - torch.cuda.current_device())
    a, current = torch.zeros(512, 512, device=other), torch.cuda.current_device()
    clock, item = CudaClock(other), Item(lambda: a @ a)
    clock.warm_up([item])
    assert clock.time_ms([item])[0] > 0
    start = clock.mark()
    item()
    assert clock.elapsed_ms(start, clock.mark(), item) > 0
    assert torch.cuda.current_device() == current
