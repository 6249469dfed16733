"""The cache file: hits and misses, damage, full and read-only disks, many writers."""

import contextlib
import hashlib
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

import fp8tune.store.cache
import fp8tune.store.local_file
from fp8tune.decision.accuracy import Accuracy
from fp8tune.decision.coverage import Coverage
from fp8tune.decision.load import GpuLoad, Load
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Layer, Measurement, Shape, Signature
from fp8tune.decision.trials import RoleGain, TrialRecord, TrialResult, TrialSteps
from fp8tune.decision.watched import Fallen
from fp8tune.errors import CacheError
from fp8tune.store.bounds import check_fallen, check_run
from fp8tune.store.cache import Cache, Key
from fp8tune.store.cache_file import FORMAT_VERSION
from fp8tune.store.sealing import UNSEALED

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "cache-v5.json"
SAVED = "2026-01-31T12:00:00.000000+00:00"
NOBODY = 65534
COVERAGE = Coverage(3_221_225_472, (("attention", 268_435_456),))

KEY = Key(
    environment=(("gpu", "Imaginary 1000"), ("torch", "2.12.0")),
    recipe="rowwise",
    settings="rowwise, pad_inner_dim=True",
    timing="eager",
)


def signature(m, k=1024, n=512):
    shape = Shape(m, k, n, "bfloat16", "float32", "bfloat16", False)
    return Signature(shape, grad_input=True, grad_weight=True, grad_bias=False)


