"""The service's pages in a browser, and a whole quickstart; clients of the desk on loopback."""

import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bridges.service.jobs import Job, JobFolder, Status
from bridges.service.queue import reindex
from tests.conftest import ROOT
from tests.live_run import make_live_run
from tests.recipes.service_server import Browser, Server, httpx, make_home, needs_browser


@needs_browser
def test_the_pages_are_submitted_from_read_aloud_and_say_nothing_to_the_console(server: Server) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is in the test extra")
    # axe puts its own script into the page, which the page's policy forbids as it should.
    with Browser(server.address, bypass_csp=True) as browser:
        page = browser.page
        assert axe.Axe().run(page).violations_count == 0
        page.fill("input[name=run]", "../elsewhere")
        page.eval_on_selector("#submit", "form => { form.noValidate = true; }")
        page.click("text=Submit")
        page.wait_for_selector("#error:not(:empty)")
        assert "a name of letters" in page.inner_text("#error")
        browser.said.clear()  # the browser's own line about the answer 400
        page.fill("input[name=run]", "clicked")
        with page.expect_request("**/api/v1/jobs") as asked:
            page.click("text=Submit")
        assert len(asked.value.headers["idempotency-key"]) == 32
        page.wait_for_url("**/jobs/*")
        assert page.inner_text("#state") == "queued"
        assert "no worker is running" in page.inner_text("#waits")
        assert axe.Axe().run(page).violations_count == 0
        page.click("#cancel")
        page.wait_for_selector("#cancel", state="hidden")
        assert page.inner_text("#state") == "cancelled"
        page.click("h1 a")
        assert "No circuits yet" in page.inner_text("main")
        assert axe.Axe().run(page).violations_count == 0


@needs_browser
def test_a_long_run_s_curves_are_drawn_once_and_a_lost_server_is_said(tmp_path: Path) -> None:
    server = Server(make_home(tmp_path), "--no_worker")
    job = Job.new("long", "train")
    folder = JobFolder(server.runs, "long", job.id)
    folder.write_job(job)
    folder.write_status(Status(state="queued"))
    lines = (json.dumps({"step": step, "ce": 1 + 1 / step}) + "\n" for step in range(1, 150_001))
    (server.runs / "long" / "metrics.jsonl").write_text("".join(lines))
    reindex(server.runs)
    with Browser(f"{server.address}/jobs/{job.id}") as browser:
        page = browser.page
        page.wait_for_selector("text=at step 150000", timeout=60_000)
        assert page.inner_text("figcaption").startswith("ce 1.00 at step 150000 (1.00 to 2.00)")
        assert len(page.get_attribute("#curves path", "d")) < 10_000
        server.process.send_signal(signal.SIGKILL)
        page.wait_for_selector("text=The server does not answer", timeout=30_000)
        browser.said.clear()  # the browser's own lines about the connection
        server.close()


@pytest.fixture(scope="module")
def desk_page(server: Server, tiny_checkpoint, shipped_tokenizer) -> str:
    make_live_run(server.runs / "tiny", tiny_checkpoint, shipped_tokenizer)
    return f"{server.address}/runs/tiny"


@needs_browser
def test_the_desk_shows_answers_marks_old_ones_and_loads_models_again(server: Server, desk_page: str) -> None:
    with Browser(desk_page) as browser:
        page = browser.page
        page.click("#open-desk")
        page.wait_for_selector("#desk:not([hidden])", timeout=120_000)
        assert page.input_value("#desk select[name=task]") == "with_as"
        assert page.inner_text("#strength-value") == "2"  # the edit's best
        page.select_option("#desk select[name=kind]", "zero")
        page.check("#desk input[name=off_target]")
        page.click("text=Ask both models")
        page.wait_for_selector("#off-target", timeout=60_000)
        shown = page.inner_text("#off-target")
        assert shown.startswith("Effect on other text, as the edit itself: KL ")
        assert "95 % interval" in shown
        assert "% of the tokens" in shown
        assert page.inner_text("#error") == ""
        assert page.inner_text("#desk-stale") == ""

        page.select_option("#desk select[name=positions]", "last")
        assert "changed since this answer" in page.inner_text("#desk-stale")
        page.click("text=Ask both models")
        page.wait_for_selector("#off-target:has-text('not measured')", timeout=60_000)
        assert page.inner_text("#desk-stale") == ""

        unload(server)
        page.fill("#keep input[name=name]", "again")
        page.click("text=Save the setting as a file")
        page.wait_for_selector("#kept:has-text('kept: interventions/again')", timeout=60_000)
        assert page.input_value("#desk select[name=positions]") == "last"  # the controls stayed
        browser.said.clear()  # the browser's own line about the answer 404

        page.click("text=Export it as an adapter")
        page.wait_for_selector("#error:not(:empty)", timeout=120_000)
        assert "is refused" in page.inner_text("#error")
        page.select_option("#desk select[name=positions]", "all")
        page.check("#keep input[name=force]")
        page.click("text=Export it as an adapter")
        page.wait_for_selector("#kept:has-text('kept: adapters/again')", timeout=120_000)
        assert (server.runs / "tiny" / "adapters" / "again").is_dir()
        browser.said.clear()


