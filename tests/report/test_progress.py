"""Progress: a bar on a terminal, a line per signature in a log, silence at WARNING."""

import io
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fp8tune.report.progress import Progress, time_left

ROOT = str(Path(__file__).parents[2])

SCRIPT = """
import logging, sys
from fp8tune.report.progress import Progress
logging.basicConfig(level=sys.argv[1], format="%(message)s", filename=sys.argv[2] or None)
ticks = iter(range(100))
with Progress(3, now=lambda: 30.0 * next(ticks)) as progress:
    for name in ("wq", "wk", "[bold]wv"):
        progress.begin(f"M=8 of {name}")
        progress.end(f"{name}: 1.20x")
print("done", file=sys.stderr)
"""


def run_on_a_terminal(level, file=""):
    """What three signatures write to a terminal of 100 columns."""
    leader, follower = pty.openpty()
    with subprocess.Popen(  # noqa: S603 - runs the script above
        [sys.executable, "-c", SCRIPT, level, str(file)],
        stderr=follower,
        env=os.environ | {"PYTHONPATH": ROOT, "TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(follower)
        data = b""
        while part := _read(leader):
            data += part
        process.wait()
    os.close(leader)
    return data.decode()


def _read(leader):
    try:
        return os.read(leader, 4096)
    except OSError:  # the other end is closed
        return b""


def run_in_a_pipe(level):
    command = [sys.executable, "-c", SCRIPT, level, ""]
    environment = os.environ | {"PYTHONPATH": ROOT}
    return subprocess.run(  # noqa: S603 - runs the script above
        command, env=environment, capture_output=True, text=True, check=True
    ).stderr


def visible(text):
    """The text without colours and cursor movements."""
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)


def test_a_log_gets_one_line_per_signature():
    assert run_in_a_pipe("INFO").splitlines() == [
        "[1/3] wq: 1.20x",
        "[2/3] wk: 1.20x",
        "[3/3] [bold]wv: 1.20x",
        "done",
    ]


def test_a_terminal_gets_a_bar_with_the_time_left():
    text = visible(run_on_a_terminal("INFO"))
    assert "━" in text
    assert "M=8 of wq" in text
    # The clock jumps 30 s between any two looks at it.
    assert "1/3 about 120 s left M=8 of wk" in text.replace("2 min", "120 s")
    assert "2/3" in text
    assert "M=8 of [bold]wv" in text


def test_lines_on_a_terminal_do_not_run_into_the_bar():
    lines = re.split(r"[\r\n]+", visible(run_on_a_terminal("INFO")))
    for line in ("[1/3] wq: 1.20x", "[2/3] wk: 1.20x", "[3/3] [bold]wv: 1.20x", "done"):
        assert line in lines


def test_the_bar_is_gone_at_the_end():
    last = run_on_a_terminal("INFO").rsplit("[3/3]", 1)[1]
    assert "\x1b[2K" in last
    assert visible(last).split()[-1] == "done"
    assert "\x1b[?25h" in last  # the cursor is shown again


def test_a_terminal_and_a_log_file_get_what_each_can_show(tmp_path):
    file = tmp_path / "log.txt"
    screen = visible(run_on_a_terminal("INFO", file))
    assert "━" in screen
    assert "1.20x" not in screen
    assert [line[:5] for line in file.read_text().splitlines()] == [
        "[1/3]",
        "[2/3]",
        "[3/3]",
    ]


@pytest.mark.parametrize("level", ["WARNING", "ERROR"])
def test_a_logger_at_warning_is_silent(level):
    assert run_in_a_pipe(level) == "done\n"
    assert run_on_a_terminal(level) == "done\r\n"


def test_ranks_that_say_nothing_say_nothing(caplog):
    caplog.set_level(logging.INFO, "fp8tune")
    with Progress(1, shown=False, stream=Terminal()) as progress:
        progress.begin("wq")
        progress.end("wq")
    assert caplog.records == []


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self):
        return True


def test_an_error_takes_the_bar_away(caplog):
    caplog.set_level(logging.INFO, "fp8tune")
    stream = Terminal()

    def interrupted():
        with Progress(2, stream=stream) as progress:
            progress.begin("wq")
            raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        interrupted()
    assert "wq" in stream.getvalue()


@pytest.mark.parametrize(
    ("elapsed", "done", "total", "text"),
    [
        (5.0, 0, 10, ""),
        (5.0, 1, 10, "about 45 s left"),
        (1.0, 10, 10, "about 0 s left"),
        (119.4, 1, 2, "about 119 s left"),
        (120.0, 1, 2, "about 2 min left"),
        (600.0, 1, 3, "about 20 min left"),
    ],
)
def test_the_time_left_is_as_long_as_what_is_done_took(elapsed, done, total, text):
    assert time_left(elapsed, done, total) == text
