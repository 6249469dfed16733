"""The command line: golden text in two widths, JSON by its schemas, errors, speed."""

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

import fp8tune
from fp8tune.commands.cli import main
from fp8tune.decision.records import REFERENCE, Layer, Measurement, Shape, Signature
from fp8tune.report.columns import Column, column_lines
from fp8tune.store import environment
from fp8tune.store.cache import Cache, Key

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden"
SCHEMAS = ROOT / "docs" / "schema"

# Every command, as it is called in a folder with llama.json.
CASES = {
    "show": ["show", "llama.json"],
    "show-run": ["show", "llama.json", "--run", "1", "--min-speedup", "1.5"],
    "explain-faster": ["explain", "llama.json", "layers.3.feed_forward.w1"],
    "explain-slower": ["explain", "llama.json", "layers.0.attention.wk", "--run", "1"],
    "explain-ragged": ["explain", "llama.json", "layers.31.attention.wo"],
    "explain-left-out": ["explain", "llama.json", "output"],
    "show-tried": ["show", "tried.json"],
    "explain-tried": ["explain", "tried.json", "layers.0.attention.wo"],
    "explain-tried-kept": ["explain", "tried.json", "layers.1.feed_forward.w1"],
    "explain-tried-gained": ["explain", "tried.json", "layers.1.attention.wk"],
    "diff": ["diff", "llama.json", "llama.json", "--run-a", "1"],
    "diff-same": ["diff", "llama.json", "llama.json"],
    "diff-all": ["diff", "llama.json", "llama.json", "--run-a", "1", "--all"],
    "measure": ["measure", "--m", "64", "--k", "32", "--n", "48", "--recipe", "bf16"],
    "sweep": [
        *("sweep", "--device", "cpu"),
        *("--m", "16,64", "--k", "32,64", "--n", "24,32,64"),
    ],
    "bench": [
        *("bench", "--device", "cpu", "--recipe", "bf16", "--eager"),
        *("--workload", "torchtitan-debug"),
    ],
    "env": ["env", "--device", "cpu"],
    "export-torchtitan": ["export", "llama.json", "--to", "torchtitan"],
    "export-automodel": ["export", "llama.json", "--to", "automodel"],
    "export-tried": ["export", "tried.json", "--to", "automodel"],
    "forget-old": ["forget", "llama.json", "--older-than", "2026-02-15"],
    "forget-env": ["forget", "llama.json", "--env", "torch=2.13*", "--dry-run"],
    "forget-all": ["forget", "llama.json"],
    "plot": ["plot", "llama.json", "-o", "speedups.svg"],
    "plan": [
        *("plan", "--hf", str(ROOT / "tests" / "data" / "llama3-70b-config.json")),
        *("--mesh", "dp=32,tp=8", "--tokens", "16384", "--device", "cpu"),
        *("-o", "plan.json"),
    ],
}
WIDTHS = (80, 120)


@pytest.fixture
def folder(llama_cache, tried_cache, monkeypatch):
    assert tried_cache.parent == llama_cache.parent
    monkeypatch.chdir(llama_cache.parent)
    return llama_cache.parent


def half_as_long(signature, variant):
    del signature
    return 0.75 if variant == REFERENCE else 0.5


@pytest.fixture
def call(folder, scripted_clock, monkeypatch, capsys):
    """Run the command line in a width; returns the exit code, stdout and stderr."""
    monkeypatch.setattr(environment, "_cpu_name", lambda: "Imaginary 1000")

    def run(*arguments, width=80):
        monkeypatch.setenv("COLUMNS", str(width))
        timed = arguments[:1] in (("measure",), ("sweep",), ("bench",), ("plan",))
        extra = {"clock": scripted_clock(half_as_long)} if timed else {}
        try:
            code = main(arguments, **extra)
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def of_any_machine(text):
    """What env prints, with the names of the fields instead of the values."""
    return re.sub(r"^(\w+) ( +)(\S.*)$", r"\1 \2<\1>", text, flags=re.MULTILINE)