SEEN = (signature(128), signature(4096))
MODEL = (
    Layer("layers.0.wq", 1024, 512, "float32", True, None),
    Layer("layers.1.wq", 1024, 512, "float32", True, None),
    Layer("lm_head", 1024, 512, "float32", True, Reason.FILTERED_BY_NAME),
)
RUN = (
    replace(MODEL[0], calls=((SEEN[0], 3), (SEEN[1], 1))),
    replace(MODEL[1], calls=((SEEN[0], 3),)),
    MODEL[2],
)
TIMES = {"reference_ms": (1.5, 1.25), "candidate_ms": (1.0, 0.75)}
MEASURED = [
    Measurement(
        SEEN[0],
        "rowwise",
        **TIMES,
        recorded="2026-01-31",
        accuracy=Accuracy(31.5, 30.25, 29.75, underflow=0.001, saturation=0.0),
        reference_bytes=12 * 2**20,
        candidate_bytes=8 * 2**20,
        warm_up_s=2.5,
        load=Load((1.0, 0.97), 0.02, GpuLoad(0, ("sw_power_cap",), (1980, 1755))),
    ),
    Measurement(SEEN[1], "rowwise", **TIMES, recorded="2026-01-31"),
]
WQ = ("layers.0.wq", "layers.1.wq")
TRIAL = TrialRecord(
    WQ,
    (),
    (
        TrialResult(("layers.{}.wq",), 2, 10.0, 1.1, 1.05, 1.2, 3, 2**30),
        TrialResult((), 0, 11.0, 1.0, 1.0, 1.0, 3),
    ),
    (RoleGain("layers.{}.wq", WQ, 1.5, 0.25, 1.0, 0.125),),
    TrialSteps(
        0,
        (-1, -1, -1, -1, 1, 0, 0, 1, 1, 0),
        (900.0, 800.0, 11.5, 10.5, 11.0, 10.0, 10.125, 11.25, 10.75, 9.875),
    ),
)
FELL = Fallen("layers.1.wq", 12.5, 20.0, 3000, reverted=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.json"


@pytest.fixture
def filled(path):
    Cache(path).save(KEY, RUN, MEASURED)
    return path


@pytest.fixture
def warnings(caplog):
    """The warnings logged since the last look."""

    def look():
        caught = [r for r in caplog.records if r.levelno >= logging.WARNING]
        messages = [r.getMessage() for r in caught if r.name == "fp8tune"]
        caplog.clear()
        return messages

    return look


def is_empty(cache):
    return cache.measurements(KEY) == {} and cache.layers(KEY, MODEL) is None


def assert_full_hit(cache):
    assert cache.layers(KEY, MODEL) == RUN
    assert cache.measurements(KEY) == {m.signature: m for m in MEASURED}


def sealed(text):
    """Put the right checksum into a hand-written file, as the format's page says."""
    blank = re.sub(r'"sha256": "\w*"', f'"sha256": "{UNSEALED}"', text, count=1)
    digest = hashlib.sha256(blank.encode()).hexdigest()
    return blank.replace(UNSEALED, digest, 1)


@contextlib.contextmanager
def ordinary_user():
    """Permissions mean nothing to root; run as somebody to whom they do."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_folder():
    """A folder that the ordinary user may reach, unlike pytest's own ones."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


# Hits and misses


def test_a_second_run_finds_what_the_first_one_measured(filled):
    assert_full_hit(Cache(filled))


def test_the_cache_that_saved_finds_its_own_run(path):
    cache = Cache(path)
    cache.save(KEY, RUN, MEASURED)
    assert_full_hit(cache)


def test_a_run_without_a_file_starts_empty_and_without_a_warning(path, warnings):
    cache = Cache(path)
    assert is_empty(cache)
    assert cache.explain_miss(KEY, MODEL) == f"there is no file {path} yet"
    assert warnings() == []
    assert not path.exists()


def test_missing_folders_are_made_when_the_cache_is_saved(tmp_path):
    path = tmp_path / "new" / "deep" / "cache.json"
    Cache(path).save(KEY, RUN, MEASURED)
    assert_full_hit(Cache(path))


def test_a_relative_path_survives_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = Cache("cache.json")
    monkeypatch.chdir("/")
    cache.save(KEY, RUN, MEASURED)
    assert_full_hit(Cache(tmp_path / "cache.json"))


def test_a_link_to_the_file_stays_a_link(tmp_path, filled):
    link = tmp_path / "link.json"
    link.symlink_to(filled)
    Cache(link).save(replace(KEY, timing="compiled"), RUN, MEASURED)
    assert link.is_symlink()
    assert_full_hit(Cache(filled))


def test_the_permissions_of_the_file_are_kept(filled):
    filled.chmod(0o664)
    Cache(filled).save(KEY, RUN, MEASURED)
    assert filled.stat().st_mode & 0o777 == 0o664


def test_names_and_numbers_of_any_kind_come_back_exactly(path):
    layers = (replace(RUN[0], fqn='größe "0"\n.wq'), *RUN[1:])
    odd = replace(
        MEASURED[0], reference_ms=(0.1, 1e-7), detail="€\ud800", synthetic=True
    )
    Cache(path).save(KEY, layers, [odd, MEASURED[1]])
    cache = Cache(path)
    assert cache.layers(KEY, (replace(layers[0], calls=()), *MODEL[1:])) == layers
    assert cache.measurements(KEY)[SEEN[0]] == odd


def environment(**changes):
    pairs = {**dict(KEY.environment), **changes}
    return replace(KEY, environment=tuple(pairs.items()))


OTHER_KEYS = [
    (environment(torch="2.13.0"), "environment.torch was '2.12.0', is '2.13.0'"),
    (environment(triton="3.6"), "environment.triton was None, is '3.6'"),
    (replace(KEY, recipe="tensorwise"), "recipe was 'rowwise', is 'tensorwise'"),
    (
        replace(KEY, settings="rowwise"),
        "settings was 'rowwise, pad_inner_dim=True', is 'rowwise'",
    ),
    (replace(KEY, timing="compiled"), "timing was 'eager', is 'compiled'"),
    (
        replace(environment(gpu="Imaginary 2000"), timing="compiled"),
        (
            "environment.gpu was 'Imaginary 1000', is 'Imaginary 2000'; "
            "timing was 'eager', is 'compiled'"
        ),
    ),
]


@pytest.mark.parametrize(("key", "line"), OTHER_KEYS)
def test_other_circumstances_miss_and_the_line_names_what_differs(filled, key, line):
    cache = Cache(filled)
    assert cache.layers(key, MODEL) is None
    assert cache.measurements(key) == {}
    assert cache.explain_miss(key, MODEL) == line


def with_first(**changes):
    return (replace(MODEL[0], **changes), *MODEL[1:])


OTHER_MODELS = [
    (
        with_first(weight_dtype="bfloat16"),
        "layers.0.wq.weight_dtype was 'float32', is 'bfloat16'",
    ),
    (with_first(k=2048), "layers.0.wq.k was 1024, is 2048"),
    (
        with_first(reason=Reason.SMALL_KN),
        "layers.0.wq.reason was None, is 'small_kn'",
    ),
    (MODEL[1:], "layers.0.wq is gone"),
    ((*MODEL, replace(MODEL[0], fqn="head")), "head is new"),
    (MODEL[::-1], "the layers come in another order"),
    (
        tuple(replace(layer, weight_dtype="bfloat16") for layer in MODEL),
        (
            "layers.0.wq.weight_dtype was 'float32', is 'bfloat16'; "
            "2 more differences in the layers"
        ),
    ),
]


@pytest.mark.parametrize(("model", "line"), OTHER_MODELS)
def test_another_model_misses_and_the_line_names_its_first_layer(filled, model, line):
    cache = Cache(filled)
    assert cache.layers(KEY, model) is None
    assert cache.explain_miss(KEY, model) == line


def test_the_line_compares_with_the_nearest_run(filled):
    far = replace(environment(gpu="Imaginary 2000", torch="1.0"), timing="compiled")
    Cache(filled).save(far, RUN, MEASURED)
    line = Cache(filled).explain_miss(environment(torch="2.13.0"), MODEL)
    assert line == "environment.torch was '2.12.0', is '2.13.0'"


def test_another_model_finds_the_measurements_of_the_shapes_it_shares(filled):
    assert set(Cache(filled).measurements(KEY)) == set(SEEN)


def test_the_order_of_the_environment_does_not_matter(filled):
    assert_full_hit(Cache(filled))
    turned = replace(KEY, environment=KEY.environment[::-1])
    assert Cache(filled).layers(turned, MODEL) == RUN


def test_a_failed_measurement_is_not_kept_so_that_the_next_run_tries_again(path):
    failed = Measurement(SEEN[1], "rowwise", failure=Reason.OUT_OF_MEMORY)
    Cache(path).save(KEY, RUN, [MEASURED[0], failed])
    cache = Cache(path)
    assert cache.measurements(KEY) == {SEEN[0]: MEASURED[0]}
    assert cache.layers(KEY, MODEL) is None
    assert cache.explain_miss(KEY, MODEL) == (
        "1 signatures have no measurement, such as M=4096 K=1024 N=512"
    )


def test_a_hit_has_nothing_to_explain(filled):
    assert Cache(filled).explain_miss(KEY, MODEL) == "nothing differs"


def test_the_latest_measurement_and_run_replace_the_older_ones(filled):
    again = [replace(MEASURED[0], reference_ms=(9.0,), candidate_ms=(3.0,))]
    shorter = (replace(RUN[0], calls=((SEEN[0], 5),)), *RUN[1:])
    Cache(filled).save(KEY, shorter, again)
    cache = Cache(filled)
    assert cache.layers(KEY, MODEL) == shorter
    assert cache.measurements(KEY) == {SEEN[0]: again[0], SEEN[1]: MEASURED[1]}


def test_one_file_serves_many_models_and_circumstances(filled):
    keys = [KEY, *(key for key, _ in OTHER_KEYS)]
    models = [MODEL, *(model for model, _ in OTHER_MODELS)]
    for key in keys:
        Cache(filled).save(key, RUN, MEASURED)
    for model in models[1:]:
        Cache(filled).save(KEY, model, [])
    cache = Cache(filled)
    assert all(cache.layers(key, MODEL) == RUN for key in keys)
    assert all(cache.layers(KEY, model) == model for model in models[1:])


def test_two_caches_made_before_either_saved_lose_nothing(path):
    first, second = Cache(path), Cache(path)
    first.save(KEY, RUN, MEASURED)
    other = replace(KEY, timing="compiled")
    second.save(other, RUN, MEASURED[:1])
    cache = Cache(path)
    assert_full_hit(cache)
    assert cache.measurements(other) == {SEEN[0]: MEASURED[0]}


def test_what_ten_thousand_layers_share_is_written_once(path):
    seen = [signature(128 * (i + 1)) for i in range(8)]
    calls = tuple((one, 3) for one in seen)
    layers = [
        Layer(f"blocks.{i}", 1024, 512, "bfloat16", True, None) for i in range(10_000)
    ]
    run = tuple(replace(layer, calls=calls) for layer in layers)
    Cache(path).save(KEY, run, [replace(MEASURED[0], signature=one) for one in seen])
    assert Cache(path).layers(KEY, tuple(layers)) == run
    assert path.stat().st_size < 2_000_000


# The format


def test_a_file_of_format_version_2_is_read_for_ever(warnings):
    cache = Cache(DATA / "cache-v2.json")
    assert_full_hit(cache)
    assert warnings() == []


@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_file_with_a_trial_is_read_for_ever(warnings, version):
    cache = Cache(DATA / f"cache-v{version}.json")
    assert_full_hit(cache)
    assert cache.trial(KEY, RUN) == TRIAL
    assert cache.coverage(KEY, MODEL) == COVERAGE
    assert warnings() == []


@pytest.mark.parametrize("version", [4, 5])
def test_a_file_with_what_fell_is_read_for_ever(warnings, version):
    cache = Cache(DATA / f"cache-v{version}.json")
    assert_full_hit(cache)
    assert cache.trial(KEY, RUN) == TRIAL
    assert cache.fallen(KEY, MODEL) == (FELL,)
    assert warnings() == []


def test_what_fell_is_kept_with_its_run_until_the_next_one(filled):
    cache = Cache(filled)
    other = replace(FELL, fqn="layers.0.wq", reverted=False)
    cache.save_fallen(KEY, [MODEL], [FELL, replace(FELL, fqn="lm_head")])
    cache.save_fallen(KEY, [MODEL, MODEL[:1]], [other])
    assert set(Cache(filled).fallen(KEY, RUN)) == {FELL, other}
    assert Cache(filled).layers(KEY, MODEL) == RUN
    assert cache.fallen(replace(KEY, timing="compiled"), RUN) == ()
    cache.save(KEY, RUN, MEASURED)
    assert Cache(filled).fallen(KEY, RUN) == ()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fqn": "lm_head"}, "layers that fell: found 'lm_head', expected candidates"),
        ({"sqnr_db": 20.0}, "found 20.0, 20.0, expected dB, the first below"),
        ({"sqnr_db": -201.0}, "found -201.0, 20.0, expected dB"),
        ({"steps": -1}, "steps: found -1, expected at least 0"),
    ],
)
def test_impossible_checks_of_the_accuracy_are_refused(wrong, message):
    with pytest.raises(CacheError, match=message):
        check_fallen((replace(FELL, **wrong),), RUN)
    with pytest.raises(CacheError, match="each once"):
        check_fallen((FELL, FELL), RUN)


