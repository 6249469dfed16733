"""The page of one file, as HTML and in a real browser."""

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, PhaseError, TuneConfig
from fp8tune.commands.cli import main
from fp8tune.decision.coverage import Coverage
from fp8tune.decision.decisions import Decisions
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import (
    Accuracy,
    Decision,
    Measurement,
    Verdict,
)
from fp8tune.decision.trials import TrialRecord, TrialResult
from fp8tune.report.html import run_page
from fp8tune.report.page_map import shape_map
from fp8tune.report.subject import Subject
from tests.helpers import all_faster, signature

MOST_BYTES = 3_000_000
ROWS = "[...document.querySelectorAll('#layer-table tbody tr')]"
NAMES = f"{ROWS}.map(x => x.cells[0].firstChild.textContent.trim())"


def decided(fqn, m, k, n, speedup=1.5, **fields):
    converted = speedup > 1
    return Decision(
        fqn,
        k,
        n,
        Verdict.CONVERTED if converted else Verdict.REFERENCE,
        Reason.FASTER if converted else Reason.SLOWER,
        "rowwise" if converted else None,
        ((signature(m, k, n), 1),),
        reference_ms=1.0,
        candidate_ms=1.0 / speedup,
        speedup=speedup,
        speedup_low=speedup - 0.1,
        speedup_high=speedup + 0.1,
        samples=16,
        nearest="rowwise",
        **fields,
    )


def plan_of(decisions, emulated=False, trials=(), coverage=None):
    environment = (("device", "Imaginary 1000"), ("torch", "2.13.0"))
    return Decisions(
        tuple(decisions),
        "rowwise",
        "bfloat16",
        emulated,
        "compiled",
        environment,
        trial=TrialRecord((), (), trials) if trials else None,
        coverage=coverage,
    )


def subject_of(decisions, measurements=(), **fields):
    plan = plan_of(decisions, **fields)
    return Subject("A model", plan, plan.decisions, tuple(measurements))


@pytest.fixture
def show(browser, tmp_path):
    """Open HTML in the browser; returns a function that evaluates JavaScript in it."""

    def open_page(html):
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        browser.show(path.as_uri(), words=["layers in"])
        return browser.evaluate

    return open_page


@pytest.fixture
def page(llama_cache, tried_cache, monkeypatch, capsys):
    """A function that runs the command line on a cache and returns its page."""
    assert tried_cache.parent == llama_cache.parent
    monkeypatch.chdir(llama_cache.parent)

    def make(*arguments):
        assert main([*arguments, "--html", "page.html"]) == 0
        assert re.match(
            r"wrote page.html, 0.\d MiB; open it in a browser", capsys.readouterr().out
        )
        return Path("page.html").read_text(encoding="utf-8")

    return make


# What is in the file


class Reader(HTMLParser):
    """The texts of a page without its scripts, and what its tags refer to."""

    def __init__(self, html):
        super().__init__()
        self.words = []
        self.addresses = []
        self._inside = ""
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self._inside = tag
        found = dict(attributes)
        names = ("src", "href", "xlink:href", "action", "srcset", "data")
        self.addresses += [found[x] for x in names if found.get(x)]

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.words.append(data)


def test_the_page_can_be_read_without_javascript(page):
    text = Reader(page("show", "llama.json")).text
    assert "Run 2 of llama.json" in text
    assert "converted 64 of 225 Linears to rowwise" in text
    assert "on Imaginary 1000, recorded 2026-03-01" in text
    row = "2048 4096 14336 1.222 1.051 1.16 [1.15, 1.18] converted rowwise faster"
    assert "layers.{0..31}.feed_forward.w1 32 layers" in text
    assert row in text
    assert "layers.17.feed_forward.w1" in text
    assert "K = 14336 M \\ N 4096 2048 1.00 ~" in text
    assert "speedup of forward + backward, with its interval" in text  # the picture


def test_nothing_in_the_page_leads_out_of_it(page):
    for arguments in (("show", "llama.json"), ("diff", "llama.json", "llama.json")):
        html = page(*arguments)
        inside = ("#", "data:image/png;base64,")
        assert all(x.startswith(inside) for x in Reader(html).addresses)
        assert "default-src 'none'" in html
        assert "@import" not in html
        assert "url(http" not in html