# Golden text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CASES)
def test_golden_text(call, name, width):
    """Set FP8TUNE_WRITE_GOLDEN=1 to write the files anew; look at what git diff says."""
    code, text, errors = call(*CASES[name], width=width)
    assert (code, errors) == (0, "")
    text = of_any_machine(text) if name == "env" else text
    path = GOLDEN / f"{name}.{width}.txt"
    if os.environ.get("FP8TUNE_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert max(map(len, text.splitlines())) <= width
    assert all(line.isprintable() for line in text.split("\n"))


def test_the_page_shows_what_is_printed():
    page = (ROOT / "docs" / "command-line.md").read_text()
    printed = {line for x in GOLDEN.iterdir() for line in x.read_text().splitlines()}
    shown = [x for block in page.split("```")[1::2] for x in block.splitlines()]
    assert len(shown) > 10
    assert set(shown) - printed == {"..."}


def test_every_golden_file_belongs_to_a_case():
    names = {f"{name}.{width}.txt" for name in CASES for width in WIDTHS}
    assert {path.name for path in GOLDEN.iterdir()} == names


def test_every_command_has_golden_text_and_a_schema():
    commands = {path.stem for path in (ROOT / "fp8tune" / "commands").glob("*.py")}
    commands -= {"__init__", "answer", "arguments", "cli", "device", "values"}
    assert {arguments[0] for arguments in CASES.values()} == commands
    assert {path.stem for path in SCHEMAS.glob("*.json")} == commands


# JSON


@pytest.mark.parametrize("name", CASES)
def test_json_is_what_the_schema_describes(call, name):
    code, text, errors = call(*CASES[name], "--json")
    assert (code, errors) == (0, "")
    schema = json.loads((SCHEMAS / f"{CASES[name][0]}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("name", CASES)
def test_the_schema_knows_every_field(name):
    """A field that is added or renamed must show up in the schema too."""

    def objects(schema):
        if isinstance(schema, dict):
            if schema.get("type") == "object" and "properties" in schema:
                yield schema
            for value in schema.values():
                yield from objects(value)

    schema = json.loads((SCHEMAS / f"{CASES[name][0]}.json").read_text())
    for each in objects(schema):
        assert each["additionalProperties"] is False
        assert each["required"] == list(each["properties"])


def test_json_says_what_the_table_says(call):
    _, text, _ = call("show", "llama.json", "--run", "2", "--json")
    (run,) = json.loads(text)["runs"]
    rows = {row["layer"]: row for row in run["layers"]}
    row = rows["layers.{0..31}.feed_forward.w1"]
    assert (row["m"], row["k"], row["n"]) == ([2048], 4096, 14336)
    assert (row["verdict"], row["reason"]) == ("converted", "faster")
    assert row["fqns"] == [f"layers.{i}.feed_forward.w1" for i in range(32)]
    assert run["environment"]["torch"] == "2.13.0"
    assert run["recorded"] == "2026-03-01"


def test_all_unfolds(call):
    _, text, _ = call("show", "llama.json", "--run", "1", "--all", "--json")
    (run,) = json.loads(text)["runs"]
    assert len(run["layers"]) == 32 * 7 + 1
    assert {len(row["fqns"]) for row in run["layers"]} == {1}
    _, table, _ = call("show", "llama.json", "--run", "1", "--all", width=120)
    assert "layers.17.attention.wq" in table


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "llama.json", "--run", "7"], "llama.json has no run 7, only 1 to 2"),
        (
            ["explain", "llama.json", "layers.0.attention.wx"],
            "no Linear named 'layers.0.attention.wx'; did you mean layers.0.attention.w",
        ),
        (["diff", "llama.json", "llama.json", "--run-b", "3"], "has no run 3"),
        (
            ["forget", "llama.json", "--env", "torch=1.0"],
            "nothing in llama.json matches",
        ),
        (["show", "empty.json"], "empty.json holds no run yet"),
        (["plot", "llama.json", "-o", "a.png", "--run", "9"], "has no run 9"),
    ],
)
def test_what_does_not_exist_is_exit_code_1(call, folder, arguments, message):
    (folder / "empty.json").write_bytes((folder / "llama.json").read_bytes())
    call("forget", "empty.json")
    assert_one_line(call(*arguments), 1, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["shwo"], "invalid choice: 'shwo'"),
        (["show"], "the following arguments are required: CACHE"),
        (["show", "none.json"], "No such file or directory: '"),
        (["show", "torn.json"], "found no JSON in UTF-8"),
        (["show", "."], "found a folder, a pipe or a device, expected a file"),
        (["show", "llama.json", "--run", "0"], "'0' is no whole number of at least 1"),
        (["show", "llama.json", "--min-speedup", "-1"], "min_speedup is -1.0; it must"),
        (["measure", "--m", "1", "--k", "16"], "required: --n"),
        (["measure", "--m", "1", "--k", "x", "--n", "1"], "'x' is no whole number"),
        (
            ["measure", *["--m", "16", "--k", "24", "--n", "32", "--device", "cpu"]],
            "rowwise does not take K=24 N=32: K or N is no multiple of 16",
        ),
        (
            ["measure", *["--m", "16", "--k", "16", "--n", "16", "--recipe", "best"]],
            "unknown recipe 'best'; choose one of bf16,",
        ),
        (["env", "--device", "tpu9"], "no device 'tpu9'; give cpu, cuda or cuda:1"),
        (["env", "--device", "meta"], "nothing is timed on 'meta'"),
        (["env", "--device", "cuda:99"], "torch finds no device 'cuda:99' here"),
        (["forget", "none.json"], "No such file or directory: '"),
        (
            ["forget", "llama.json", "--older-than", "old"],
            "--older-than is 'old'; give",
        ),
        (["forget", "llama.json", "--env", "torch"], "--env is 'torch'; give a field"),
        (["plot", "llama.json", "-o", "a.bmp"], "its name must end in .png or .svg"),
        (["plot", "llama.json", "-o", "no/a.png"], "No such file or directory: 'no/a"),
        (["plan"], "which model is not said; give MODULE:FUNCTION"),
        (["plan", "torch.nn:ReLU"], "given once: as --batch 2x8192, or as --tokens"),
        (["plan", *["a:b", "--tokens", "8", "--batch", "8"]], "given once"),
        (
            ["plan", *["a:b", "--hf", "c", "--tokens", "8"]],
            "give either it or MODULE:FUNCT",
        ),
        (["plan", *["torch.nn", "--batch", "8"]], "'torch.nn' names no function"),
        (["plan", *["torch.nn:Lin", "--batch", "8"]], "'torch.nn:Lin' cannot be impo"),
        (["plan", *["torch.nn:ReLU", "--batch", "8"]], "ReLU holds no nn.Linear"),
        (["plan", *["a:b", "--batch", "2*8"]], "'2*8' is no whole number"),
        (["plan", *["a:b", "--mesh", "tp"]], "'tp' is no mesh such as dp=32,tp=8"),
        (["plan", *["a:b", "--mesh", "tp=2,tp=2"]], "is no mesh such as dp=32,tp=8"),
        (["plan", *["a:b", "--mesh", "tp=x"]], "'tp=x' is no mesh such as dp=32,tp=8"),
        (
            ["plan", "--hf", "llama.json", "--tokens", "8"],
            "is no config of a model tha",
        ),
        (["plan", "--hf", "none.json", "--tokens", "8"], "there is no file none.json"),
    ],
)
def test_wrong_use_is_exit_code_2(call, folder, arguments, message):
    (folder / "torn.json").write_bytes((folder / "llama.json").read_bytes()[:1000])
    assert_one_line(call(*arguments), 2, message)


