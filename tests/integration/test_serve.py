"""``babelray serve`` as people meet it: over HTTP, and in a browser with pointer and keyboard.

One server for all, with a token and a rate. Requests that must not share an allowance name
different clients, as a proxy on this machine would.
"""

from __future__ import annotations

import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.browser import CHROMIUM, CHROMIUM_OPTIONS, nameless, worst_contrast
from tests.runs import make_run

pytestmark = pytest.mark.timeout(300)

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 200
TOKEN = "open-sesame"
RATE = 60


def command(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """``babelray serve`` in a session of its own, so that all it leaves behind can be found."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from cluster.cli import main; main()",
            "serve",
            *map(str, arguments),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HOME": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    said: str

    def ask(
        self, body: Any = None, *, token: str | None = TOKEN, client: str = "10.0.0.1", **keys: Any
    ) -> requests.Response:
        headers = {"X-Forwarded-For": client}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        raw = body if isinstance(body, bytes) else None
        return requests.post(
            f"{self.url}translate",
            data=raw,
            json=None if raw else (body if body is not None else keys),
            headers={**headers, "Content-Type": "application/json"},
            timeout=60,
        )


def processes(server: Server) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == server.process.pid and process.status() != "zombie":
                found.append(process)
        except (OSError, psutil.Error):
            continue
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    make_run(folder, steps=(250,))
    (folder / "token").write_text(f"{TOKEN}\n")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = command(
        folder, "demo", "--port", port, "--token-file", "token", "--rate", RATE,
        "--set", "evaluation.beam=3",
    )  # fmt: skip
    assert process.stdout is not None
    alarm = threading.Timer(PATIENCE_S, process.kill)
    alarm.start()
    said = process.stdout.readline()
    alarm.cancel()
    assert "serving demo" in said, said + process.stdout.read()
    server = Server(process, f"http://127.0.0.1:{port}/", said)
    yield server
    if process.poll() is None:
        process.terminate()
        process.wait(timeout=PATIENCE_S)
    process.stdout.close()


def test_it_says_one_line(server: Server) -> None:
    assert server.said == f"serving demo, checkpoint best, at {server.url} (Ctrl-C ends)\n"


def test_a_sentence(server: Server) -> None:
    reply = server.ask(text="red dog sees", num_best=3, attention=True)
    assert reply.status_code == 200
    answer = reply.json()
    [line] = answer["lines"]
    scores = [found["score"] for found in line["alternatives"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert answer["translation"] == line["alternatives"][0]["text"] != ""
    assert "".join(line["source_pieces"]).replace("▁", " ").strip() == "red dog sees"
    maps = answer["attention"]
    assert len(maps["cross"]) == 2
    assert len(maps["cross"][0]) == 4
    assert [len(row) for row in maps["cross"][0][0]] == [len(maps["source"])] * len(maps["outputs"])
    assert 0 < answer["seconds"] < 60
    assert "default-src 'none'" in reply.headers["content-security-policy"]


def test_those_who_ask_at_once_each_get_their_own_answer(server: Server) -> None:
    words = ["one", "two", "red", "blue", "dog", "cat", "old", "tree"]
    texts = [" ".join(words[n % 8 :] + words[: n % 3]) for n in range(24)]
    alone = [server.ask(text=text, client="10.0.1.1").json()["translation"] for text in texts]
    with ThreadPoolExecutor(24) as pool:
        together = list(
            pool.map(lambda text: server.ask(text=text, client="10.0.1.2").json(), texts)
        )
    assert [answer["translation"] for answer in together] == alone
    assert len(set(alone)) > 4


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        ({"text": "red " * 25_000}, 413, "at most 2,000 characters"),
        ({"text": "red " * 501}, 413, "too long (2,004)"),
        (b'{"text": "\xff\xfe"}', 400, "UTF-8"),
        (b"not json", 400, "not JSON"),
        ({"text": ["red"]}, 422, "text: Input should be a valid string"),
        ({"sentence": "red"}, 422, "text: Field required"),
    ],
)
def test_wrong_input(server: Server, body: Any, status: int, part: str) -> None:
    reply = server.ask(body)
    assert reply.status_code == status
    assert list(reply.json()) == ["error"]
    assert part in reply.json()["error"]


@pytest.mark.parametrize(
    ("text", "lines"),
    [("", 1), (" \n \n", 2), ("\x00\x07\x1b", 1), ("你好，世界", 1), ("red\r\ndog\u2028cat", 3)],
)
def test_strange_text_is_answered(server: Server, text: str, lines: int) -> None:
    reply = server.ask(text=text)
    assert reply.status_code == 200
    answer = reply.json()
    assert len(answer["lines"]) == lines
    assert ("never saw" in " ".join(answer["notes"])) == ("你" in text)
    if not text.strip(" \n\x00\x07\x1b"):
        assert answer["translation"].strip() == ""


@pytest.mark.parametrize("token", [None, "wrong", TOKEN.upper()])
def test_a_wrong_token(server: Server, token: str | None) -> None:
    reply = server.ask(text="red", token=token)
    assert reply.status_code == 401
    assert "Authorization: Bearer" in reply.json()["error"]


def test_too_many_requests_of_one_client(server: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(lambda _: server.ask(text="", client="10.9.9.9"), range(RATE + 20)))
    refused = [reply for reply in asked if reply.status_code == 429]
    assert refused
    assert {reply.status_code for reply in asked} == {200, 429}
    assert 1 <= int(refused[0].headers["Retry-After"]) <= 60
    assert server.ask(text="", client="10.9.9.8").status_code == 200


def test_only_this_machine_can_reach_it(server: Server) -> None:
    """Ray's and Serve's own ports as well: whoever reaches those runs code here."""
    listening = [
        ipaddress.ip_address(connection.laddr.ip)
        for process in processes(server)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 3
    reachable = [
        address
        for address in listening
        if not (getattr(address, "ipv4_mapped", None) or address).is_loopback
    ]
    assert reachable == []


def test_a_port_in_use(server: Server, folder: Path) -> None:
    port = server.url.rstrip("/").rpartition(":")[2]
    process = command(folder, "demo", "--port", port)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(f"babelray: error: .*--port {port}: .*in use.*--port\n", said)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["dmeo"], "did you mean demo"), (["demo", "--checkpoint", "7"], "there is no checkpoint")],
)
def test_what_is_not_there(folder: Path, arguments: list[str], part: str) -> None:
    process = command(folder, *arguments)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert part in said
    assert "Traceback" not in said


# The page.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH: install it to test the page")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page with the token given, and nothing asked of any other host."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    context.set_default_timeout(30_000)
    page = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(server.url)
    page.get_by_label("Access token").fill(TOKEN)
    page.get_by_role("button", name="Use token").click()
    page.get_by_text("English to German, checkpoint best").wait_for()
    yield page
    assert wrong == []
    assert [url for url in asked if not url.startswith((server.url, "data:"))] == []
    context.close()


def translate(page: Any, text: str) -> None:
    page.get_by_label("Text to translate").fill(text)
    page.get_by_role("button", name="Translate", exact=True).click()
    page.get_by_role("status").get_by_text("Translated in").wait_for()


def test_type_translate_and_look_at_a_head(page: Any, server: Server) -> None:
    expected = server.ask(text="red dog sees two", num_best=3, attention=True).json()
    translate(page, "red dog sees two")
    assert page.locator("#translation").inner_text() == expected["translation"]
    rows = page.locator("#alternatives tbody tr")
    assert rows.count() == 3
    assert page.locator("#alternatives tbody td:nth-child(2)").all_inner_texts() == [
        found["text"] for found in expected["lines"][0]["alternatives"]
    ]
    # A head's tooltip, and the head enlarged.
    thumb = page.get_by_role("radio", name="Layer 1, head 3")
    thumb.hover()
    assert "Layer 1, head 3: strongest from" in page.locator("#tooltip").inner_text()
    thumb.click()
    assert page.locator("#head-title").inner_text() == "Layer 1, head 3"
    # A cell's weight is the endpoint's, and marks its two pieces.
    maps = expected["attention"]
    page.locator("#grid [data-place='1 2']").hover()
    weight = f"{100 * maps['cross'][0][2][1][2]:.1f} %"
    assert page.locator("#tooltip").inner_text().endswith(f": {weight}")
    assert page.locator("#readout").inner_text().endswith(f": {weight}")
    marked = [text.replace("·", "▁") for text in page.locator(".piece.hot").all_inner_texts()]
    assert marked == [maps["source"][2], maps["outputs"][1]]
    # The same in words.
    assert page.locator("#links tbody tr").count() == len(maps["outputs"])
    page.get_by_label("source to source").check()
    assert page.locator("#grid tbody tr").count() == len(maps["source"])


def test_by_keyboard_alone(page: Any) -> None:
    def focused() -> str:
        found: str = page.evaluate(
            "document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"
        )
        return found

    def press(*keys: str) -> str:
        for key in keys:
            page.keyboard.press(key)
        return focused()

    page.get_by_label("Text to translate").focus()
    page.keyboard.type("red dog sees")
    press("Control+Enter")
    page.get_by_role("status").get_by_text("Translated in").wait_for()
    for _ in range(12):  # whatever else can be reached comes before the map
        if "looks at" in press("Tab"):
            break
    first = focused()
    assert "looks at" in first
    assert page.locator("#readout").inner_text() == first
    assert press("ArrowRight") != first
    assert press("ArrowLeft") == first
    assert "looks at" in press("ArrowDown", "End")
    assert "looks at" not in press("ArrowUp", "ArrowUp")  # the piece at the top edge
    assert "is looked at by" in page.locator("#readout").inner_text()
    assert press("Control+Home") == first
    assert press("Tab") == "Layer 2, head 1"
    assert press("ArrowRight") == "Layer 2, head 2"
    assert press("ArrowUp") == "Layer 1, head 2"
    assert page.locator("#head-title").inner_text() == "Layer 1, head 2"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_everything_has_a_name_and_a_role(page: Any) -> None:
    translate(page, "red dog\nold cat")
    assert nameless(page) == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    for attribute in ("aria-labelledby", "aria-describedby"):
        for value in page.evaluate(
            f"[...document.querySelectorAll('[{attribute}]')]"
            f".map((e) => e.getAttribute('{attribute}'))"
        ):
            assert set(value.split()) <= set(ids)
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("#translation").get_attribute("lang") == "de"
    levels = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3')]"
        ".filter((e) => e.checkVisibility()).map((e) => Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(later - before <= 1 for before, later in pairwise(levels))
    # One cell and one head can be reached by Tab; the others from there.
    assert page.locator("#grid [tabindex='0']").count() == 1
    assert page.locator("#heads [tabindex='0']").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    translate(page, "red dog sees two old cat")
    ratio, where = worst_contrast(page)
    assert ratio >= 4.5, where  # WCAG 2.2, AA


def test_a_narrow_window_scrolls_one_way_only(page: Any) -> None:
    page.set_viewport_size({"width": 320, "height": 700})
    translate(page, "red dog sees two old cat eats one blue house")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_several_lines_can_be_chosen_between(page: Any) -> None:
    translate(page, "red dog\n\nold cat sees")
    assert page.locator("#translation").inner_text().count("\n") == 2
    page.get_by_label("Line", exact=True).select_option(index=1)
    page.locator("#source-ribbon").get_by_text("·cat").wait_for()
    options = page.get_by_label("Line", exact=True).locator("option").all_inner_texts()
    assert options == ["1: red dog", "3: old cat sees"]
    # Without an answer there is no map, rather than another line's.
    page.route("**/translate", lambda route: route.abort())
    page.get_by_label("Line", exact=True).select_option(index=0)
    page.get_by_role("alert").get_by_text("The server does not answer.").wait_for()
    assert not page.locator("#attention").is_visible()


def test_no_line_is_chosen_while_another_text_is_translated(page: Any) -> None:
    translate(page, "red dog\nold cat")
    page.route("**/translate", lambda route: None)  # never answered
    page.get_by_role("button", name="Translate", exact=True).click()
    page.get_by_role("status").get_by_text("Translating").wait_for()
    assert page.get_by_label("Line", exact=True).is_disabled()
    page.unroute("**/translate")
    translate(page, "two\none")
    assert page.get_by_label("Line", exact=True).is_enabled()


def test_an_answer_that_is_cut_off(page: Any) -> None:
    alert = page.get_by_role("alert")
    page.route("**/translate", lambda route: route.fulfill(status=200, body='{"translation": "Hu'))
    page.get_by_label("Text to translate").fill("red dog")
    page.get_by_role("button", name="Translate", exact=True).click()
    alert.get_by_text("The answer was cut off.").wait_for()
    assert not page.locator("#result").is_visible()
    page.unroute("**/translate")
    translate(page, "red dog")
    assert not alert.is_visible()


def test_a_token_that_no_header_can_hold(browser: Any, server: Server) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.get_by_role("alert").get_by_text("Give the access token first.").wait_for()
    for wrong in ("schlüssel–", "wrong"):
        page.get_by_label("Access token").fill(wrong)
        page.get_by_role("button", name="Use token").click()
        page.get_by_role("alert").get_by_text("The token is wrong.").wait_for()
        assert page.evaluate("sessionStorage.length") == 0
    page.get_by_label("Access token").fill(TOKEN)
    page.get_by_role("button", name="Use token").click()
    page.get_by_text("English to German, checkpoint best").wait_for()
    context.close()


def test_errors_are_told_in_words(page: Any, server: Server) -> None:
    alert = page.get_by_role("alert")
    page.get_by_role("button", name="Translate", exact=True).click()
    assert alert.inner_text() == "Type a sentence first."
    page.get_by_label("Text to translate").fill("red " * 600)
    page.get_by_role("button", name="Translate", exact=True).click()
    alert.get_by_text("at most 2,000 characters").wait_for()
    assert not page.locator("#result").is_visible()
    translate(page, "你好")
    assert "never saw" in page.locator("#notes").inner_text()
    assert not alert.is_visible()
    page.evaluate("sessionStorage.setItem('babelray-token', 'wrong')")
    page.get_by_role("button", name="Translate", exact=True).click()
    alert.get_by_text("The token is wrong.").wait_for()
    assert page.get_by_label("Access token").is_visible()
    page.route("**/translate", lambda route: route.abort())
    page.get_by_role("button", name="Translate", exact=True).click()
    alert.get_by_text("The server does not answer.").wait_for()


# Last, for it ends the server.


def test_it_ends_cleanly_and_those_inside_are_served(server: Server) -> None:
    started = processes(server)
    assert len(started) > 3
    text = "\n".join(["a"] * 1000)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(server.ask, text=text, client="10.0.2.1") for _ in range(6)]
        # Each is a batch of its own: with the first answer, the others have long been inside.
        wait(asked, timeout=60, return_when=FIRST_COMPLETED)
        at_work = [reply for reply in asked if not reply.done()]
        os.killpg(server.process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
        assert server.process.wait(timeout=60) == 0
    assert at_work
    assert [reply.result().status_code for reply in asked] == [200] * 6
    assert asked[0].result().json()["translation"].count("\n") == 999
    psutil.wait_procs(started, timeout=15)
    assert processes(server) == []
    assert server.process.stdout is not None
    assert server.process.stdout.read() == ""
