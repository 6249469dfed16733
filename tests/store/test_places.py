"""Where a cache lies: paths, URLs, stores that jobs share, odd file systems."""

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

import fp8tune.store.local_file
from fp8tune.decision.load import Load
from fp8tune.decision.records import Layer, Measurement, Shape, Signature
from fp8tune.errors import ConfigError
from fp8tune.store.cache import Cache, Key
from fp8tune.store.places import place_of
from fp8tune.store.pruning import KEPT_SIZES, OTHER_ENVIRONMENTS
from fp8tune.store.runs import load_runs

ENVIRONMENT = (("device", "Imaginary 1000"), ("torch", "2.13.0"))
KEY = Key(ENVIRONMENT, "rowwise", "rowwise", "eager")


def signature(m, n=512):
    shape = Shape(m, 1024, n, "bfloat16", "float32", "bfloat16", False)
    return Signature(shape, grad_input=True, grad_weight=True, grad_bias=False)


def run(name, m, n=512):
    """A model of one layer that was called with M rows, and its timing."""
    layer = Layer(name, 1024, n, "float32", True, None, ((signature(m, n), 3),))
    times = (1.0, 1.1, 1.2)
    return (layer,), [Measurement(signature(m, n), "rowwise", times, times)]


def model(name, n=512):
    return (Layer(name, 1024, n, "float32", True, None),)


def is_hit(cache, name, key=KEY):
    return cache.layers(key, model(name)) is not None


@pytest.fixture
def memory():
    """An empty store in this process's memory."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield "memory://bucket/fp8tune"
    files.store.clear()


@pytest.fixture(params=["memory", "folder"])
def store(request, memory, tmp_path):
    return memory if request.param == "memory" else f"file://{tmp_path}/store"


@pytest.fixture
def warnings(caplog):
    return lambda: [
        x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING
    ]


@pytest.mark.parametrize(
    "wrong", ["a\0b", b"cache.json", 3, "", Path("a\0b"), "nosuch://bucket/x", True]
)
def test_what_cannot_be_a_place_is_refused(wrong):
    with pytest.raises(ConfigError, match="must be the path of a JSON file, or a URL"):
        Cache(wrong)


@pytest.mark.skipif(
    "s3fs" in sys.modules, reason="the package that this looks for is there"
)
def test_a_url_whose_package_is_missing_names_it():
    try:
        import s3fs  # noqa: F401, PLC0415
    except ImportError:
        with pytest.raises(ConfigError, match="a package is missing: Install s3fs"):
            Cache("s3://bucket/fp8tune")


def test_a_tilde_is_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Cache("~/cache.json").save(KEY, *run("wq", 128))
    assert (tmp_path / "cache.json").is_file()


# Stores


def test_a_run_that_was_saved_to_a_store_is_a_hit_of_the_next(store, warnings):
    assert not is_hit(Cache(store), "wq")
    Cache(store).save(KEY, *run("wq", 128))
    assert is_hit(Cache(store), "wq")
    assert [x.key for x in load_runs(store, None)] == [KEY]
    assert warnings() == []


def test_a_store_serves_many_models_and_environments(store):
    other = replace(KEY, timing="compiled")
    Cache(store).save(KEY, *run("wq", 128))
    Cache(store).save(other, *run("wq", 256))
    Cache(store).save(KEY, *run("wo", 128))
    cache = Cache(store)
    assert is_hit(cache, "wq")
    assert is_hit(cache, "wq", other)
    assert is_hit(cache, "wo")
    assert cache.explain_miss(replace(KEY, recipe="bf16"), model("wq")).startswith(
        "recipe was 'rowwise'"
    )


def test_the_latest_run_of_a_model_replaces_the_older_one_in_a_store(store):
    for m in (128, 256):
        Cache(store).save(KEY, *run("wq", m))
    (found,) = load_runs(store, None)
    assert found.layers == run("wq", 256)[0]


def test_an_object_that_cannot_be_read_costs_a_warning_and_that_object(store, warnings):
    Cache(store).save(KEY, *run("wq", 128))
    files, folder = fsspec.url_to_fs(store)
    files.pipe_file(f"{folder}/damaged.json", b"damage")
    cache = Cache(store)
    assert is_hit(cache, "wq")
    (warning,) = warnings()
    assert "1 entries that could not be read, such as damaged.json: found no" in warning
    cache.save(KEY, *run("wo", 128))
    assert files.cat_file(f"{folder}/damaged.json") == b"damage"
    assert is_hit(Cache(store), "wo")


class Unreachable(fsspec.AbstractFileSystem):
    """A store whose network is down."""

    protocol = "unreachable"

    def exists(self, path, **kwargs):
        raise ConnectionResetError("no route to host")


def test_a_store_that_cannot_be_reached_costs_warnings(warnings):
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    cache = Cache("unreachable://bucket/x")
    cache.save(KEY, *run("wq", 128))
    assert ["no route to host" in x for x in warnings()] == [True, True]


WRITER = """
import sys
from fp8tune.decision.records import Layer, Measurement, Shape, Signature
from fp8tune.store.cache import Cache, Key
place, job = sys.argv[1], int(sys.argv[2])
key = Key((("device", "Imaginary 1000"), ("torch", "2.13.0")), "rowwise", "rowwise", "eager")
for i in range(3):
    m = 100 * job + i + 1
    shape = Shape(m, 1024, 512, "bfloat16", "float32", "bfloat16", False)
    seen = Signature(shape, True, True, False)
    layer = Layer(f"writer.{m}", 1024, 512, "float32", True, None, ((seen, 1),))
    Cache(place).save(key, (layer,), [Measurement(seen, "rowwise", (1.0,), (1.0,))])