def test_a_trial_of_format_version_2_keeps_its_verdicts(path, warnings):
    document = json.loads(GOLDEN.read_text())
    document["version"] = 2
    for name in ("roles", "steps"):
        del document["runs"][0]["trial"][name]
    path.write_text(sealed(json.dumps(document)))
    assert Cache(path).trial(KEY, RUN) == replace(TRIAL, roles=(), steps=TrialSteps())
    assert warnings() == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": TrialSteps(0, (0, 1), (1.0,))}, "a trial's steps: found 0, 2, 1"),
        ({"steps": TrialSteps(0, (2,), (1.0,))}, "a step's plan: found 2"),
        ({"steps": TrialSteps(0, (0,), (-1.0,))}, "a step's time: found -1.0"),
        ({"steps": TrialSteps(0, (0,) * 513, (1.0,) * 513)}, "at most 512"),
        ({"roles": (RoleGain("w", ("w",), 0.0, 0.0),)}, "found 'w' in a trial"),
        ({"roles": (RoleGain("q", WQ, 1.0, -1.0),)}, "the spread .* found -1.0"),
        ({"roles": (RoleGain("q", WQ, 1e13, 0.0),)}, "what a role saves: found 1000"),
    ],
)
def test_impossible_numbers_of_a_trial_are_refused(wrong, message):
    with pytest.raises(CacheError, match=message):
        check_run(RUN, replace(TRIAL, **wrong))


