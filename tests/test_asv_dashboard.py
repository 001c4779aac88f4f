"""asv's dashboard over commits of this repository: a step that was put into stored runs is found on its regressions page."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("asv", reason="asv is not installed")

from asv.util import load_json

from perf.cases import CASES
from sparse_attention.breakeven.cli import main
from sparse_attention.breakeven.tracked import THREADS
from tests import breakeven_stored as stored
from tests.test_breakeven_report_page import browser  # noqa: F401

ROOT = Path(__file__).parents[1]
COMMITS, FIRST = 12, 7  # how many, and which of them is the first slow one
SLOW = "window256/16k"
CHOSEN = [case for case in CASES if case.id in (SLOW, "window1024/16k", "window256/4k")]
RATIO = "bench_break_even.BreakEven.track_time_ratio"
WAIT_S = 30


def git(*arguments):
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture(scope="module")
def commits():
    """This repository's newest, the oldest first."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    found = git("rev-list", "--first-parent", f"--max-count={COMMITS}", "HEAD")[::-1]
    if len(found) < COMMITS:
        shallow = git("rev-parse", "--is-shallow-repository") == ["true"]
        pytest.skip(f"{len(found)} commits, {COMMITS} are needed" + ": the clone is shallow" * shallow)
    return found


@pytest.fixture(scope="module")
def site(commits, tmp_path_factory):
    """The shipped configuration's dashboard. On the CPU one case takes 1.3 times as long from a commit on; on the GPU dense does."""
    folder = tmp_path_factory.mktemp("dashboard")
    for number, commit in enumerate(commits):
        slow = number >= FIRST
        cpu = stored.run(CHOSEN, {SLOW: 1 / 1.3 if slow else 1.0}, commit=commit, day=number + 1, seed=number, python="3.11.7")
        about = {"class": "cuda/h100", "commit": commit, "python": "3.12.4"}
        gpu = stored.run(CHOSEN, day=number + 1, seed=100 + number, baseline=1.3 if slow else 1.0, **about)
        gpu.settings.update(device="cuda", threads=16)
        for name, run in (("cpu", cpu), ("gpu", gpu)):
            (folder / "runs" / name).mkdir(parents=True, exist_ok=True)
            run.save(folder / "runs" / name / f"{number:02}.json")
    conf = load_json(str(ROOT / "asv.conf.json"), js_comments=True)
    # a checkout in CI may have no branch of any name
    conf |= {"repo": str(ROOT), "branches": ["HEAD"], "benchmark_dir": str(ROOT / "perf"), "results_dir": "results", "html_dir": "html"}
    path = folder / "asv.conf.json"
    path.write_text(json.dumps(conf))
    assert main(["ingest", str(folder / "runs"), "--config", str(path)]) == 0
    done = subprocess.run([sys.executable, "-m", "asv", "publish", "--config", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def regressions(site):
    return load_json(str(site / "regressions.json"))["regressions"]


def test_the_step_is_the_only_regression(regressions, commits, site):
    """Not in the unchanged cases, not on the other machine, and not because dense became slower."""
    assert {entry[0] for entry in regressions} == {f"{RATIO}('{SLOW}')", f"{RATIO.replace('time_ratio', 'sparse_time')}('{SLOW}')"}
    hashes = load_json(str(site / "index.json"))["revision_to_hash"]
    for name, path, params, _, last, best, jumps in regressions:
        assert params["machine"] == "cpu-zen4-2c" and last / best == pytest.approx(1.3, rel=0.04)
        assert [hashes[str(jump[1])] for jump in jumps] == [commits[FIRST]]


def test_both_machines_are_published(site):
    index = load_json(str(site / "index.json"))
    assert index["params"]["machine"] == ["cpu-zen4-2c", "cuda-h100"]
    assert set(index["params"][f"env-{THREADS}"]) == {"1", None}
    graphs = [path for path in site.glob(f"graphs/**/{RATIO}.json") if "summary" not in path.parts]
    assert [len(json.loads(path.read_text())) for path in graphs] == [COMMITS, COMMITS]


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


# asv's pages fetch these from CDNs; npm has the same for where those are out of reach: file there -> (package, file here)
LIBRARIES = {
    "jquery-3.3.1.min.js": ("jquery@3.3.1", "jquery/dist/jquery.min.js"),
    "jquery.flot.min.js": ("flot@0.8.3", "flot/jquery.flot.js"),
    "jquery.flot.time.min.js": ("flot@0.8.3", "flot/jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("flot@0.8.3", "flot/jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("flot@0.8.3", "flot/jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars@1.0.0", "flot-orderbars/js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin@1.1.3", "stupid-table-plugin/stupidtable.min.js"),
    "md5.min.js": ("blueimp-md5@2.19.0", "blueimp-md5/js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap@3.1.1", "bootstrap/dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap@3.1.1", "bootstrap/dist/css/bootstrap.min.css"),
}


def bring_libraries(site):
    """Put them beside the page and have it take them from there; False where npm cannot."""
    packages = sorted({package for package, _ in LIBRARIES.values()})
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", "--fetch-retries=0"]
    command = ["npm", "install", "--prefix", str(site), *options, *packages]
    try:
        if subprocess.run(command, capture_output=True, timeout=120).returncode:
            return False
    except (OSError, subprocess.TimeoutExpired):
        return False

    def local(found):
        return f'{found[1]}="node_modules/{LIBRARIES[found[2]][1]}"'

    page = site / "index.html"
    text = re.sub(r'(src|href)="https://[^"]*/([^"/]+)"( integrity="[^"]*")', local, page.read_text())
    assert not re.search(r'(src|link href)="https:', text), "a library that is not listed here"
    page.write_text(text)
    return True


@pytest.fixture(scope="module")
def opened(browser, address, site):  # noqa: F811
    """The browser, once asv's pages have what they need."""
    for attempt, bring in enumerate((lambda site: True, bring_libraries)):
        if bring(site):
            browser.get(f"{address}/?{attempt}")
            if browser.execute_script("return !!(window.$ && $.plot && $.fn.stupidtable && window.md5)"):
                return browser
    pytest.skip("neither the CDNs of asv's pages nor npm can be reached")


@pytest.fixture
def wait(opened):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(opened, WAIT_S)


ROWS = """return [...document.querySelectorAll('#regressions-body table:not(.ignored) tbody tr')]
  .map(row => [row.querySelector('a').href, ...[...row.querySelectorAll('td')].map(cell => cell.innerText.trim())])"""
PLOTTED = "return (($('#main-graph').data('plot') || {getData: () => []}).getData()).map(series => series.data)"
PAINTED = """const c = document.querySelector('#main-graph canvas.flot-base');
  return c ? c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(x => x) : false"""


def test_a_person_finds_the_step_and_its_graph(opened, address, wait, commits):
    opened.get_log("browser")
    opened.get(f"{address}/#regressions")
    rows = wait.until(lambda page: page.execute_script(ROWS))
    assert len(rows) == 2
    link, name, _, commit, factor, before, after, _ = next(row for row in rows if row[1] == f"{RATIO}('{SLOW}')")
    assert commit == commits[FIRST][:8] and float(factor.rstrip("x")) == pytest.approx(1.3, rel=0.04)
    assert "machine=cpu-zen4-2c" in link
    assert not any(case.id in row[1] for row in rows for case in CHOSEN if case.id != SLOW)

    opened.get(link)
    (points, *_) = wait.until(lambda page: page.execute_script(PLOTTED))
    assert len(points) == COMMITS and opened.execute_script(PAINTED)
    values = [value for _, value, *_ in points]
    assert min(values[FIRST:]) > 1.2 * max(values[:FIRST])
    errors = [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry for entry in errors if entry["source"] != "network"] == [], "asv asks for summaries of tracks without results too"


def test_the_shipped_history_has_ten_commits_of_this_project():
    stored = [json.loads(path.read_text()) for path in (ROOT / "perf/results/cpu-zen4-2c").glob("*-*.json")]
    assert len({run["commit_hash"] for run in stored if "results" in run}) >= 10
    ratios = "bench_break_even.BreakEven.track_time_ratio"
    assert sum(ratios in run["results"] for run in stored) >= 10
