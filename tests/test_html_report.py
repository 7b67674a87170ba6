"""The page of a plan: whole, escaped, without a request to anywhere; in a browser where one is installed."""

import dataclasses
import html
import html.parser
import json
import re
import shutil
import subprocess

import pytest

from fxcompress.core.budget import Budget
from fxcompress.core.plan import KEEP
from fxcompress.cost_model.pareto import pareto
from fxcompress.cost_model.select import choose
from fxcompress.html_report import html_of
from fxcompress.report import Report, SiteReport
from tests.test_pareto import table

NASTY = '<script>alert("&")</script>'
VOID = {"meta", "link", "br", "img"}


def plan_of(priced=True):
    made = choose(table(3, sites=4, priced=priced), Budget("2x", latency="2x" if priced else None))
    refusals = ((made.sites[0].name, "fold", f"it has no {NASTY}"),)
    named = {made.sites[1].name: NASTY}

    def put(of):
        return dataclasses.replace(of, site=named.get(of.site, of.site))

    sites = tuple(dataclasses.replace(s, name=named.get(s.name, s.name)) for s in made.sites)
    return dataclasses.replace(
        made, refusals=refusals, sites=sites,
        choices=tuple(map(put, made.choices)), candidates=tuple(map(put, made.candidates)),
    )  # fmt: skip


def report_of(plan):
    sites = tuple(SiteReport(c.site, c.spec, c.bytes, c.bytes, c.error, 1.1 * c.error) for c in plan.choices)
    timed = {"workload": plan.workload, "target": "eager", "original_seconds": ((50.0, 51.0),),
             "seconds": ((plan.latency, 20.0),)} if plan.workload else {}  # fmt: skip
    return Report(str(plan.budget), plan.original_bytes, plan.predicted_bytes, plan.predicted_bytes + 7, "relative",
                  plan.predicted_error, 0.5, 32, True, True, sites, **timed)  # fmt: skip


class Reader(html.parser.HTMLParser):
    """Every element closed in its order; what tables hold; every address."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tables, self.scripts, self.table, self.cell = [], [], {}, [], None, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data", "srcset")]
        if tag == "table":
            self.table = self.tables.setdefault(given["id"], [])
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")
            self.cell = True
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.cell:
            self.table[-1][-1] += data


@pytest.mark.parametrize("priced", [True, False])
@pytest.mark.parametrize("reported", [True, False])
def test_the_page_is_whole_and_shows_every_site(priced, reported):
    plan = plan_of(priced)
    text = html_of(plan, report_of(plan) if reported else None, pareto(plan, 5, 2))
    page = Reader(text)
    assert page.open == []
    heads, *rows = page.tables["sites"]
    assert [row[0] for row in rows] == [s.name for s in plan.sites]
    assert [row[2] for row in rows] == [c.spec for c in plan.choices]
    assert {len(row) for row in rows} == {len(heads)}
    assert ("a call, w (1 x 1)" in heads) == priced
    assert ("error measured" in heads) == reported == ("measured" in page.tables)
    if reported:
        told = [row[0] for row in page.tables["measured"][1:]]
        assert told == ["bytes on disk", "output error", *(["w (1 x 1) a call"] if priced else [])]
    assert text.count('class="dot"') >= len(page.tables["points"]) - 1 > 2
    assert len(re.findall(r'<svg.*?class="ring"', text, re.S)) == 1


def test_texts_of_the_plan_are_escaped_and_nothing_is_asked_of_a_network():
    plan = plan_of()
    page = Reader(text := html_of(plan, report_of(plan), pareto(plan, 4, 2)))
    assert NASTY not in text
    assert text.count("&lt;script&gt;alert(&quot;&amp;&quot;)&lt;/script&gt;") >= 2  # the site, and the refusal
    assert len(page.scripts) == 1
    assert page.addresses == ["data:,"]
    assert not re.search(r"url\(|@import|https?:|//\w", text)
    assert "default-src 'none'" in text


def test_a_plan_that_keeps_everything_has_a_page():
    plan = choose(table(3), Budget("1x"))
    assert {c.spec for c in plan.choices} == {KEEP}
    assert Reader(plan.to_html()).open == []


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no chromium is installed (apt-get install chromium)")
PROBE = """
<script>
const heads = [...document.querySelectorAll("#sites th")], column = heads.findIndex(h => h.textContent === "bytes");
const values = () => [...document.querySelectorAll("#sites tbody tr")].map(r => Number(r.cells[column].dataset.value));
heads[column].click(); const up = values(); heads[column].click(); const down = values();
document.title = JSON.stringify({up, down, dots: document.querySelectorAll("svg .dot").length,
  requests: performance.getEntriesByType("resource").map(r => r.name),
  wide: document.documentElement.scrollWidth <= window.innerWidth});
</script>
"""


def browse(text, tmp_path):
    """-> (the page's title after its scripts ran, what was logged)."""
    path = tmp_path / "plan.html"
    path.write_text(text, encoding="utf-8")
    run = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1200", "--enable-logging=stderr",
         "--v=0", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return html.unescape(re.search(r"<title>(.*?)</title>", run.stdout, re.S)[1]), run.stderr


@browser
def test_the_browser_would_complain_of_an_error_and_of_a_request(tmp_path):
    page = html_of(plan_of(), None, [])
    _, logged = browse(page.replace("</body>", "<script>undefined.x</script></body>"), tmp_path)
    assert "CONSOLE" in logged
    _, logged = browse(page.replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>'), tmp_path)
    assert "Content Security Policy" in logged


@browser
def test_a_browser_shows_it_sorts_it_and_complains_of_nothing(tmp_path):
    plan = plan_of()
    text = html_of(plan, report_of(plan), pareto(plan, 5, 2))
    title, logged = browse(text.replace("</body>", PROBE + "</body>"), tmp_path)
    assert "CONSOLE" not in logged
    told = json.loads(title)
    sizes = [c.bytes for c in plan.choices]
    assert told["up"] == sorted(sizes)
    assert told["down"] == sorted(sizes, reverse=True)
    assert told["dots"] == text.count('class="dot"')
    assert told["requests"] == []
    assert told["wide"]
