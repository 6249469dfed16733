"""How long a browser needs for the page of a model of 10,000 Linears.

Run with ``pytest tests/benchmarks/test_page.py -W default`` on a machine
that is free.
"""

import warnings

import pytest

from fp8tune.report.html import run_page
from tests.report.test_page import subject_of, ten_thousand

MOST_MS = 2000


@pytest.mark.parametrize("distinct", [False, True], ids=["folded", "distinct"])
def test_ten_thousand_layers_open_within_two_seconds(distinct, browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(run_page(subject_of(ten_thousand(distinct))), encoding="utf-8")
    browser.call("Page.navigate", url=path.as_uri())
    while browser.evaluate("document.readyState") != "complete":
        pass
    opened_ms = browser.evaluate(
        "performance.getEntriesByType('navigation')[0].loadEventEnd"
    )
    said = f"{path.stat().st_size:,} bytes, complete after {opened_ms:.0f} ms"
    warnings.warn(said, stacklevel=1)  # which pytest lists at the end
    assert (
        browser.evaluate("document.querySelector('#layer-table').tBodies.length") == 1
    )
    assert 0 < opened_ms < MOST_MS, said
