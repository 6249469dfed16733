"""``fp8tune sweep``: the layout of torchao's table, and what its filter gets wrong."""

import csv
import json
import logging
import re
from pathlib import Path

import pytest

from fp8tune.commands.cli import main
from fp8tune.decision.records import REFERENCE

PUBLISHED = Path(__file__).parents[1] / "data" / "h100_rowwise_speedup.csv"
EAGER = ["--device", "cpu", "--eager"]


@pytest.fixture
def sweep(monkeypatch, capsys, scripted_clock):
    """Runs the command; returns the exit code and what it prints."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments, script=None):
        extra = {"clock": scripted_clock(script)} if script else {}
        code = main(["sweep", *EAGER, *arguments], **extra)
        captured = capsys.readouterr()
        assert captured.err == ""
        return code, captured.out

    return run


def speedups(table):
    """A script that takes the speedup of each (M, K, N) from a table."""

    def time_ms(signature, variant):
        shape = signature.shape
        return table[shape.m, shape.k, shape.n] if variant == REFERENCE else 1.0

    return time_ms


def published():
    """(M, K, N) -> speedup."""
    with PUBLISHED.open(newline="") as file:
        return {
            (int(row["M"]), int(row["K"]), int(name[1:])): float(row[name])
            for row in csv.DictReader(file)
            for name in row
            if name.startswith("N")
        }


def rows_of(text):
    """The table's rows, each as a list of cells."""
    lines = text.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("─"))
    return [line.split() for line in [lines[rule - 1], *lines[rule + 1 :]] if line][
        : lines[rule + 1 :].index("") + 1
    ]


def test_a_gpu_like_the_published_one_gives_the_published_table(sweep):
    sizes = ["--m", "1024,4096,16384", "--k", "1024,4096", "--n", "1024,2048,4096"]
    code, text = sweep(*sizes, script=speedups(published()))
    assert code == 0
    with PUBLISHED.open(newline="") as file:
        head, *body = csv.reader(file)
    wanted = [row[:5] for row in body if row[0] in {"1024", "4096", "16384"}]
    expected = [row for row in wanted if row[1] in {"1024", "4096"}]
    head_row, *rows = rows_of(text)
    assert head_row == head[:5]
    assert [[x.removeprefix("0") for x in row] for row in rows] == [
        [x.removeprefix("0") for x in row] for row in expected
    ]


def test_cells_that_torchaos_filter_gets_wrong_are_counted(sweep):
    # Of rowwise it takes N above 2048 where K is above 1024, and not both are small.
    table = {
        (64, 32, 32): 2.0,  # rejected and faster
        (64, 32, 4096): 0.5,  # rejected and slower
        (64, 2064, 32): 1.5,  # rejected and faster
        (64, 2064, 4096): 0.9,  # accepted and slower
        (128, 32, 32): 0.5,
        (128, 32, 4096): 0.5,
        (128, 2064, 32): 0.5,
        (128, 2064, 4096): 1.2,  # accepted and faster
    }
    sizes = ["--m", "64,128", "--k", "32,2064", "--n", "32,4096"]
    _, text = sweep(*sizes, script=speedups(table))
    said = "decide 3 of 8 clear cells wrongly here: it accepts 1 that are slower and "
    assert f"{said}rejects 2 that are faster" in " ".join(text.split())
    _, text = sweep(*sizes, "--json", script=speedups(table))
    found = json.loads(text)
    assert found["static_filter"] == {
        "clear": 8,
        "accepted_slower": 1,
        "rejected_faster": 2,
    }
    accepted = [(x["m"], x["k"], x["n"]) for x in found["cells"] if x["accepted"]]
    assert accepted == [(64, 2064, 4096), (128, 2064, 4096)]


def test_a_recipe_without_thresholds_is_not_judged(sweep):
    sizes = ["--m", "16", "--k", "16", "--n", "16", "--recipe", "rowwise_with_gw_hp"]
    _, text = sweep(*sizes, script=lambda *_: 1.0)
    assert "has no thresholds for rowwise_with_gw_hp" in text
    _, text = sweep(*sizes, "--json", script=lambda *_: 1.0)
    found = json.loads(text)
    assert found["static_filter"] is None
    assert found["cells"][0]["accepted"] is None