@needs_browser
def test_of_answers_that_come_late_the_last_question_s_is_shown(desk_page: str) -> None:
    with Browser(desk_page) as browser:
        page = browser.page
        page.click("#open-desk")
        page.wait_for_selector("#desk:not([hidden])", timeout=120_000)
        held: list = []

        def hold(route) -> None:  # the first question waits for the second's answer
            if route.request.post_data_json["strength"] == 1:
                held.append(route)
            else:
                route.continue_()

        page.route("**/intervene", hold)
        page.locator("#desk input[name=strength]").fill("1")
        page.locator("#desk input[name=strength]").fill("3")
        page.wait_for_selector('#desk-answer[data-strength="3"]', timeout=60_000)
        with page.expect_response("**/intervene"):
            held[0].continue_()
        page.wait_for_timeout(200)
        assert page.get_attribute("#desk-answer", "data-strength") == "3"
        assert page.inner_text("#desk-stale") == ""


def unload(server: Server) -> None:
    """As when nobody has asked for a while."""
    session = server.client.post("/api/v1/runs/tiny/sessions", json={}).json()["id"]
    server.client.request("DELETE", f"/api/v1/sessions/{session}", content=b"{}",
                          headers={"content-type": "application/json"})  # fmt: skip


# --- a whole quickstart, in a browser ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """In a folder of its own, or in that of an earlier run of these tests (SPARSEBRIDGE_HOME)."""
    home = Path(os.environ.get("SPARSEBRIDGE_HOME") or tmp_path_factory.mktemp("home"))
    if not (home / "recipes").exists():
        (home / "recipes").symlink_to(ROOT / "recipes")
    server = Server(home)
    yield server
    server.close()


@pytest.fixture(scope="module")
def finished(quickstart: Server) -> Server:
    """With its quickstart done: the browser's, where that test ran before, else one submitted here."""
    if not (quickstart.runs / "quickstart" / "report.html").is_file():
        ask = {"recipe": "quickstart", "run": "quickstart"}
        job = quickstart.client.post("/api/v1/jobs", json=ask).json()
        deadline = time.monotonic() + 3_600
        while (state := quickstart.client.get(f"/api/v1/jobs/{job['id']}").json()["state"]) != "done":
            assert state in ("queued", "running"), state
            assert time.monotonic() < deadline
            time.sleep(5)
    return quickstart


@needs_browser
@pytest.mark.slow
def test_the_quickstart_is_submitted_in_a_browser_and_watched_to_its_end(quickstart: Server) -> None:
    with Browser(quickstart.address) as browser:
        page = browser.page
        page.click("text=Submit")
        page.wait_for_url("**/jobs/*")
        page.wait_for_selector("#curves svg", timeout=600_000)
        page.wait_for_timeout(60_000)
        browser.picture("service-job.png")
        page.wait_for_selector("#cancel", state="hidden", timeout=3_600_000)
        assert page.inner_text("#state") == "done", page.inner_text("#log")[-2000:]


@needs_browser
@pytest.mark.slow
def test_an_edit_s_strength_is_moved_until_the_dense_answer_flips(finished: Server) -> None:
    with Browser(f"{finished.address}/runs/quickstart") as browser:
        page = browser.page
        page.click("#open-desk")
        page.wait_for_selector("#desk:not([hidden])", timeout=120_000)
        page.select_option("#desk select[name=task]", "bracket_paren")
        changed = []
        for strength in ("0", "1", "2", "3"):
            page.locator("#desk input[name=strength]").fill(strength)
            page.wait_for_selector(f'#desk-answer[data-strength="{strength}"]', timeout=60_000)
            changed.append("changed" in page.inner_text('p[data-model="dense"]'))
            if changed[-1] and changed.count(True) == 1:
                browser.picture("service-desk.png")
        assert not changed[0]
        assert any(changed)
        page.fill("#keep input[name=name]", f"flip-{time.time_ns()}")
        page.click("text=Save the setting as a file")
        page.wait_for_selector("#kept:not(:empty)")
        assert "kept: interventions/flip-" in page.inner_text("#kept")


@pytest.mark.slow
def test_twenty_clients_for_a_minute(finished: Server) -> None:
    """No error, flat memory."""
    session = finished.client.post("/api/v1/runs/quickstart/sessions", json={}).json()
    task = next(own for own in session["tasks"] if own["edit"])
    ask = {
        "task": task["task"], "nodes": task["edit"]["nodes"], "kind": "patch",
        "prompt": task["example"]["clean"], "counterfactual": task["example"]["corrupted"],
    }  # fmt: skip
    url = f"/api/v1/sessions/{session['id']}/intervene"
    assert finished.client.post(url, json=ask).status_code == 200
    process, codes, times = psutil.Process(finished.process.pid), [], []
    end = time.monotonic() + 60

    def client() -> None:
        with httpx.Client(base_url=finished.address, timeout=60) as own:
            while time.monotonic() < end:
                begun = time.monotonic()
                codes.append(own.post(url, json=ask).status_code)
                times.append(time.monotonic() - begun)

    clients = [threading.Thread(target=client) for _ in range(20)]
    for one in clients:
        one.start()
    time.sleep(15)
    before = process.memory_info().rss
    for one in clients:
        one.join()
    grown = (process.memory_info().rss - before) / 2**20
    assert set(codes) == {200}
    assert grown < 32, f"{grown:.0f} MiB"
    sys.stdout.write(f"{len(codes)} answers, +{grown:.1f} MiB, median {statistics.median(times):.3f} s\n")
