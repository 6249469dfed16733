"""Caches whose checksum is right and whose values are anybody's guess.

A valid file is changed in one to four places to what should not stand there, and sealed
again. Neither AutoFloat8 nor any command may raise.
"""

import copy
import functools
import hashlib
import json
import logging
import os
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fp8tune import AutoFloat8, TuneConfig
from fp8tune.commands.cli import main
from fp8tune.decision.trials import RoleGain, TrialRecord, TrialResult, TrialSteps
from fp8tune.store.cache import Cache

# FP8TUNE_FUZZ_FILES=2000 tries as many as were tried before a release.
FILES = int(os.environ.get("FP8TUNE_FUZZ_FILES", "500"))

CONFIG = TuneConfig(static_filter="divisible", include_output_layer=True, trial_steps=5)

ODD = st.one_of(
    st.sampled_from(
        [
            *[
                None,
                True,
                False,
                0,
                -1,
                1,
                -5,
                2**31,
                2**53,
                2**64,
                10**400,
                -(10**400),
            ],
            *[0.0, -0.0, 1e-320, 1e-200, 1e200, 1.5, -1.5, 1e308, float("nan")],
            *[
                "",
                "x",
                "wq",
                "0.0",
                "faster",
                "bf16",
                "float32",
                "\0",
                "\ud800",
                "a" * 9999,
            ],
            *["2026-13-01", "9999-12-31", [], {}, [[]], [0], [1.0], [None]],
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(32, 32) for _ in range(3)], nn.Linear(32, 16))


@pytest.fixture(scope="module")
def document(tmp_path_factory, scripted_clock):
    """The cache of a run of four Linears and a trial of it, as JSON."""
    path = tmp_path_factory.mktemp("fuzz") / "cache.json"
    clock = scripted_clock(lambda _, variant: 2.0 if variant == "reference" else 1.0)
    config = TuneConfig(static_filter="divisible", include_output_layer=True)
    auto = AutoFloat8(blocks(), "bf16", cache=path, config=config, clock=clock)
    for _ in range(4):
        auto(torch.ones(8, 32)).sum().backward()
        auto.zero_grad()
    assert auto.frozen
    cache = Cache(path)
    ((key, _), run) = next(iter(cache._contents.runs.items()))
    won = tuple(x.fqn for x in run.layers)
    results = (TrialResult(("{}",), 4, 9.5, 1.05, 1.01, None, 8),)
    roles = (RoleGain("{}", won, 0.5, 0.1, 0.4, 0.1),)
    steps = TrialSteps(0, (-1, 0), (99.5, 9.5))
    cache.save(key, run.layers, (), TrialRecord(won, (), results, roles, steps))
    document = json.loads(path.read_text())
    assert document["runs"][0]["trial"]
    return document


def places(value, path=()):
    """The path of every value inside."""
    yield path
    inner = enumerate(value) if isinstance(value, list) else ()
    for name, item in value.items() if isinstance(value, dict) else inner:
        yield from places(item, (*path, name))


def change(document, path, value, how):
    """Replace, remove or repeat what is at the path."""
    *outer, last = path
    holder = functools.reduce(lambda x, name: x[name], outer, document)
    if how == "remove":
        del holder[last]
    elif how == "repeat" and isinstance(holder, list):
        holder.insert(last, copy.deepcopy(holder[last]))
    else:
        holder[last] = value


def sealed(document):
    """The bytes, with the checksum that the format's page describes."""
    blank = "0" * 64
    text = json.dumps(document | {"sha256": blank})
    digest = hashlib.sha256(text.encode()).hexdigest()
    return re.sub(blank, digest, text, count=1).encode()


@st.composite
def wrong(draw, document):
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 4))):
        known = [x for x in places(changed) if len(x) > 1]
        path = draw(st.sampled_from(known))
        how = draw(
            st.sampled_from(["replace", "replace", "replace", "remove", "repeat"])
        )
        change(changed, path, draw(ODD), how)
    return sealed(changed)


def commands(path):
    file = str(path)
    return [
        ["show", file],
        ["show", file, "--json", "--all"],
        ["explain", file, "1"],
        ["diff", file, file, "--all"],
        ["export", file, "--to", "torchtitan"],
        ["export", file, "--to", "torchao"],
        ["forget", file, "--dry-run", "--older-than", "1d"],
        ["forget", file],
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_sealed_file_stops_training_or_a_command(
    document, tmp_path, silent_clock, capsys
):
    logging.getLogger("fp8tune").setLevel(logging.CRITICAL)
    path = tmp_path / "cache.json"
    ran = []

    @settings(
        max_examples=FILES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(wrong(document))
    def try_one(data):
        path.write_bytes(data)
        auto = AutoFloat8(
            blocks(), "bf16", cache=path, config=CONFIG, clock=silent_clock
        )
        str(auto.report())
        command = commands(path)[len(ran) % 8]
        assert main(command) in (0, 1, 2)
        ran.append(command)

    try:
        try_one()
    finally:
        logging.getLogger("fp8tune").setLevel(logging.NOTSET)
    assert len(ran) >= FILES
    capsys.readouterr()


def test_some_sealed_files_can_be_plotted_or_say_why_not(document, tmp_path, capsys):
    path = tmp_path / "cache.json"
    odd = [0, 10**300, 1e-300, "x", None, []]
    for value in odd:
        changed = copy.deepcopy(document)
        for row in changed["measurements"]:
            row["measurement"]["reference_ms"][0] = value
        path.write_bytes(sealed(changed))
        code = main(["plot", str(path), "-o", str(tmp_path / "a.png")])
        assert code in (0, 1, 2)
    assert "Traceback" not in capsys.readouterr().err