def test_run_picks_the_run(page):
    text = Reader(page("show", "llama.json", "--run", "1")).text
    assert "Run 1 of llama.json" in text
    assert "torch 2.12.0" in text
    assert "2.13.0" not in text


def test_two_runs_side_by_side(page):
    text = Reader(page("diff", "llama.json", "llama.json", "--run-a", "1")).text
    assert "225 Linears: 96 another verdict, 128 slower in B" in text
    assert "torch 2.12.0 2.13.0" in text
    wq = "8192 and 2048 4096 4096 1.07 [1.06, 1.09] 1.00 [0.98, 1.01] rowwise reference"
    assert f"layers.{{0..31}}.attention.wq 32 layers {wq} another verdict" in " ".join(
        re.sub(r"layers\.\d+\.\S+", "", text).split()
    )


def test_what_is_to_be_distrusted_is_said():
    times = {"reference_ms": (1.0,) * 8, "candidate_ms": (1.0,) * 8}
    busy = {"reference_ms": (1.0, *(9.0,) * 7), "candidate_ms": (1.0,) * 8}
    a, b, c = (signature(m, 64, 64) for m in (16, 32, 64))
    measured = [
        Measurement(a, "rowwise", **times, synthetic=True),
        Measurement(b, "rowwise", **busy),
        Measurement(c, "rowwise", **times),
    ]
    decisions = [decided(f"l{m}", m, 64, 64) for m in (16, 32, 64)]
    text = Reader(run_page(subject_of(decisions, measured, emulated=True))).text
    assert "1 of 3 timings are unsteady" in text
    assert "1 of 3 timings were taken on random numbers" in text
    assert "rowwise is emulated here" in text
    rows = [re.search(rf"\bl{m} {m} .*? faster (\w*)", text)[1] for m in (16, 32, 64)]
    assert rows[:2] == ["synthetic", "unsteady"]
    assert rows[2] not in ("synthetic", "unsteady")


def test_trials_and_accuracy_are_there_if_there_are_any():
    trial = TrialResult(("wq", "wo"), 2, 10.5, 1.2, 1.1, 1.3, 12, 2**30)
    accuracy = Accuracy(28.25, 27.5, None, 0.0125, 0.0)
    measured = Measurement(
        signature(16, 64, 64), "rowwise", (1.0,) * 8, (1.0,) * 8, accuracy=accuracy
    )
    decision = decided("l", 16, 64, 64, sqnr_db=27.5)
    text = Reader(run_page(subject_of([decision], [measured], trials=(trial,)))).text
    assert "wq, wo 10.50 ms, 12 rounds" in text  # in the picture
    assert "wq, wo 2 10.50 1.200 [1.100, 1.300] 1.00 12" in text
    assert "M=16 K=64 N=64, bfloat16" in text
    assert "rowwise 28.2 27.5 - 1.250% 0.000%" in text
    bare = Reader(run_page(subject_of([decided("l", 16, 64, 64)]))).text
    assert "Whole plans" not in bare
    assert "Accuracy" not in bare
    assert "Coverage" not in bare


def test_what_a_step_consists_of_is_there_if_it_was_counted():
    layers = [decided("a", 64, 32, 32)]
    rest = (("attention", 130), ("experts", 69), ("lm_head", 1))
    counted = Reader(run_page(subject_of(layers, coverage=Coverage(800, rest)))).text
    assert "candidates 80.0% attention 13.0% experts 6.9% other 0.1%" in counted
    assert "Coverage" not in Reader(run_page(subject_of(layers))).text


def test_names_are_text_whatever_they_hold():
    name = "</script><script>alert(1)</script>&amp;<img src=x onerror=alert(2)>"
    html = run_page(subject_of([decided(name, 16, 64, 64)]))
    assert "<script>alert" not in html
    assert "<img" not in html
    assert name in Reader(html).text