def test_a_file_of_format_version_1_is_read_for_ever(warnings):
    cache = Cache(DATA / "cache-v1.json")
    assert cache.layers(KEY, MODEL) == RUN
    without_load = {x.signature: replace(x, load=None) for x in MEASURED}
    assert cache.measurements(KEY) == without_load
    assert warnings() == []


def test_a_file_of_format_version_1_is_written_in_the_current_one(path):
    path.write_bytes((DATA / "cache-v1.json").read_bytes())
    Cache(path).save(replace(KEY, timing="compiled"), RUN, MEASURED)
    assert json.loads(path.read_text())["version"] == FORMAT_VERSION
    assert Cache(path).layers(KEY, MODEL) == RUN


def test_the_example_on_the_format_page_is_the_kept_file():
    page = Path(__file__).parents[2] / "docs" / "cache-format.md"
    assert GOLDEN.read_text() in page.read_text()


def test_the_format_page_tells_the_current_version():
    page = Path(__file__).parents[2] / "docs" / "cache-format.md"
    assert f"\n| {FORMAT_VERSION} |" in page.read_text()


def test_the_same_entries_make_the_same_file(path, monkeypatch):
    monkeypatch.setattr(fp8tune.store.cache, "_now", lambda: SAVED)
    cache = Cache(path)
    cache.save(KEY, RUN, MEASURED, TRIAL, COVERAGE)
    cache.save_fallen(KEY, [MODEL], [FELL])
    assert path.read_bytes() == GOLDEN.read_bytes()


