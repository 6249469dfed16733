"""The documentation: its code runs, its links lead somewhere, its messages are ours."""

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fp8tune
import fp8tune.recipes
from fp8tune.decision.intervals import looks, speedup_interval

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


def messages():
    """The longest fixed part of each message of tuning that does not get on."""
    for name in ("stuck", "moved"):
        path = ROOT / "fp8tune" / "report" / f"{name}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.Return):
                parts = re.split(r"\0|{\w+}", text_of(node.value))
                longest = max(parts, key=len).strip(" ;,.")
                if len(longest) > 20:
                    yield pytest.param(longest, id=longest[:40])


@pytest.mark.parametrize("message", list(messages()))
def test_a_message_has_an_entry_in_troubleshooting(message):
    text = " ".join((DOCS / "troubleshooting.md").read_text(encoding="utf-8").split())
    beginning = " ".join(message.split()[:4]).rstrip(",")
    assert beginning in text


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, own_registry):
    """A temporary folder, and a registry that forgets what is registered."""
    monkeypatch.chdir(tmp_path)


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


def documented():
    """What the reference describes, by its full name."""
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    return re.findall(r"^\.\. auto(?:class|function|exception):: (\S+)$", text, re.M)


def test_every_public_name_is_in_the_reference():
    public = {f"fp8tune.{name}" for name in fp8tune.__all__}
    public |= {
        f"fp8tune.recipes.{name}"
        for name in fp8tune.recipes.__all__
        if name not in fp8tune.__all__
    }
    assert public <= set(documented())
    assert len(documented()) == len(set(documented()))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does; a warning ends it."""
    pytest.importorskip("sphinx", reason='needs pip install "fp8tune[docs]"')
    folder = tmp_path_factory.mktemp("site")
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--fresh-env"]
    run = subprocess.run(  # noqa: S603 - builds the documentation
        [sys.executable, "-m", "sphinx", *options, "docs", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_site_builds_without_a_warning(site):
    reference = (site / "reference.html").read_text(encoding="utf-8")
    for name in documented():
        assert f'id="{name}"' in reference
    assert (site / "searchindex.js").exists()
    pages = {x.relative_to(DOCS).with_suffix(".html") for x in DOCS.rglob("*.md")}
    assert {x for x in pages if not (site / x).exists()} == set()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_search_of_the_site_finds(site, browser):
    url = (site / "search.html").as_uri()
    browser.show(f"{url}?q=min_sqnr_db", words=["Search finished"])
    results = "[...document.querySelectorAll('#search-results a')].map(x => x.href)"
    found = browser.evaluate(results)
    assert any("reference.html" in x for x in found)


def test_every_picture_is_in_the_gallery():
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    pictures = {x.name for x in (DOCS / "images").glob("*.png")}
    assert pictures == set(re.findall(r"\(images/(\S+\.png)\)", text))


def test_pictures_are_of_a_free_machine_or_the_gallery_says_that_they_are_not():
    """examples/screenshots.py writes beside them whether the machine was steady."""
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    told = [json.loads(x.read_text()) for x in (DOCS / "images").glob("*.json")]
    steady = bool(told) and all(x["steady"] is True for x in told)
    assert steady != ("The machine was not free" in text)


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