"""


@pytest.mark.dist
def test_two_jobs_of_sixteen_processes_on_a_folder_lose_no_entry(tmp_path):
    place = f"file://{tmp_path}/store"
    root = str(Path(fp8tune.store.local_file.__file__).parents[2])
    writers = [
        subprocess.Popen(  # noqa: S603 - runs the script above
            [sys.executable, "-c", WRITER, place, str(number)],
            env={**os.environ, "PYTHONPATH": root},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(32)
    ]
    assert [x.communicate()[1] for x in writers] == [""] * 32
    cache = Cache(place)
    written = {100 * number + i + 1 for number in range(32) for i in range(3)}
    assert {x.shape.m for x in cache.measurements(KEY)} == written
    assert all(is_hit(cache, f"writer.{m}") for m in written)


def test_two_jobs_of_sixteen_threads_on_a_store_in_memory_lose_no_entry(memory):
    with ThreadPoolExecutor(32) as pool:
        list(
            pool.map(
                lambda i: Cache(memory).save(KEY, *run(f"w.{i}", i + 1)), range(64)
            )
        )
    assert all(is_hit(Cache(memory), f"w.{i}") for i in range(64))


# What is dropped


@pytest.fixture
def anywhere(tmp_path, memory, request):
    return {"file": tmp_path / "cache.json", "store": memory}[request.param]


both = pytest.mark.parametrize("anywhere", ["file", "store"], indirect=True)


@both
def test_a_model_with_new_rows_in_each_run_does_not_make_the_cache_grow(anywhere):
    for m in range(1, 60):
        Cache(anywhere).save(KEY, *run("wq", m))
    known = {x.shape.m for x in Cache(anywhere).measurements(KEY)}
    assert 59 in known
    assert len(known) <= KEPT_SIZES + 1
    assert known == set(range(60 - len(known), 60))


def test_measurements_of_other_sizes_go_with_their_run(tmp_path):
    path = tmp_path / "cache.json"
    Cache(path).save(KEY, *run("wq", 128))
    layers, timed = run("wq", 128)
    strange = Measurement(signature(128, n=64), "rowwise", (1.0,), (1.0,))
    Cache(path).save(KEY, layers, [*timed, strange])
    assert set(Cache(path).measurements(KEY)) == {signature(128)}


def test_a_bounded_number_of_runs_of_other_environments_is_kept(tmp_path):
    path = tmp_path / "cache.json"
    keys = [
        replace(KEY, environment=(("torch", f"2.{i}"),))
        for i in range(OTHER_ENVIRONMENTS + 5)
    ]
    cache = Cache(path)
    for key in keys:
        cache.save(key, *run("wq", 128))
    cache.save(KEY, *run("wq", 128))
    cache.save(KEY, *run("wo", 128))
    left = [x.key for x in load_runs(path, None)]
    assert left == [*keys[5:], KEY, KEY]
    assert Cache(path).measurements(keys[0]) == {}


def test_what_a_busy_machine_timed_does_not_replace_what_is_known(tmp_path):
    path = tmp_path / "cache.json"
    layers, timed = run("wq", 128)
    Cache(path).save(KEY, layers, timed)
    busy = replace(timed[0], candidate_ms=(9.0,) * 3, load=Load((0.5, 0.6, 0.5)))
    Cache(path).save(KEY, layers, [busy])
    assert Cache(path).measurements(KEY) == {signature(128): timed[0]}


# Odd file systems


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no memory"),
        NotImplementedError("no flock here"),
        OSError(errno.ENOLCK, "No locks available"),
        OSError(errno.ESTALE, "Stale file handle"),
    ],
)
def test_a_file_system_that_cannot_lock_costs_a_warning(
    tmp_path, monkeypatch, warnings, error
):
    def flock(descriptor, operation):
        raise error

    monkeypatch.setattr(fcntl, "flock", flock)
    Cache(tmp_path / "cache.json").save(KEY, *run("wq", 128))
    (warning,) = warnings()
    assert "was not saved: " in warning
    assert "training goes on" in warning


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path):
    script = (
        """