# Damage


def assert_unreadable(path, data, warnings, problem=""):
    """The file counts as empty with one warning, and stays as it is."""
    path.write_bytes(data)
    cache = Cache(path)
    assert is_empty(cache)
    (warning,) = warnings()
    assert warning.startswith(f"the cache {path} could not be read: {problem}")
    assert warning.endswith("it counts as empty, and the layers are timed again")
    assert path.read_bytes() == data
    return cache


def assert_set_aside(path, cache, data, warnings):
    """The next save keeps the old bytes under a new name, and then works."""
    cache.save(KEY, RUN, MEASURED)
    (warning,) = warnings()
    kept = Path(re.search(r"it was moved to (\S+), and", warning)[1])
    assert kept.parent == path.parent
    assert kept.read_bytes() == data
    assert_full_hit(Cache(path))
    kept.unlink()


def test_a_file_cut_short_anywhere_is_noticed_and_kept(filled, warnings):
    whole = filled.read_bytes()
    for length in range(len(whole)):
        cache = assert_unreadable(filled, whole[:length], warnings)
        if length % 16 == 0:
            assert_set_aside(filled, cache, whole[:length], warnings)


def test_one_changed_byte_anywhere_is_noticed_and_kept(filled, warnings):
    whole = filled.read_bytes()
    rng = random.Random(0)  # noqa: S311 - picks bytes and pauses, no secrets
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= rng.randrange(1, 256)
        cache = assert_unreadable(filled, bytes(damaged), warnings)
        assert_set_aside(filled, cache, bytes(damaged), warnings)


WRONG_FILES = [
    ('"version": 5', '"version": 6', "version: found 6, expected 1 or 2 or 3 or 4"),
    ('"version": 5', '"version": true', "version: found True, expected an integer"),
    ("fp8tune-cache", "fp8tune-plan", "format: found 'fp8tune-plan', expected 'fp8"),
    ('"runs": ', '"races": ', "the top level: found unknown keys 'races' without"),
]


@pytest.mark.parametrize(("old", "new", "problem"), WRONG_FILES)
def test_a_file_with_a_right_checksum_and_other_tables_is_kept(
    filled, warnings, old, new, problem
):
    text = filled.read_text()
    assert old in text
    data = sealed(text.replace(old, new, 1)).encode()
    cache = assert_unreadable(filled, data, warnings, problem)
    assert cache.explain_miss(KEY, MODEL) == f"the cache {filled} could not be read"
    assert_set_aside(filled, cache, data, warnings)


