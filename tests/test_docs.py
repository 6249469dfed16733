"""The documentation: its code runs, its links lead somewhere, its messages are ours."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest

from fp8tune import recipes
from fp8tune.intervals import looks, speedup_interval

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# These have tests of their own.
TESTED_ELSEWHERE = {
    "integrations.md",
    "command-line.md",
    "seeing-it.md",
    "distributed.md",
}
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(DOCS.rglob("*.md")),
]
MOST_BLOCKS_NOT_RUN = 2
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PRINTED = re.compile(r"^print\(.*\)  # (.+)$", re.MULTILINE)


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, kind):
    """(number of the line, text) of each block whose fence says exactly this."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start()) + 1, match[2])
        for match in FENCE.finditer(text)
        if match[1].strip() == kind
    ]


def code_blocks(kind="python"):
    return [
        pytest.param(code, id=f"{name_of(page)}:{line}")
        for page in PAGES
        if page.name not in TESTED_ELSEWHERE
        for line, code in blocks(page, kind)
    ]


def prose(page):
    """The page without code, in which brackets are no links and # no headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"^ {4,}.*$", "", text, flags=re.MULTILINE)


def anchors(page):
    """What a heading is called in an address, as GitHub does it."""
    headings = (x.strip().lower() for x in HEADING.findall(prose(page)))
    return {re.sub(r"[^\w\- ]", "", x).replace(" ", "-") for x in headings}


def links():
    return [
        pytest.param(page, target, id=f"{name_of(page)} -> {target}")
        for page in PAGES
        for target in dict.fromkeys(LINK.findall(prose(page)))
        if not target.startswith(("http://", "https://"))
    ]


def source_texts():
    """Every string of the package, with a null character for what varies in it."""
    paths = sorted((ROOT / "fp8tune").rglob("*.py"))
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {re.sub(r"%[srd]", "\0", text_of(node)) for node in nodes}


def text_of(node):
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part) for part in parts)
        case ast.FormattedValue():
            return "\0"
        case _:
            return ""


def fragments():
    """What the quoted messages consist of, between the "..." for what varies."""
    quoted = [
        (line + i, message)
        for line, text in blocks(DOCS / "troubleshooting.md", "text")
        for i, message in enumerate(text.splitlines(), start=1)
    ]
    return [
        pytest.param(part.strip(), id=f"line {line}: {part.strip()[:40]}")
        for line, message in quoted
        for part in message.split("...")
        if re.search(r"\w", part)
    ]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A temporary folder, and a registry that forgets what is registered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes, "_REGISTRY", dict(recipes._REGISTRY))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("code", code_blocks())
def test_code_runs_and_prints_what_it_says(code):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "<block>", "exec"), {"__name__": "__main__"})  # noqa: S102
    expected = PRINTED.findall(code)
    if expected:
        assert output.getvalue().splitlines() == expected


@pytest.mark.parametrize("code", code_blocks("python notest"))
def test_code_that_cannot_run_here_is_python(code):
    ast.parse(code)


def test_few_blocks_are_not_run():
    assert len(code_blocks("python notest")) <= MOST_BLOCKS_NOT_RUN


@pytest.mark.parametrize(("page", "target"), links())
def test_links_lead_somewhere(page, target):
    path, _, anchor = target.partition("#")
    found = (page.parent / path).resolve() if path else page
    assert found.exists()
    assert not anchor or anchor in anchors(found)


@pytest.fixture(scope="module")
def texts():
    return source_texts()


@pytest.mark.parametrize("fragment", fragments())
def test_quoted_messages_are_in_the_source(fragment, texts):
    assert any(fragment in text for text in texts)


def test_the_quotes_were_found():
    assert len(fragments()) > 50


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_the_table_in_how_it_decides_is_that_of_the_intervals():
    text = (DOCS / "how-it-decides.md").read_text(encoding="utf-8")
    number = len(looks(128))
    ranks = [speedup_interval(range(1, n + 1), 0.95, number).low for n in looks(128)]
    assert ranks == [1, 3, 9, 22, 49]
    rows = re.findall(r"^\| (\d+) \| (?:smallest|(\d+)\w\w)\b", text, re.MULTILINE)
    assert [(int(n), int(r or 1)) for n, r in rows] == [
        *zip(looks(128), ranks, strict=True)
    ]