EXPECTED = [
    *("plan", "--hf", str(ROOT / "tests" / "data" / "llama3-70b-config.json")),
    *("--mesh", "dp=32,tp=8", "--tokens", "16384", "--no-device"),
]


def test_what_is_expected_of_layers_that_nobody_timed(call):
    code, text, errors = call(*EXPECTED, width=160)
    assert (code, errors) == (0, "")
    up, down = (
        next(line for line in text.splitlines() if f"mlp.{x}_proj" in line)
        for x in ("up", "down")
    )
    # 3584 lies between the table's 2048 and 4096, whose speedups are 0.87 and 1.08.
    assert re.search(r"16384 +8192 +3584 of 28672 +1.04 \[0.85, 1.10\] +unsure", up)
    assert re.search(r"16384 +3584 of 28672 +8192 +1.17 \[1.03, 1.22\] +faster", down)
    assert "expected, not timed: speedups of rowwise on NVIDIA H100" in text


def test_what_is_expected_for_programs(call):
    code, text, _ = call(*EXPECTED, "--min-speedup", "1.3", "--json")
    data = json.loads(text)
    schema = json.loads((ROOT / "docs" / "schema" / "plan.json").read_text())
    jsonschema.validate(data, schema)
    assert code == 0
    assert data["timing"] == "expected, not timed"
    assert {x["expected"] for x in data["layers"]} == {
        "slower",
        "left out: small kn",
        "left out: output layer",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "bf16"], "no table is published for 'bf16', only for rowwise"),
        (["-o", "plan.json"], "no use for --output"),
        (["--cache", "llama.json"], "no use for --cache"),
    ],
)
def test_without_a_device_nothing_can_be_planned(call, folder, arguments, message):
    assert_one_line(call(*EXPECTED, *arguments), 2, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--mesh", "tp=3", "--tokens", "128"],
            "sizes of the mesh divide those of the",
        ),
        (["--batch", "2x8x3"], "check the batch"),
        (["--mesh", "pp=2", "--tokens", "128"], "'pp'"),
    ],
)
def test_a_wrong_mesh_or_batch_is_one_sentence(call, folder, arguments, message):
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 128,
    }
    (folder / "small.json").write_text(json.dumps(config))
    command = ["plan", "--hf", "small.json", "--recipe", "bf16", *arguments]
    assert_one_line(call(*command), 2, message)


