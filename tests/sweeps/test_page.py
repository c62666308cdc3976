"""``report.html`` in a browser: needs Chromium (Debian's ``chromium``) and Playwright, and is skipped without."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.sweep.jobs import Jobs
from recipes.sweep.report import write_report
from recipes.sweep.result import NOT_ENDED
from recipes.sweep.running import LOCK, running
from tests.sweeps.leavings import leave_grid, leave_job

playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """One without a network, in which an error of a script, or a request, fails the test."""
    wrong: list[str] = []
    context = browser.new_context(offline=True, viewport={"width": 1300, "height": 1000})
    opened = context.new_page()
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    yield opened
    context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return leave_grid(tmp_path_factory.mktemp("page") / "grid")


def show(page: Any, file: Path, *sweeps: Path) -> None:
    write_report(Jobs.read(sweeps), file)
    page.goto(file.as_uri())


def lines(page: Any, chart: str) -> Any:
    return page.locator(f"#{chart} path.js-line")


def first_column(page: Any) -> list[str]:
    return page.locator("tr.job td:first-child").all_inner_texts()


def test_a_sweep_is_drawn_without_a_network(page: Any, grid: Path, tmp_path: Path):
    show(page, tmp_path / "report.html", grid)

    assert page.locator("h1").inner_text().startswith("Sweep")
    assert "12 jobs: 11 done, 1 failed" in page.locator("header").inner_text()
    assert first_column(page)[:3] == ["6", "7", "8"]
    assert lines(page, "over-steps").count() == 12
    assert lines(page, "over-time").count() == 12
    assert lines(page, "coordinates").count() == 10  # with a value
    assert page.locator("#importance .bar").count() == 2
    assert "ArithmeticError: <on purpose> & quickly" in page.locator("#failures").inner_text()
    wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert page.evaluate(wide)


@pytest.mark.slow
def test_a_click_on_a_heading_sorts_by_numbers(page: Any, grid: Path, tmp_path: Path):
    show(page, tmp_path / "report.html", grid)
    page.locator("#jobs th", has_text="job").click()
    assert first_column(page) == [str(job) for job in range(12)]
    page.locator("#jobs th", has_text="job").click()
    assert first_column(page)[0] == "11"
    page.locator("#jobs th", has_text="lr").click()
    assert page.locator("tr.job td:nth-child(2)").all_inner_texts()[0] == "0.0001"


@pytest.mark.slow
def test_a_job_that_is_pointed_at_stands_out_in_all_charts(page: Any, grid: Path, tmp_path: Path):
    show(page, tmp_path / "report.html", grid)
    page.locator("tr.job").first.hover()

    for chart in ("over-steps", "coordinates"):
        widths = page.eval_on_selector_all(f"#{chart} path.js-line", "all => all.map(one => one.style.strokeWidth)")
        assert widths.count("3.5px") == 1
    page.locator("tr.job").first.click()
    page.mouse.move(0, 0)
    assert page.locator("tr.job.kept").count() == 1
    assert "3.5px" in page.eval_on_selector_all("#over-time path.js-line", "all => all.map(l => l.style.strokeWidth)")


@pytest.mark.slow
def test_the_dark_page_has_light_words(page: Any, grid: Path, tmp_path: Path):
    show(page, tmp_path / "report.html", grid)

    def words() -> list[str]:
        of_chart = page.eval_on_selector("#over-steps .xtick text", "one => one.style.fill")
        return [page.eval_on_selector("body", "one => getComputedStyle(one).color"), of_chart]

    light = words()
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.querySelector('#over-steps .xtick text').style.fill !== 'rgb(28, 32, 36)'")
    assert light == ["rgb(28, 32, 36)"] * 2
    assert words() == ["rgb(232, 234, 237)"] * 2


@pytest.mark.parametrize("what", ["one", "failed", "no-curves"])
def test_little_is_shown_too(what: str, page: Any, tmp_path: Path):
    for job in range(1 if what == "one" else 2):
        failed = {"error": "no memory"} if what == "failed" else {"loss": 1.0 + job}
        leave_job(tmp_path / "sweep", job, [f"seed={job}"], curve=[] if what == "no-curves" else [2, 1], **failed)
    show(page, tmp_path / "report.html", tmp_path / "sweep")

    assert page.locator("#no-curves").is_visible() == (what == "no-curves")
    assert lines(page, "over-steps").count() == {"one": 1, "failed": 2, "no-curves": 0}[what]
    told = {"one": "no key differs between the jobs", "failed": "no job has a value", "no-curves": "2 of the jobs"}
    assert told[what] in page.locator("body").inner_text()


def test_what_runs_and_what_was_interrupted_is_told(page: Any, tmp_path: Path):
    sweep = tmp_path / "sweep"
    leave_job(sweep, 0, ["seed=0"], loss=1.0, curve=[2, 1])
    for job in (1, 2, 3):
        leave_job(sweep, job, [f"seed={job}"], error=NOT_ENDED, curve=[3, 2])
    (sweep / "2" / LOCK).touch()  # left by a process that is gone
    with running(sweep / "1"):
        show(page, tmp_path / "report.html", sweep)

    told = page.locator("header").inner_text()
    assert "4 jobs: 1 done, 1 interrupted, 1 running, 1 not ended." in told
    assert "load the page anew" in told
    assert page.locator("tr.job .state").all_inner_texts() == ["done", "running", "interrupted", "not ended"]
    assert lines(page, "over-steps").count() == 4
    show(page, tmp_path / "report.html", sweep)
    assert "2 interrupted" in page.locator("header").inner_text()
    assert "load the page anew" not in page.locator("header").inner_text()


def test_sweeps_are_shown_side_by_side(page: Any, grid: Path, tmp_path: Path):
    long = f"callbacks.mine.a_rather_long_name={'long_value_' * 8}</script>"
    leave_job(tmp_path / "other", 0, ["optimizer.lr=0.01", long], loss=0.0, curve=[2, 1])
    show(page, tmp_path / "both.html", grid, tmp_path / "other")

    assert page.locator("#sweeps tbody tr").count() == 2
    assert first_column(page)[0] == "other/0"
    assert lines(page, "over-steps").count() == 13
    dashed = page.eval_on_selector_all("#over-steps path.js-line", "all => all.map(one => one.style.strokeDasharray)")
    assert sum(bool(dash) for dash in dashed) == 1