import errno, fcntl, sys
def flock(descriptor, operation):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = flock
import warnings; warnings.simplefilter("ignore")
"""
        + WRITER
    )
    root = str(Path(fp8tune.store.local_file.__file__).parents[2])
    path = tmp_path / "cache.json"
    writer = subprocess.run(  # noqa: S603 - runs the script above
        [sys.executable, "-c", script, str(path), "1"],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert writer.returncode == 0, writer.stderr
    saved = path.exists() and is_hit(Cache(path), "writer.101")
    assert saved or "was not saved" in writer.stderr


def test_a_lock_that_a_killed_process_left_costs_seconds_and_a_warning(
    tmp_path, warnings, monkeypatch
):
    assert fp8tune.store.local_file.LOCK_TIMEOUT_S <= 10
    monkeypatch.setattr(fp8tune.store.local_file, "LOCK_TIMEOUT_S", 0.2)
    held = (tmp_path / "cache.json.lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    Cache(tmp_path / "cache.json").save(KEY, *run("wq", 128))
    held.close()
    assert "could not be acquired" in warnings()[0]


def test_a_symlink_loop_costs_warnings(tmp_path, warnings):
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    Cache(loop).save(KEY, *run("wq", 128))
    assert len(warnings()) == 2


def test_a_place_tells_its_own_name(tmp_path, memory):
    assert str(place_of(memory)) == memory
    assert str(place_of(tmp_path / "cache.json")) == str(tmp_path / "cache.json")


def test_threads_that_save_to_one_file_lose_nothing(tmp_path):
    path = tmp_path / "cache.json"
    threads = [
        threading.Thread(
            target=lambda i=i: Cache(path).save(KEY, *run(f"w.{i}", i + 1))
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(is_hit(Cache(path), f"w.{i}") for i in range(8))


def test_a_file_that_another_process_changed_is_read_again_before_it_is_saved(tmp_path):
    path = tmp_path / "cache.json"
    mine = Cache(path)
    mine.save(KEY, *run("wq", 1))
    Cache(path).save(KEY, *run("wk", 2))
    mine.save(KEY, *run("wv", 3))
    assert all(is_hit(Cache(path), x) for x in ("wq", "wk", "wv"))