@pytest.mark.parametrize(
    "command", ["show", "explain", "diff", "export", "plot", "forget"]
)
@pytest.mark.parametrize("what", ["loop", "pipe", "/dev/zero", "/dev/null"])
def test_what_is_no_file_is_one_line_and_exit_code_2(call, folder, command, what):
    if what == "loop":
        (folder / what).symlink_to(folder / what)
    if what == "pipe":
        os.mkfifo(folder / what)
    more = {
        "explain": ["wq"],
        "diff": ["llama.json"],
        "export": ["--to", "torchao"],
        "plot": ["-o", "a.png"],
    }
    found = "Too many levels of symbolic links" if what == "loop" else "expected a file"
    assert_one_line(call(command, what, *more.get(command, [])), 2, found)


@pytest.mark.parametrize("cache", ["a\0b", "nosuch://bucket/folder"])
def test_what_cannot_be_a_place_is_one_line_and_exit_code_2(call, cache):
    assert_one_line(call("show", cache), 2, "must be the path of a JSON file, or a URL")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none/a.png", "make the folder none first"),
        (".", "'.' is a folder; name"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ("plan", "train:build", "--batch", "2x8", "-o"),
        ("plot", "llama.json", "-o"),
        ("show", "llama.json", "--html"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_done(
    call, folder, command, name, message
):
    del folder
    assert_one_line(call(*command, name), 2, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"format": "fp8tune-plan"}',
            "A plan is read by Plan.load, and by fp8tune exp",
        ),
        ("hi", "no JSON"),
    ],
)
def test_what_is_no_cache_is_said_with_what_would_be(call, folder, text, message):
    (folder / "other.json").write_text(text)
    assert_one_line(call("show", "other.json"), 2, message)


def assert_one_line(result, expected, message):
    code, text, errors = result
    assert (code, text) == (expected, "")
    assert errors.count("\n") == 1
    assert errors.startswith("fp8tune")
    assert re.match(r"fp8tune( \w+)?: ", errors)
    assert message in errors


def test_a_shape_that_cannot_be_timed_is_exit_code_1(folder, scripted_clock, capsys):
    del folder

    def failing(signature, variant):
        raise MemoryError("9 GB")

    arguments = [
        "measure",
        "--m",
        "8",
        "--k",
        "16",
        "--n",
        "16",
        "--recipe",
        "bf16",
        "--device",
        "cpu",
    ]
    assert main(arguments, clock=scripted_clock(failing)) == 1
    assert "out of memory (MemoryError: 9 GB)" in capsys.readouterr().err


def test_nothing_is_written_by_a_command_that_fails(call, folder):
    files = {"llama.json", "tried.json"}
    before = (folder / "llama.json").read_bytes()
    call("forget", "none.json")
    call("forget", "llama.json", "--older-than", "old")
    call("forget", "llama.json", "--dry-run")
    found = {path.name for path in folder.iterdir()}
    assert files <= found <= files | {f"{name}.lock" for name in files}
    assert (folder / "llama.json").read_bytes() == before


# Forgetting


def runs_left(call):
    _, text, _ = call("show", "llama.json", "--json")
    return [run["environment"]["torch"] for run in json.loads(text)["runs"]]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--older-than", "2026-01-31"], None),
        (["--older-than", "2026-02-01"], ["2.13.0"]),
        (["--env", "torch=2.12.0"], ["2.13.0"]),
        (["--env", "torch=2.1[23].0", "--env", "device=*1000"], []),
        (["--env", "torch=2.13.0", "--older-than", "2026-02-01"], None),
        (["--older-than", "1d"], []),
    ],
)
def test_what_matches_is_forgotten_and_the_rest_stays(call, options, left):
    code, _, _ = call("forget", "llama.json", *options)
    assert code == (1 if left is None else 0)
    if left == []:
        assert call("show", "llama.json")[0] == 1
    else:
        assert runs_left(call) == (left or ["2.12.0", "2.13.0"])