def test_the_map_is_bounded_and_says_what_it_leaves_out():
    decisions = [decided(f"l{i}", i + 1, 64, 16 * (i + 1)) for i in range(100)]
    grids, left_out = shape_map(decisions)
    shown = sum(cell is not None for x in grids for _, row in x.rows for cell in row)
    assert shown + left_out == 100
    assert left_out > 0
    assert f"{left_out} more shapes" in Reader(run_page(subject_of(decisions))).text


def ten_thousand(distinct):
    """As many Linears of one stack, or as many that have nothing in common."""
    speedups = (0.9, 1.0, 1.1, 1.2)
    if distinct:
        return [
            decided(f"part{i}.proj", 16 + i, 64 + 16 * i, 4096, speedups[i % 4])
            for i in range(10_000)
        ]
    return [
        decided(f"layers.{i}.w{j}", 2048, 4096, 1024 * (j + 1), speedups[j % 4])
        for i in range(1250)
        for j in range(8)
    ]


@pytest.mark.parametrize("distinct", [False, True])
def test_ten_thousand_layers_stay_small(distinct, show):
    html = run_page(subject_of(ten_thousand(distinct)))
    assert len(html.encode()) < MOST_BYTES
    evaluate = show(html)
    assert evaluate(f"{ROWS}.length") == (200 if distinct else 8)
    status = evaluate("document.querySelector('[role=status]').textContent")
    assert status.startswith("10,000 of 10,000 layers")
    unfold(evaluate)
    assert evaluate(f"{ROWS}.length") == 200
    evaluate("document.querySelector('.more').click()")
    assert evaluate(f"{ROWS}.length") == 400


def test_pictures_that_cannot_be_drawn_are_said(tmp_path):
    """In a process of its own, in which matplotlib cannot be imported."""
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from tests.report.test_page import *\n"
        "print(run_page(subject_of([decided('l', 16, 64, 64)])))"
    )
    run = subprocess.run(  # noqa: S603 - runs these lines
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert "There are no pictures in the page" in run.stdout
    assert 'pip install "fp8tune[plot]"' in run.stderr


# From a training


def tuned(scripted_clock, **options):
    auto = AutoFloat8(
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)),
        "bf16",
        config=TuneConfig(include_output_layer=True, **options),
        clock=scripted_clock(all_faster),
    )
    for _ in range(4):
        auto(torch.randn(32, 64)).square().mean().backward()
        auto.zero_grad()
    return auto


def test_a_report_writes_its_page(tmp_path, scripted_clock):
    auto = tuned(scripted_clock)
    auto.report().to_html(tmp_path / "report.html")
    text = Reader((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "converted 2 of 2 Linears to bf16" in text
    assert re.search(r"against float32 on .*, recorded 20\d\d-\d\d-\d\d", text)
    assert "K = 64 M \\ N 64 32" in text


def test_the_page_is_written_at_the_freeze(tmp_path, scripted_clock):
    path = tmp_path / "report.html"
    tuned(scripted_clock, html=path)
    assert "converted 2 of 2 Linears" in path.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_does_not_end_training(
    tmp_path, scripted_clock, caplog
):
    auto = tuned(scripted_clock, html=tmp_path / "no folder" / "report.html")
    assert auto.frozen
    (warning,) = [x for x in caplog.messages if "the page" in x]
    assert warning.endswith(
        "report.html was not written: [Errno 2] No such file or "
        f"directory: '{tmp_path / 'no folder' / 'report.html'}'"
    )


def test_there_is_no_page_before_the_freeze(tmp_path):
    auto = AutoFloat8(nn.Linear(64, 64), "bf16")
    with pytest.raises(PhaseError, match="no plan to show in a page yet"):
        auto.report().to_html(tmp_path / "report.html")


# In a browser


def unfold(evaluate):
    evaluate("document.querySelector('[name=unfold]').click()")


def fill(evaluate, field, value):
    evaluate(
        f"(x => {{ x.value = {value!r}; "
        "x.dispatchEvent(new Event('input', {bubbles: true})) })"
        f"(document.querySelector('form [name={field}]'))"
    )


def click_heading(evaluate, key):
    evaluate(f"document.querySelector('th[data-key={key}] button').click()")


def test_headings_sort(page, show):
    evaluate = show(page("show", "llama.json"))
    cells = f"{ROWS}.map(x => x.cells[6].textContent)"
    click_heading(evaluate, "speedup")
    up = evaluate(cells)
    values = [float(x.split()[0]) for x in up[:-1]]
    assert values == sorted(values)
    assert up[-1] == "-"
    click_heading(evaluate, "speedup")
    down = evaluate(cells)
    assert [float(x.split()[0]) for x in down[:-1]] == values[::-1]
    assert down[-1] == "-"  # what was not timed stays behind
    sort = "document.querySelector('th[data-key=speedup]').ariaSort"
    assert evaluate(sort) == "descending"
    click_heading(evaluate, "name")
    assert evaluate(f"{NAMES}[0]") == "layers.{0..31}.attention.wk"
    assert evaluate(sort) is None


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("name", "feed_forward", (3, 96)),
        ("name", "layers.17.attention.WQ", (1, 32)),
        ("verdict", "converted", (2, 64)),
        ("recipe", "rowwise", (2, 64)),
        ("reason", "filtered by name", (1, 1)),
        ("M", "17", (1, 32)),
        ("K", "14336", (1, 32)),
        ("N", "4096-14336", (5, 160)),
        ("N", ">=14336", (3, 65)),
        ("N", "1024,128256", (3, 65)),
        ("name", "nothing like it", (0, 0)),
    ],
)
def test_filters(page, show, field, value, found):
    rows, layers = found
    evaluate = show(page("show", "llama.json"))
    fill(evaluate, field, value)
    assert evaluate(f"{ROWS}.length") == rows
    status = evaluate("document.querySelector('[role=status]').textContent")
    assert status == f"{layers} of 225 layers in {rows} rows"


