"""The benchmark of verdicts under load, at its smallest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(300)
def test_four_tunings_under_load_write_no_opposite_verdict(tmp_path):
    path = tmp_path / "contention.json"
    command = [sys.executable, ROOT / "tests/benchmarks/contention.py", path, "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(  # noqa: S603
        command, env=environment, capture_output=True, text=True, check=True
    )
    document = json.loads(path.read_text())
    assert {(x["threads"], x["recipe"]) for x in document["tunings"]} == {
        (threads, recipe) for threads in (1, 2) for recipe in ("half", "twice")
    }
    counts = document["counts"]
    assert counts["tunings"] == 4
    assert counts["cached"] + counts["not cached as unsteady"] == 4
    assert counts["opposite in the cache"] == 0
    assert "sum under load | 4" in done.stderr
