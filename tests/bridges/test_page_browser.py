"""The report in a real browser: it asks for nothing, says nothing to the console, and its desk answers.

Needs Playwright and axe (both in the test extra) and a Chromium that the system installed (`apt install
chromium`); Playwright's own download is not used.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridges.report import write_report
from tests.bridges.report_record import record
from tests.bridges.test_report import hostile_record

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is in the test extra")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(record(), tmp_path_factory.mktemp("run")).as_uri()


class Watched:
    """A page whose requests, console lines and dialogs are kept."""

    def __init__(self, browser: "playwright.Browser", address: str, **context: object):
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.goto(address)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def test_it_opens_from_a_file_and_asks_for_nothing(browser, address: str) -> None:
    with Watched(browser, address) as watched:
        assert watched.page.title() == "Circuits and edits of dense-python-4l"
        assert [url for url in watched.requests if not url.startswith("data:")] == [address]
        assert watched.said == []


def test_the_desk_answers_a_choice_and_a_click(browser, address: str) -> None:
    with Watched(browser, address) as watched:
        page = watched.page
        answer = page.locator("#desk-answer")
        assert "0.attn.act_in:12 goes to its mean over text" in answer.inner_text()
        page.select_option("#desk-setting", index=0)
        flipped = answer.locator("td.bad").all_inner_texts()
        assert flipped == [
            '-1.50, says ")": flipped',
            '-1.00, says ")": flipped',
            '-2.00, says "]": flipped',
        ]
        page.select_option("#desk-task", label="brackets")
        page.locator('[data-task="quotes"] circle', has_text="0.mlp.act_in:7").click(force=True)
        assert "quotes: 0.mlp.act_in:7" in answer.inner_text()
        assert page.locator("circle.picked").count() == 1
        assert watched.said == []


def test_nothing_is_missing_without_scripts(browser, address: str) -> None:
    with Watched(browser, address, java_script_enabled=False) as watched:
        page = watched.page
        assert not page.locator("#desk-live").is_visible()
        assert "Verdict: partly supported." in page.locator("#verdict").inner_text()
        page.locator("summary", has_text="Every node and setting of quotes").click()
        row = page.locator("tr", has_text="0.attn.act_in:12").filter(has_text="strength 1").first
        assert "100.0 %" in row.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser, address: str, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is in the test extra")
    with Watched(browser, address, color_scheme=scheme) as watched:
        watched.page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        found = axe.Axe().run(watched.page)
        faults = [(fault["id"], fault["nodes"][0]["html"][:200]) for fault in found.response["violations"]]
        assert faults == []
        assert len(found.response["passes"]) > 15


def test_a_narrow_window_scrolls_tables_not_the_page(browser, address: str) -> None:
    with Watched(browser, address, viewport={"width": 320, "height": 640}) as watched:
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= 320


def test_dark_mode_and_print_have_their_own_colours(browser, address: str) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with Watched(browser, address, color_scheme="dark") as watched:
        assert watched.page.evaluate(ground) == "rgb(22, 22, 26)"
        watched.page.emulate_media(media="print", color_scheme="dark")
        assert watched.page.evaluate(ground) == "rgb(255, 255, 255)"
        assert not watched.page.locator("#desk-live").is_visible()
        assert len(watched.page.pdf()) > 10_000


def test_a_keyboard_reaches_the_desk(browser, address: str) -> None:
    with Watched(browser, address) as watched:
        page = watched.page
        page.locator("#desk-task").focus()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "desk-node"
        page.keyboard.press("ArrowDown")
        assert "0.mlp.act_in:7 goes to" in page.locator("#desk-answer").inner_text()


def test_hostile_text_stays_text(browser, tmp_path: Path) -> None:
    value = hostile_record()
    value["circuits"]["x" * 1_000_000] = {"undefined": "a name of 1 MB"}
    with Watched(browser, write_report(value, tmp_path).as_uri()) as watched:
        page = watched.page
        assert watched.said == []
        assert len(watched.requests) == 1
        assert page.locator("img, iframe, object").count() == 0
        text = page.locator("#desk-answer").inner_text()
        assert "<img src=x onerror=alert(1)>[U+202E][U+001B]" in text