def test_unfolding_gives_each_layer_a_row(page, show):
    evaluate = show(page("show", "llama.json"))
    unfold(evaluate)
    fill(evaluate, "name", "layers.3.")
    names = evaluate(NAMES)
    assert names == [
        f"layers.3.{x}"
        for x in (
            *(f"attention.{y}" for y in ("wq", "wk", "wv", "wo")),
            *(f"feed_forward.{y}" for y in ("w1", "w2", "w3")),
        )
    ]
    assert evaluate(f"{ROWS}[0].textContent").endswith("no clear difference")
    unfold(evaluate)
    fill(evaluate, "name", "")
    assert evaluate(f"{ROWS}.length") == 8


def test_a_trial_is_seen(page, show):
    """Three pictures, whose texts are texts, and the table of plans."""
    evaluate = show(page("show", "tried.json"))
    pictures = json.loads(
        evaluate(
            "JSON.stringify([...document.querySelectorAll('#trial figure')].map(x => ["
            "x.querySelector('svg').getAttribute('aria-label'),"
            "x.querySelector('svg').getBoundingClientRect().height > 100,"
            "x.querySelector('svg').textContent.replace(/\\s+/g, ' '),"
            "x.querySelector('figcaption').textContent]))"
        )
    )
    plans, roles, steps = pictures
    assert [x[:2] for x in pictures] == [
        ["Trial plans by their step time", True],
        ["What converting each role saves, alone and in training steps", True],
        ["Training steps of the trial by plan, until the plan froze", True],
    ]
    assert "nothing converted 100.00 ms, 16 rounds" in plans[2]
    assert "layers.{}.attention.wo (2)" in roles[2]
    assert "alone in training steps" in roles[2]
    assert "frozen" in steps[2]
    assert "the plan froze" in steps[3]
    assert evaluate("document.querySelectorAll('#trial tbody tr').length") == 7
    outcome = evaluate(
        "[...document.querySelectorAll('#layer-table tbody tr')].map("
        "x => x.textContent).filter(x => x.includes('attention.wk'))[0]"
    )
    assert "faster in training" in outcome


def test_the_diff_filters_by_change(page, show):
    evaluate = show(page("diff", "llama.json", "llama.json", "--run-a", "1"))
    fill(evaluate, "change", "slower in B")
    assert evaluate(f"{ROWS}.length") == 4
    fill(evaluate, "change", "")
    fill(evaluate, "M", "8192")
    assert evaluate(f"{ROWS}.length") == 7


