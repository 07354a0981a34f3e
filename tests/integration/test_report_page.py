"""The report in a browser: every head can be reached, by mouse and by keyboard."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.runs import make_run
from trainer.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small run."""
    return write_report(make_run(tmp_path_factory.mktemp("page"), steps=(30,)))


@pytest.fixture
def page(report: Path) -> Any:
    """The report, open; what the page complains of, or asks for, fails the test."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    complaints: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: complaints.append(request.url))
        page.goto(report.as_uri())
        yield page
        browser.close()
    assert complaints == [report.as_uri()]


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