OF_A_SIGNATURE, OF_A_TIMING, OF_A_RUN = "signature", "timing", "run"
M = '"m": 128, "k": 1024, "n": 512'
TIMED = "measurements[0].measurement"
WRONG_ENTRIES = [
    (OF_A_SIGNATURE, M, '"m": "128", "k": 1024, "n": 512', "shape.m: found '128'"),
    (OF_A_SIGNATURE, M, '"m": 128, "n": 512', "found an object without 'k'"),
    (OF_A_SIGNATURE, M, f'{M}, "o": 1', "found unknown keys 'o', expected exactly"),
    (OF_A_RUN, "[[0, 3], [1, 1]]", "[[0, 3], [7, 1]]", "found 7, expected 0 to 1"),
    (OF_A_RUN, "[[0, 3], [1, 1]]", "[[-1, 3], [1, 1]]", "found -1, expected 0 to 1"),
    (OF_A_RUN, "[[0, 3], [1, 1]]", "[[0, 0], [1, 1]]", "found 0, expected at least 1"),
    (OF_A_RUN, "[[0, 3], [1, 1]]", f"[[0, 1{'0' * 400}]]", "found a number above"),
    (OF_A_RUN, '"wq", "k": 1024', '"wq", "k": 512', "expected the layer's 512, 512"),
    (OF_A_RUN, '"trains": true', '"trains": null', "trains: found None, expected"),
    (OF_A_RUN, '"filtered_by_name"', '"whim"', "reason: found 'whim', expected one"),
    (OF_A_RUN, '{"key": 0, "layers"', '{"key": 9, "layers"', "found 9, expected 0"),
    (OF_A_RUN, "layers.1.wq", "layers.0.wq", "two layers of one name"),
    (OF_A_TIMING, "[1.5, 1.25]", "[1.5, NaN]", "found nan, expected a finite number"),
    (OF_A_TIMING, "[1.5, 1.25]", "[1.5, 0.0]", "found 0.0 as a time"),
    (OF_A_TIMING, "[1.5, 1.25]", "[1.5, 1e-200]", "found 1e-200 as a time"),
    (OF_A_TIMING, "[1.5, 1.25]", "[1.5]", "found 1 times of the reference and 2"),
    (OF_A_TIMING, "[1.5, 1.25]", "[]", "found 0 times of the reference and 2"),
    (OF_A_TIMING, "2026-01-31", "2026-02-31", "found '2026-02-31' as a date"),
    (OF_A_TIMING, '"output_db": 31.5', '"output_db": 1e9', "expected dB between"),
    (OF_A_TIMING, '"candidate_bytes": 8', '"candidate_bytes": -8', "expected bytes"),
]


@pytest.mark.parametrize("wrong", WRONG_ENTRIES)
def test_an_entry_that_cannot_be_true_costs_that_entry(filled, warnings, wrong):
    what, old, new, problem = wrong
    text = filled.read_text()
    if '"wq"' in old:
        old, new = (x.replace('"wq"', '"layers.0.wq"') for x in (old, new))
    assert old in text
    count = -1 if what == OF_A_SIGNATURE else 1
    data = sealed(text.replace(old, new, count)).encode()
    filled.write_bytes(data)
    cache = Cache(filled)
    (warning,) = warnings()
    assert f"the cache {filled} has " in warning
    assert problem in warning
    known = set(cache.measurements(KEY))
    assert known == set(SEEN if what == OF_A_RUN else SEEN[1:])
    assert cache.layers(KEY, MODEL) is None
    cache.save(KEY, RUN, MEASURED)
    (warning,) = warnings()
    kept = Path(re.search(r"the file as it was is (\S+)", warning)[1])
    assert kept.read_bytes() == data
    assert_full_hit(Cache(filled))
    assert warnings() == []


def test_more_pairs_than_anybody_takes_cost_that_entry(path, filled, warnings):
    many = ", ".join(["1.5"] * 300_000)
    text = filled.read_text().replace("[1.5, 1.25]", f"[{many}]", 1)
    path.write_text(sealed(text.replace("[1.0, 0.75]", f"[{many}]", 1)))
    assert set(Cache(path).measurements(KEY)) == set(SEEN[1:])
    assert "expected 1 to 4,096 pairs" in warnings()[0]


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 4096, b"\xff\xfe\x00", b"[" * 100_000, b"1" * 5000, b"null", b"{}"],
    ids=["empty", "zeros", "not UTF-8", "deep", "huge number", "null", "no fields"],
)
def test_a_file_that_is_no_cache_is_kept(path, warnings, data):
    cache = assert_unreadable(path, data, warnings)
    assert_set_aside(path, cache, data, warnings)


