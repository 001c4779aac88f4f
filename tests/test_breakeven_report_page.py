"""The HTML report: complete in itself, and readable in a real browser, on a phone and on a desk, by day and by night."""

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib", reason="the report draws with matplotlib")

from sparse_attention.breakeven.power import Power, PowerPoint
from sparse_attention.breakeven.report.content import build
from sparse_attention.breakeven.report.history import read
from sparse_attention.breakeven.report.html import page
from tests import breakeven_stored as stored

WIDTHS = {"phone": 390, "desk": 1280}
LONG_NAME = "tests/test_kernels.py::test_window_4096_with_grouped_queries_and_sinks_and_documents_of_many_lengths[bfloat16]"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One of everything that a page can hold."""
    folder = tmp_path_factory.mktemp("history")
    cases = stored.ladder()
    stored.history(cases, folder, {"window256/4k": (7, 0.9), "window256/16k": (9, 1.15)})
    points = [
        PowerPoint.of(name, slowdown, 300, round(300 * min(1.0, slowdown * 12 / (n + 1))))
        for n, name in enumerate(("window256/16k", "bigbird-base/4k", LONG_NAME))
        for slowdown in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)
    ]
    Power(tuple(points), None, {"name": "TwoStage"}).save(folder / "power.json")
    run = stored.run([*cases, stored.window(96, 8192)], {"window256/4k": 0.75}, commit="beef" * 4, day=20, seed=5)
    slow = stored.run([cases[4]], {cases[4].id: 0.7}, blocks=15).records[cases[4].id]
    run.records[cases[4].id] = replace(slow, case=replace(slow.case, floor=stored.speedup(slow.case)))
    run.records[LONG_NAME] = replace(run.records["window96/8k"], case=replace(run.records["window96/8k"].case, id=LONG_NAME))
    run.records["window64/16k"].scout = {"status": "unavailable", "reason": "needs <a compiler> & more: g++ was not found"}
    report = build(run, None, read(folder, "cpu/zen4/2c"))
    itself = stored.run([replace(c, floor=0.97) for c in cases], {c.id: 1 / stored.speedup(c) for c in cases}, sd=0.004)
    itself.settings["base"] = "0123456789abcdef"
    report.against = build(itself)
    return report


@pytest.fixture(scope="module")
def html(report):
    return page(report)


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_nothing_is_fetched(html):
    elements = Elements(html)
    assert not elements.of("script") and not elements.of("img") and not elements.of("iframe")
    links = [a.get(name) for _, a in elements.found for name in ("src", "href", "xlink:href") if a.get(name)]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert set(re.findall(r"https?://[^\"]+", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_ids_are_unique_and_references_resolve(html):
    ids = [attributes["id"] for _, attributes in Elements(html).found if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100
    wanted = set(re.findall(r"url\(#([^)]+)\)", html)) | set(re.findall(r'xlink:href="#([^"]+)"', html))
    labels = {word for _, a in Elements(html).found for word in a.get("aria-labelledby", "").split()}
    assert wanted | labels <= set(ids)


def test_every_picture_has_a_title_a_description_and_a_table(html):
    figures = re.findall(r"<figure>.*?</figure>", html, re.S)
    assert len(figures) >= 2 + 1 + 2 + 1
    for figure in figures:
        label = r'role="img" aria-labelledby="(\S+)-title \1-desc">\s*<title id="\1-title">[^<]+</title><desc id="\1-desc">[^<]+'
        assert re.search(label, figure)
        assert figure.count("<tr>") > 2 and "<text " in figure


def test_colours_are_the_pages_own(html):
    body = html.partition("</style>")[2]
    assert not re.search(r"(?:fill|stroke|color)\s*[:=]\s*[\"']?#", body)
    used, known = set(re.findall(r"var\((--\w+)\)", body)), set(re.findall(r"(--\w+):", html))
    assert used <= known


def test_text_of_cases_is_escaped(html):
    assert "needs &lt;a compiler&gt; &amp; more" in html and "<a compiler>" not in html


def test_a_page_without_anything_to_draw():
    run = stored.run(stored.ladder()[4:6], blocks=1)
    for record in run.records.values():
        record.scout["work"] = {}
    text = page(build(run))
    assert "<figure>" not in text and "in one block" in text


MEASURE = r"""
const box = e => e.getBoundingClientRect();
const texts = [...document.querySelectorAll('svg')].map(svg => [...svg.querySelectorAll('text')].map(e => [e.textContent.trim(), box(e)]));
const clashes = [];
for (const inside of texts)
  for (let a = 0; a < inside.length; a++)
    for (let b = a + 1; b < inside.length; b++) {
      const [m, p] = inside[a], [n, q] = inside[b];
      const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left), high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (wide > 1 && high > 3) clashes.push(m + ' on ' + n);
    }
const outside = texts.flat().filter(([, r]) => r.width && (r.left < -0.5 || r.right > innerWidth + 0.5)).map(([t]) => t);
const light = c => c.map(x => x / 255).map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, n) => sum + x * [0.2126, 0.7152, 0.0722][n], 0);
const rgb = text => text.match(/[\d.]+/g).slice(0, 3).map(Number);
const ground = light(rgb(getComputedStyle(document.body).backgroundColor));
const contrast = c => { const l = light(rgb(c)); return (Math.max(l, ground) + 0.05) / (Math.min(l, ground) + 0.05); };
const faint = [...document.querySelectorAll('svg text, p, td, th, h1, h2, h3, summary, .chip, b')]
  .map(e => [e.textContent.trim().slice(0, 40), contrast(e.closest('svg') ? getComputedStyle(e).fill : getComputedStyle(e).color)])
  .filter(([, c]) => c < 4.5);
const small = [...document.querySelectorAll('svg text')].filter(e => box(e).height && box(e).height < 9).map(e => e.textContent.trim());
return {wide: document.documentElement.scrollWidth - innerWidth, width: innerWidth, clashes, outside, faint, small, ground,
  fetched: performance.getEntriesByType('resource').map(e => e.name)};
"""


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "unfolded"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_in_a_browser(browser, html, tmp_path, device, scheme, folded):
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    size = {"width": WIDTHS[device], "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get(path.as_uri())
    if not folded:
        browser.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
    seen = browser.execute_script(MEASURE)
    assert seen["width"] == WIDTHS[device]
    assert seen["wide"] <= 0, "the page scrolls sideways"
    assert (seen["clashes"], seen["outside"], seen["small"]) == ([], [], [])
    assert seen["faint"] == [], "less contrast than 4.5"
    assert (seen["ground"] < 0.2) == (scheme == "dark")
    assert seen["fetched"] == []
    assert browser.get_log("browser") == []