def background(evaluate):
    return evaluate("getComputedStyle(document.body).backgroundColor")


def media(browser, **features):
    pairs = [
        {"name": k.replace("_", "-"), "value": v}
        for k, v in features.items()
        if k != "media"
    ]
    browser.call(
        "Emulation.setEmulatedMedia", media=features.get("media", ""), features=pairs
    )


@pytest.fixture
def plain_media(browser):
    yield
    media(browser)


@pytest.mark.usefixtures("plain_media")
def test_dark_and_light(page, show, browser, tmp_path):
    pictures = {}
    html = page("show", "llama.json")
    for scheme, colour in (
        ("dark", "rgb(20, 23, 28)"),
        ("light", "rgb(255, 255, 255)"),
    ):
        media(browser, prefers_color_scheme=scheme)
        evaluate = show(html)
        assert background(evaluate) == colour
        browser.screenshot(tmp_path / f"{scheme}.png")
        pictures[scheme] = (tmp_path / f"{scheme}.png").read_bytes()
    assert pictures["dark"] != pictures["light"]
    evaluate(
        "(x => { x.value = 'dark'; x.dispatchEvent(new Event('change')) })"
        "(document.getElementById('theme'))"
    )
    assert background(evaluate) == "rgb(20, 23, 28)"


@pytest.mark.usefixtures("plain_media")
def test_on_paper(show, browser):
    decisions = [decided(f"part{i}.w", 16, 64, 64 + 16 * i) for i in range(300)]
    evaluate = show(run_page(subject_of(decisions)))
    media(browser, media="print", prefers_color_scheme="dark")
    assert background(evaluate) == "rgb(255, 255, 255)"
    assert evaluate("document.querySelector('form').checkVisibility()") is False
    evaluate("dispatchEvent(new Event('beforeprint'))")
    assert evaluate(f"{ROWS}.length") == 300


def test_the_keyboard_reaches_everything(page, show, browser):
    evaluate = show(page("show", "llama.json"))
    reached = set()
    for _ in range(60):
        for kind in ("keyDown", "keyUp"):
            browser.call(
                "Input.dispatchKeyEvent", type=kind, key="Tab", windowsVirtualKeyCode=9
            )
        reached.add(evaluate("document.activeElement.outerHTML.slice(0, 40)"))
    text = " ".join(reached)
    for part in ('class="skip"', 'id="theme"', 'name="name"', "<summary>", "<button"):
        assert part in text


def test_no_request_leaves_the_page(page, show, browser):
    evaluate = show(page("show", "llama.json"))
    assert evaluate("performance.getEntriesByType('resource').length") == 0
    # What somebody brought in would be refused by the page itself.
    refused = browser.call(
        "Runtime.evaluate",
        expression="new Promise(done => { addEventListener("
        "'securitypolicyviolation', x => done(x.effectiveDirective)); "
        "document.body.append(Object.assign(new Image(), "
        "{src: 'https://example.invalid/a.png'})) })",
        awaitPromise=True,
        returnByValue=True,
    )
    assert refused["result"]["value"] == "img-src"


def axe_source():
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None:
        pytest.skip("axe is not installed: pip install --no-deps axe-playwright-python")
    return Path(spec.origin).with_name("axe.min.js").read_text(encoding="utf-8")


@pytest.mark.usefixtures("plain_media")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "llama.json"),
        ("show", "tried.json"),
        ("diff", "llama.json", "llama.json", "--run-a", "1"),
    ],
    ids=["show", "trial", "diff"],
)
def test_axe_finds_nothing_serious(page, show, browser, arguments, scheme):
    source = axe_source()
    media(browser, prefers_color_scheme=scheme)
    evaluate = show(page(*arguments))
    evaluate(source)
    found = browser.call(
        "Runtime.evaluate",
        expression="axe.run().then(x => JSON.stringify([x.passes.length, x.violations"
        ".map(y => [y.impact, y.id, y.nodes[0].html.slice(0, 200)])]))",
        awaitPromise=True,
        returnByValue=True,
    )["result"]["value"]
    passes, _, violations = found.partition(",")
    assert int(passes[1:]) > 10
    assert violations == "[]]"