def test_files_set_aside_never_overwrite_each_other(filled):
    for number in (1, 2, 3):
        filled.write_text(f"damage {number}")
        Cache(filled).save(KEY, RUN, MEASURED)
    for number in (1, 2, 3):
        kept = filled.with_name(f"cache.json.unreadable-{number}")
        assert kept.read_text() == f"damage {number}"


def test_a_folder_in_the_place_of_the_file_is_left_alone(path, warnings):
    path.mkdir()
    (path / "precious").write_text("data")
    cache = Cache(path)
    assert is_empty(cache)
    assert "expected a file; it counts as empty" in "".join(warnings())
    cache.save(KEY, RUN, MEASURED)
    (warning,) = warnings()
    assert (
        "was not saved: found a folder, a pipe or a device, expected a file" in warning
    )
    assert (path / "precious").read_text() == "data"
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "cache.json",
        "cache.json.lock",
    ]


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(path, warnings):
    os.mkfifo(path)
    Cache(path).save(KEY, RUN, MEASURED)
    assert len(warnings()) == 2
    assert path.is_fifo()


def test_times_that_no_reader_would_take_are_not_written(filled, warnings):
    before = filled.read_bytes()
    bad = replace(MEASURED[0], candidate_ms=(1.0, float("nan")))
    Cache(filled).save(KEY, RUN, [bad])
    (warning,) = warnings()
    assert "was not saved: found nan as a time, expected ms above 0" in warning
    assert filled.read_bytes() == before


# Disks


def test_a_read_only_folder_costs_a_warning_and_the_old_file_still_hits(
    public_folder, warnings
):
    path = public_folder / "cache.json"
    Cache(path).save(KEY, RUN, MEASURED)
    path.with_name("cache.json.lock").unlink(missing_ok=True)
    before = path.read_bytes()
    public_folder.chmod(0o555)
    with ordinary_user():
        cache = Cache(path)
        assert_full_hit(cache)
        assert warnings() == []
        cache.save(replace(KEY, timing="compiled"), RUN, MEASURED)
    (warning,) = warnings()
    assert warning.startswith(f"the cache {path} was not saved: [Errno 13] Permission")
    assert path.read_bytes() == before
    assert [p.name for p in public_folder.iterdir()] == ["cache.json"]


def test_a_damaged_file_in_a_read_only_folder_stays_where_it_is(
    public_folder, warnings
):
    path = public_folder / "cache.json"
    path.write_text("damage")
    lock = path.with_name("cache.json.lock")
    lock.touch()
    lock.chmod(0o666)
    public_folder.chmod(0o555)
    with ordinary_user():
        Cache(path).save(KEY, RUN, MEASURED)
    assert ["was not saved" in line for line in warnings()] == [False, True]
    assert path.read_text() == "damage"


def test_a_file_that_may_not_be_read_is_neither_moved_nor_replaced(
    public_folder, warnings
):
    public_folder.chmod(0o777)
    path = public_folder / "cache.json"
    Cache(path).save(KEY, RUN, MEASURED)
    path.with_name("cache.json.lock").unlink(missing_ok=True)
    before = path.read_bytes()
    if os.geteuid() == 0:
        os.chown(path, NOBODY, -1)
    path.chmod(0)
    with ordinary_user():
        cache = Cache(path)
        assert is_empty(cache)
        cache.save(KEY, RUN, MEASURED)
    assert ["Permission denied" in line for line in warnings()] == [True, True]
    path.chmod(0o600)
    assert path.read_bytes() == before
    assert not list(public_folder.glob("*unreadable*"))


# Other processes

HEAD = """
import os, resource, sys
from dataclasses import replace
from fp8tune.store.bounds import check_run
from fp8tune.store.cache import Cache, Key
from fp8tune.decision.records import Layer, Measurement, Shape, Signature

def save(path, number, samples=1):
    shape = Shape(number, 1024, 512, "bfloat16", "float32", "bfloat16", False)
    seen = Signature(shape, True, True, False)
    layer = Layer(f"writer.{number}", 1024, 512, "float32", True, None, ((seen, 1),))
    key = Key((("torch", "2.12.0"),), "rowwise", "", "eager")
    times = (1.0 + number,) * samples
    Cache(path).save(key, (layer,), [Measurement(seen, "rowwise", times, times)])

path, number = sys.argv[1], int(sys.argv[2])
"""
WRITER_KEY = Key((("torch", "2.12.0"),), "rowwise", "", "eager")


