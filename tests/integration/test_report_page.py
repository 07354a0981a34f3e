"""The report in a browser: read on any screen, by mouse and by keyboard, with nothing fetched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import CHROMIUM, CHROMIUM_OPTIONS, nameless, worst_contrast
from tests.runs import make_run
from trainer.events import EventLog
from trainer.report import write_report
from trainer.report_comparison import read_runs, write_comparison
from trainer.run import events_path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with a log of two attempts."""
    run_dir = make_run(tmp_path_factory.mktemp("page"), steps=(30,))
    log = EventLog(events_path(run_dir))
    for event, first in (("started", 0), ("resumed", 20)):
        log.write(event, step=first, world_size=2, sustained_flops=2e11, device="cpu")
        for step in range(first + 10, 41, 10):
            log.write(
                "step", step=step, epoch=0, mean_nll=5 - step / 100, learning_rate=1e-4,
                target_tokens=step * 1000, source_tokens=step * 900, tokens_per_second=4000.0,
                phases={"forward": 0.2, "backward": 0.3}, flops=step * 8e10, elapsed_s=step / 2,
                skew=1.05,
            )  # fmt: skip
    log.close()
    return run_dir


@pytest.fixture(scope="module")
def report(run_dir: Path) -> Path:
    """Its page."""
    return write_report(run_dir)


@pytest.fixture(scope="module")
def comparison(run_dir: Path) -> Path:
    """The page of it and of another."""
    other = shutil.copytree(run_dir, run_dir.parent / "a-run-with-quite-a-long-name-for-a-phone")
    return write_comparison(read_runs([run_dir, other]), run_dir.parent / "both.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for all pages."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


def opened(browser: Any, file: Path, **options: Any) -> Iterator[Any]:
    """A page; what it complains of, or asks for, fails the test."""
    complaints: list[str] = []
    context = browser.new_context(**options)
    page = context.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: complaints.append(request.url))
    page.goto(file.as_uri())
    yield page
    context.close()
    assert complaints == [file.as_uri()]


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The report of one run."""
    yield from opened(browser, report)


@pytest.fixture
def both(browser: Any, comparison: Path) -> Iterator[Any]:
    """The report of two runs."""
    yield from opened(browser, comparison)


def rows(page: Any) -> list[list[str]]:
    """Labels of the rows, and for each the titles of its cells."""
    return page.eval_on_selector_all(
        "#explorer-weights tbody tr",
        "rows => rows.map(row => [...row.children].map(cell => cell.title || cell.textContent))",
    )  # type: ignore[no-any-return]


def test_every_head_can_be_looked_at(page: Any) -> None:
    buttons = page.locator("#explorer-heads button")
    assert buttons.all_inner_texts() == ["mean", "head 1", "head 2", "head 3", "head 4"]
    assert page.locator("#explorer-layer option").all_inner_texts() == ["1", "2"]

    seen = []
    for number in (1, 2):
        page.locator("#explorer-layer").select_option(index=number - 1)
        for name in ("mean", "head 1", "head 4"):
            page.get_by_role("button", name=name, exact=True).click()
            pressed = page.locator("#explorer-heads button[aria-pressed=true]").all_inner_texts()
            assert pressed == [name]
            assert f"layer {number}, " in page.locator("#explorer-note").inner_text()
            seen.append(str(rows(page)))
    assert len(set(seen)) == 6

    # A row's weights sum to one, but for rounding to a per cent.
    for label, *cells in rows(page):
        assert cells[0].startswith(f"{label} attends to ")
        total = sum(int(cell.split()[-2]) for cell in cells)
        assert total == pytest.approx(100, abs=len(cells) / 2)

    page.locator("#explorer-kind").select_option(index=1)
    assert page.locator("#explorer-layer option").all_inner_texts() == ["1"]
    columns = page.locator("#explorer-weights thead th").all_inner_texts()
    assert [row[0] for row in rows(page)] == columns

    before = columns
    page.locator("#explorer-sentence").select_option(index=1)
    assert page.locator("#explorer-weights thead th").all_inner_texts() != before


def test_by_keyboard(page: Any) -> None:
    page.locator("#explorer-layer").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    pressed = page.locator("#explorer-heads button[aria-pressed=true]").all_inner_texts()
    assert pressed == ["head 1"]


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser: Any, request: pytest.FixtureRequest, name: str, scheme: str) -> None:
    file = request.getfixturevalue(name)
    screen = {"width": 320, "height": 640}
    for page in opened(browser, file, viewport=screen, color_scheme=scheme):
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        assert nameless(page) == []
        # Its cells are mixed of two colours, which the measure cannot read.
        page.evaluate("document.getElementById('explorer')?.remove()")
        contrast, element = worst_contrast(page)
        assert contrast >= 4.5, element
        # What does not fit is scrolled in its own place, by keyboard as well.
        wider = page.locator(".scroll").evaluate_all(
            "all => all.filter((e) => e.scrollWidth > e.clientWidth + 1)"
            ".map((e) => [e.tabIndex, e.role, e.ariaLabel.length > 3])"
        )
        assert wider
        assert all(found == [0, "region", True] for found in wider)


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_charts_fit_a_phone_and_tables_show_that_there_is_more(
    browser: Any, request: pytest.FixtureRequest, name: str
) -> None:
    file = request.getfixturevalue(name)
    for page in opened(browser, file, viewport={"width": 360, "height": 740}):
        charts = page.locator("figure:visible").evaluate_all(
            "all => all.map((e) => [[...e.querySelectorAll('svg')].filter((s) =>"
            " s.checkVisibility()).length, e.scrollWidth <= e.clientWidth + 1,"
            " [...e.querySelectorAll('.scroll')].every((s) => s.scrollWidth <= s.clientWidth + 1)])"
        )
        assert charts
        assert all(chart == [1, True, True] for chart in charts)
        wider = page.locator(".scroll").evaluate_all(
            "all => all.filter((e) => e.scrollWidth > e.clientWidth + 1)"
            ".map((e) => getComputedStyle(e).backgroundAttachment)"
        )
        assert wider
        assert all("local" in shadow and "scroll" in shadow for shadow in wider)


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_on_paper(browser: Any, request: pytest.FixtureRequest, name: str) -> None:
    file = request.getfixturevalue(name)
    for page in opened(browser, file, color_scheme="dark", viewport={"width": 720, "height": 1000}):
        page.emulate_media(media="print")
        style = "getComputedStyle(document.body)"
        assert page.evaluate(f"{style}.backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate(f"{style}.color") == "rgb(0, 0, 0)"
        # No chart runs out of the paper, none may be cut over two sheets.
        charts = page.locator("figure").evaluate_all(
            "all => all.map((e) => [e.querySelector('svg').getBoundingClientRect().right <= 720,"
            " getComputedStyle(e).breakInside])"
        )
        assert charts
        assert all(chart == [True, "avoid"] for chart in charts)
        assert page.locator("nav").is_hidden()


def test_runs_over_another_axis_by_keyboard(both: Any) -> None:
    def shown() -> list[str]:
        titles: list[str] = both.locator(".axis svg:visible").evaluate_all(
            "all => all.map((e) => e.ariaLabel)"
        )
        return titles

    by_step = shown()
    assert by_step
    assert all("over step" in title for title in by_step)
    both.locator("#by-step").focus()
    both.keyboard.press("ArrowRight")
    assert all("over hours of training" in title for title in shown())
    both.keyboard.press("ArrowRight")
    assert all("over source and target tokens" in title for title in shown())
    assert len(shown()) == len(by_step)