def test_a_timing_without_a_date_counts_as_old(call, folder):
    undated = Signature(
        Shape(8, 16, 16, "bfloat16", "bfloat16", None, False), *[True] * 3
    )
    key = Key((("torch", "2.9"),), "rowwise", "", "eager")
    layer = Layer("old", 16, 16, "bfloat16", True, None, ((undated, 1),))
    times = Measurement(undated, "rowwise", (1.0,), (1.0,))
    Cache(folder / "llama.json").save(key, (layer,), [times])
    call("forget", "llama.json", "--older-than", "2000-01-01")
    assert runs_left(call) == ["2.12.0", "2.13.0"]


def test_a_later_run_finds_what_was_not_forgotten(call, folder):
    before = Cache(folder / "llama.json")
    (kept,) = [key for key in before._contents.measurements if "2.13.0" in str(key)]
    call("forget", "llama.json", "--older-than", "2026-02-01")
    after = Cache(folder / "llama.json")
    assert after.measurements(kept) == before.measurements(kept)


# As a program


def program(*arguments, **options):
    return subprocess.run(  # noqa: S603 - runs this package
        [sys.executable, "-m", "fp8tune", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_python_m_runs_the_command_line(llama_cache):
    run = program("show", llama_cache)
    assert (run.returncode, run.stderr) == (0, "")
    assert "{0..31}" in run.stdout
    assert "\x1b" not in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 80


def test_the_installed_command_is_this_one():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'fp8tune = "fp8tune.commands.cli:main"' in text
    assert program("--version").stdout == f"fp8tune {fp8tune.__version__}\n"


def on_a_terminal(arguments, **environment):
    """What the command writes to a terminal."""
    leader, follower = pty.openpty()
    with subprocess.Popen(  # noqa: S603 - runs this package
        [sys.executable, "-m", "fp8tune", *map(str, arguments)],
        stdout=follower,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"} | environment,
    ) as process:
        os.close(follower)
        data = b""
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            data += part
        process.wait()
    os.close(leader)
    return data.decode()


def test_a_terminal_gets_colours_unless_it_wants_none(llama_cache):
    green = "\x1b[32m"
    assert green in on_a_terminal(["show", llama_cache])
    assert green not in on_a_terminal(["show", llama_cache], NO_COLOR="1")
    assert green not in on_a_terminal(["show", llama_cache], TERM="dumb")


def test_a_reader_that_leaves_early_is_no_error(llama_cache):
    command = f"{sys.executable} -m fp8tune show {llama_cache} --all | head -1"
    run = subprocess.run(  # noqa: S602 - a pipe between two programs
        command, shell=True, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("run 1 of 2")
    assert run.stderr == ""


def test_names_that_the_terminal_cannot_show_are_no_error(tmp_path, llama_cache):
    cache = Cache(llama_cache)
    ((key, _), run) = next(iter(cache._contents.runs.items()))
    odd = (replace(run.layers[0], fqn="größe.wq"), *run.layers[1:])
    cache.save(key, odd, [])
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "120"}
    result = program("show", llama_cache, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert "gr\\xf6\\xdfe.wq" in result.stdout


# What is imported


def test_help_names_all_commands():
    help = program("--help").stdout
    assert all(f"\n    {name} " in help for name in {x[0] for x in CASES.values()})


@pytest.mark.parametrize("arguments", [["--help"], ["show", "CACHE"]])
def test_torch_is_not_imported_to_look_at_a_cache(llama_cache, arguments):
    asked = [str(llama_cache) if x == "CACHE" else x for x in arguments]
    code = (
        "import sys\nfrom fp8tune.commands.cli import main\n"
        f"try:\n    main({asked!r})\nexcept SystemExit:\n    pass\n"
        "sys.exit(sum(x in sys.modules for x in ('torch', 'matplotlib', 'rich')))"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603


# Columns


def test_a_cell_is_broken_where_readers_would():
    columns = [Column("name"), Column("M", right=True)]
    lines = column_lines(columns, [["layers.{0..31}.attention.wq x32", "8,16,512"]], 22)
    assert [line.split() for line in lines[2:]] == [
        ["layers.{0..31}.", "8,"],
        ["attention.wq", "x32", "16,"],
        ["512"],
    ]


def test_no_letter_is_lost_however_narrow():
    name = "a_very_long_name_without_any_place_to_break.weight"
    lines = column_lines([Column("layer"), Column("K")], [[name, "1.234"]], 24)
    left = "".join(line[: line.find("1.234")].split()[0] for line in lines[2:3])
    rest = "".join(line.strip() for line in lines[3:])
    assert left + rest == name
    assert max(map(len, lines)) <= 24