def start(script, path, number, **options):
    root = str(Path(fp8tune.store.local_file.__file__).parents[1])
    return subprocess.Popen(  # noqa: S603 - runs the scripts of this file
        [sys.executable, "-c", HEAD + script, str(path), str(number)],
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_eight_processes_that_write_at_once_lose_no_entry(path):
    script = """
for i in range(10):
    save(path, 100 * number + i + 1)
assert "torch" not in sys.modules
"""
    writers = [start(script, path, number) for number in range(8)]
    errors = [writer.communicate()[1] for writer in writers]
    assert errors == [""] * 8  # neither a traceback nor a warning
    cache = Cache(path)
    written = {100 * number + i + 1 for number in range(8) for i in range(10)}
    assert {seen.shape.m for seen in cache.measurements(WRITER_KEY)} == written
    for number in written:
        layer = Layer(f"writer.{number}", 1024, 512, "float32", True, None)
        assert cache.layers(WRITER_KEY, (layer,)) is not None
    assert not list(path.parent.glob("*.tmp"))


def test_a_killed_writer_leaves_a_readable_file_and_a_free_lock(filled, warnings):
    script = "while True:\n    save(path, number, samples=4096)\n"
    rng = random.Random(0)  # noqa: S311 - picks bytes and pauses, no secrets
    for number in range(6):
        before = filled.read_bytes()
        writer = start(script, filled, number + 1)
        while filled.read_bytes() == before:
            assert writer.poll() is None
        time.sleep(rng.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert_full_hit(Cache(filled))
    Cache(filled).save(KEY, RUN, MEASURED)
    assert_full_hit(Cache(filled))
    assert warnings() == []


def test_a_writer_killed_in_the_middle_of_a_write_leaves_the_old_file(filled):
    before = filled.read_bytes()
    script = """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills at byte 4096
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
save(path, number, samples=4096)
"""
    writer = start(script, filled, 1)
    writer.communicate()
    assert writer.returncode == -signal.SIGXFSZ
    assert filled.read_bytes() == before
    Cache(filled).save(KEY, RUN, MEASURED)
    assert_full_hit(Cache(filled))


def test_a_disk_on_which_nothing_fits_costs_a_warning_and_no_data(filled):
    before = filled.read_bytes()
    script = """
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
save(path, number, samples=4096)
print("went on")
"""
    writer = start(script, filled, 1, stdout=subprocess.PIPE)
    output, errors = writer.communicate()
    assert output == "went on\n"
    assert "was not saved: [Errno 27] File too large; training goes on" in errors
    assert filled.read_bytes() == before
    assert not list(filled.parent.glob("*.tmp"))


def test_a_lock_that_is_never_released_costs_a_warning(filled, warnings, monkeypatch):
    monkeypatch.setattr(fp8tune.store.local_file, "LOCK_TIMEOUT_S", 0.2)
    script = """
from filelock import FileLock
lock = FileLock(path + ".lock")
lock.acquire()
print("locked", flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = start(script, filled, 0, **pipes)
    assert holder.stdout.readline() == "locked\n"
    Cache(filled).save(KEY, RUN, MEASURED)
    holder.communicate("")
    (warning,) = warnings()
    assert "was not saved: The file lock" in warning
    with FileLock(f"{filled}.lock", timeout=1):
        assert_full_hit(Cache(filled))


def test_importing_the_cache_imports_no_torch(path):
    writer = start("sys.exit('torch' in sys.modules)", path, 0)
    assert writer.communicate()[1] == ""
    assert writer.returncode == 0


def test_the_kept_file_is_plain_json():
    document = json.loads(GOLDEN.read_text())
    assert document["format"] == "fp8tune-cache"
    assert document["version"] == FORMAT_VERSION


def test_an_environment_that_says_one_thing_twice_costs_its_entries(filled, warnings):
    document = json.loads(filled.read_text())
    environment = document["keys"][0]["environment"]
    environment.insert(0, environment[0])
    filled.write_text(sealed(json.dumps(document)))
    cache = Cache(filled)
    (warning,) = warnings()
    assert "expected each once" in warning
    assert cache.layers(KEY, MODEL) is None
    assert cache.explain_miss(KEY, MODEL)