def test_cells_that_are_no_clear_speedup_are_marked(sweep):
    def time_ms(signature, variant):
        if variant != REFERENCE:
            return 1.0
        match signature.shape.m:
            case 16:
                return 1.0
            case 32:
                raise MemoryError("9 GB")
            case 64:
                raise RuntimeError("no kernel")
            case _:
                return 2.0

    sizes = ["--m", "16,32,64,128", "--k", "16", "--n", "16,24"]
    _, text = sweep(*sizes, script=time_ms)
    assert rows_of(text) == [
        ["M", "K", "N16", "N24"],
        ["16", "16", "~1.00", "no"],
        ["32", "16", "oom", "no"],
        ["64", "16", "failed", "no"],
        ["128", "16", "2.00", "no"],
    ]
    legend = " ".join(text.split())
    assert "~ is no clear difference from 1.00; oom ran out of memory; failed" in legend


def test_ctrl_c_prints_what_is_timed_by_then(sweep):
    def time_ms(signature, variant):
        if signature.shape.n == 64:
            raise KeyboardInterrupt
        return 2.0 if variant == REFERENCE else 1.0

    sizes = ["--m", "16", "--k", "16", "--n", "16,32,64,128"]
    code, text = sweep(*sizes, script=time_ms)
    assert code == 130
    assert rows_of(text)[1] == ["16", "16", "2.00", "2.00"]
    code, text = sweep(*sizes, "--json", script=time_ms)
    found = json.loads(text)
    assert code == 130
    assert found["complete"] is False
    assert [x["n"] for x in found["cells"]] == [16, 32]


def test_a_cpu_gets_a_grid_of_its_own_and_says_so(sweep):
    _, text = sweep("--recipe", "bf16", script=lambda *_: 1.0)
    head, *rows = rows_of(text)
    assert head == ["M", "K", *(f"N{16 << i}" for i in range(6))]
    assert len(rows) == 36
    assert "scaled down: a GPU gets sizes from 1024 to 32768" in text
    sizes = ["--m", "16", "--k", "16", "--n", "16"]
    _, text = sweep("--recipe", "bf16", *sizes, script=lambda *_: 1.0)
    assert "scaled down" not in text


def test_real_cells_are_timed(sweep):
    sizes = ["--m", "16,64", "--k", "32", "--n", "48", "--max-seconds", "0.01"]
    code, text = sweep("--recipe", "bf16", *sizes)
    assert code == 0
    assert [row[:2] for row in rows_of(text)[1:]] == [["16", "32"], ["64", "32"]]
    assert all(re.fullmatch(r"~?\d+\.\d\d", row[2]) for row in rows_of(text)[1:])


def test_progress_is_logged_where_somebody_listens(sweep, caplog):
    caplog.set_level(logging.INFO, "fp8tune")
    sizes = ["--m", "16", "--k", "16,32", "--n", "16"]
    sweep("--recipe", "bf16", *sizes, script=lambda *_: 1.0)
    lines = [x.message for x in caplog.records]
    assert [line.split(":")[0] for line in lines] == [
        "[1/2] M=16 K=16 N=16, float32, grads of input+weight",
        "[2/2] M=16 K=32 N=16, float32, grads of input+weight",
    ]


def test_the_level_of_the_log_is_as_before(sweep):
    logger = logging.getLogger("fp8tune")
    before = logger.level
    sizes = ["--m", "16", "--k", "16", "--n", "16"]
    sweep("--recipe", "bf16", *sizes, script=lambda *_: 1.0)
    assert logger.level == before


@pytest.mark.parametrize("sizes", ["0", "16,", "16;32", "-16"])
def test_sizes_that_are_none_are_refused(capsys, sizes):
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", f"--m={sizes}"])
    assert "is no whole number of at least 1" in capsys.readouterr().err
