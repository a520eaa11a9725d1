"""The service as people use it: a browser on a server of its own, and clients on loopback."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
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

httpx = pytest.importorskip("httpx", reason="httpx is in the test extra")
pytest.importorskip("fastapi", reason="FastAPI is in the test extra")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium")


class Server:
    """`sparsebridge serve` in a folder with the recipes."""

    def __init__(self, home: Path, *words: str):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bridges.cli", "serve", "--port", "0", *words],
            cwd=home, env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        line = self.process.stdout.readline()
        self.address = re.search(r"http://\S+?(?=/)", line)[0]
        self.client = httpx.Client(base_url=self.address, timeout=120)

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=180)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "runs").mkdir()
    return tmp_path


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    server = Server(home, "--no_worker")
    yield server
    server.close()


def test_a_job_is_submitted_once_followed_and_cancelled(server: Server) -> None:
    ask = {"recipe": "train", "config": "python", "run": "mine", "settings": {"max_steps": 5}}
    made = server.client.post("/api/v1/jobs", json=ask, headers={"Idempotency-Key": "one"})
    assert made.status_code == 201
    job = made.json()
    assert job["command"] == (
        "accelerate launch recipes/train.py --config recipes/python/train.yaml --run runs/mine --max_steps 5"
    )
    again = server.client.post("/api/v1/jobs", json=ask, headers={"Idempotency-Key": "one"})
    assert again.json()["id"] == job["id"]
    changed = ask | {"settings": {}}
    other = server.client.post("/api/v1/jobs", json=changed, headers={"Idempotency-Key": "one"})
    assert other.status_code == 400
    assert len(server.client.get("/api/v1/jobs").json()["jobs"]) == 1
    assert server.client.post(f"/api/v1/jobs/{job['id']}/cancel", json={}).json()["state"] == "cancelled"
    with server.client.stream("GET", f"/api/v1/jobs/{job['id']}/events") as events:
        lines = list(events.iter_lines())
    assert [line for line in lines if line.startswith("event")] == ["event: job", "event: end"]


def test_events_go_on_where_a_reader_stopped(server: Server, home: Path) -> None:
    """Each step and each line of the log once, though the reader comes back."""
    job = Job.new("mine", "train")
    folder = JobFolder(home / "runs", "mine", job.id)
    folder.write_job(job)
    folder.write_status(Status(state="done"))
    rows = [{"step": step, "ce": 1.0} for step in range(1, 1201)]
    (home / "runs" / "mine" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.log.write_text("".join(f"line {i}\n" for i in range(20_000)))
    reindex(home / "runs")

    def read(last: str | None, most: int) -> tuple[list[tuple[str, object]], str | None]:
        """Some events, then the reader drops the connection."""
        found, headers = [], {} if last is None else {"Last-Event-ID": last}
        with server.client.stream("GET", f"/api/v1/jobs/{job.id}/events", headers=headers) as events:
            kind = ""
            for line in events.iter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    last = value
                elif name == "event":
                    kind = value
                elif name == "data":
                    found.append((kind, json.loads(value)))
                    if len(found) == most or kind == "end":
                        return found, last
        return found, last

    seen, last = [], None
    while not seen or seen[-1][0] != "end":
        some, last = read(last, most=2)
        seen += some
    steps = [row["step"] for kind, value in seen if kind == "metrics" for row in value]
    assert steps == list(range(1, 1201))
    assert "".join(value for kind, value in seen if kind == "log") == folder.log.read_text()


def test_hostile_text_is_shown_as_text(server: Server, home: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)>'\"&\u2028\u202e"
    folder = home / "runs" / "one"
    (folder / "circuits").mkdir(parents=True)
    evidence = {"nodes": 1, "edges": 1, "loss": 0.1, "verdict": {"word": hostile}}
    circuit = {"task": hostile, "nodes": [], "edges": [], "evidence": evidence}
    (folder / "circuits" / "x'\"<b>.json").write_text(json.dumps(circuit))
    job = Job.new("one", "train", [hostile])
    JobFolder(home / "runs", "one", job.id).write_job(job)
    JobFolder(home / "runs", "one", job.id).write_status(Status(state="failed", reason=hostile))
    reindex(home / "runs")
    for path in ("/", "/runs/one", f"/jobs/{job.id}"):
        answer = server.client.get(path)
        assert answer.status_code == 200, path
        assert "<img" not in answer.text, path
        assert "<b>" not in answer.text, path
        assert "&lt;/script&gt;" in answer.text, path
        assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": "rm"}, "recipe: one of"),
        ({"config": "../../etc"}, "config: one of"),
        ({"run": "../elsewhere"}, "a name of letters"),
        ({"run": "/abs"}, "a name of letters"),
        ({"settings": {"dense.path": "somewhere"}}, "over HTTP train takes"),
        ({"settings": {"max_steps": -1}}, "settings.max_steps"),
        ({"settings": {"max_steps": "5; rm"}}, "settings.max_steps"),
        ({"settings": {"sparsity.density": 1e999}}, ""),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_wrong_request_is_one_line_and_no_job(server: Server, change: dict, words: str) -> None:
    ask = {"recipe": "train", "config": "python", "run": "mine"} | change
    answer = server.client.post(
        "/api/v1/jobs", content=json.dumps(ask), headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 422)
    assert words in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert server.client.get("/api/v1/jobs").json()["jobs"] == []


def test_a_server_that_is_stopped_takes_its_worker_with_it(home: Path) -> None:
    server = Server(home)

    def workers() -> list[int]:
        lines = [(one.pid, one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"])]
        return [pid for pid, words in lines if "worker" in words and str(home / "runs") in words]

    deadline = time.monotonic() + 30
    while not workers():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    server.close()
    assert server.process.returncode == 0
    assert workers() == []


def test_what_is_absent_and_what_lies_elsewhere_answer_alike(server: Server, home: Path) -> None:
    (home / "runs2").mkdir()
    (home / "runs2" / "report.json").write_text("secret")
    (home / "runs" / "one").mkdir()
    (home / "runs" / "one" / "report.json").symlink_to(home / "runs2" / "report.json")
    paths = [
        "/api/v1/runs/absent", "/api/v1/runs/one/report.json", "/api/v1/runs/..%2fruns2/report.json",
        "/api/v1/runs/%2e%2e/report.json", "/api/v1/jobs/jnone", "/runs/absent/report.html", "/nowhere",
        "/static/../app.py", "/static/app.py", "/api/v1/runs/one/circuits/..%2f..%2fx",
    ]  # fmt: skip
    answers = {path: server.client.get(path) for path in paths}
    assert {answer.status_code for answer in answers.values()} == {404}, answers
    assert len({answer.text for answer in answers.values()}) == 1


def test_the_committed_openapi_file_is_what_the_code_says(server: Server) -> None:
    found = server.client.get("/api/v1/openapi.json").json()
    committed = json.loads((ROOT / "bridges" / "service" / "openapi.json").read_text())
    for value in (found, committed):  # FastAPI's own parts change with its releases
        value.pop("openapi")
        for name in ("HTTPValidationError", "ValidationError"):
            value["components"]["schemas"].pop(name, None)
    assert found == committed


@needs_browser
def test_the_pages_are_submitted_from_read_aloud_and_say_nothing_to_the_console(server: Server) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is in the test extra")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is in the test extra")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        # axe puts its own script into the page, which the page's policy forbids as it should.
        page = browser.new_context(bypass_csp=True).new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.address)
        assert axe.Axe().run(page).violations_count == 0
        page.fill("input[name=run]", "../elsewhere")
        page.eval_on_selector("#submit", "form => { form.noValidate = true; }")
        page.click("text=Submit")
        page.wait_for_selector("#error:not(:empty)")
        assert "a name of letters" in page.inner_text("#error")
        said.clear()  # the browser's own line about the answer 400
        page.fill("input[name=run]", "mine")
        page.click("text=Submit")
        page.wait_for_url("**/jobs/*")
        assert page.inner_text("#state") == "queued"
        assert axe.Axe().run(page).violations_count == 0
        page.click("#cancel")
        page.wait_for_selector("#cancel", state="hidden")
        assert page.inner_text("#state") == "cancelled"
        page.click("h1 a")
        assert "No circuits yet" in page.inner_text("main")
        assert axe.Axe().run(page).violations_count == 0
        assert said == []
        browser.close()


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


class Browser:
    """A page that nothing may be said on; SPARSEBRIDGE_PICTURES is a folder for pictures of it."""

    def __init__(self, address: str):
        playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is in the test extra")
        self.driver = playwright.sync_playwright().start()
        browser = self.driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        self.page = browser.new_page(viewport={"width": 1100, "height": 900})
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(address)

    def picture(self, name: str) -> None:
        if "SPARSEBRIDGE_PICTURES" in os.environ:
            self.page.screenshot(path=Path(os.environ["SPARSEBRIDGE_PICTURES"]) / name, full_page=True)

    def close(self) -> None:
        self.driver.stop()
        assert self.said == []


@needs_browser
@pytest.mark.slow
def test_the_quickstart_is_submitted_in_a_browser_and_watched_to_its_end(quickstart: Server) -> None:
    browser = Browser(quickstart.address)
    page = browser.page
    page.click("text=Submit")
    page.wait_for_url("**/jobs/*")
    page.wait_for_selector("#curves svg", timeout=600_000)
    page.wait_for_timeout(60_000)
    browser.picture("service-job.png")
    page.wait_for_selector("#cancel", state="hidden", timeout=3_600_000)
    assert page.inner_text("#state") == "done", page.inner_text("#log")[-2000:]
    browser.close()


@needs_browser
@pytest.mark.slow
def test_an_edit_s_strength_is_moved_until_the_dense_answer_flips(quickstart: Server) -> None:
    """After the quickstart above."""
    browser = Browser(f"{quickstart.address}/runs/quickstart")
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
    browser.close()


@pytest.mark.slow
def test_twenty_clients_for_a_minute(quickstart: Server) -> None:
    """No error, flat memory; after the quickstart above."""
    session = quickstart.client.post("/api/v1/runs/quickstart/sessions", json={}).json()
    task = next(own for own in session["tasks"] if own["edit"])
    ask = {
        "task": task["task"], "nodes": task["edit"]["nodes"], "kind": "patch",
        "prompt": task["example"]["clean"], "counterfactual": task["example"]["corrupted"],
    }  # fmt: skip
    url = f"/api/v1/sessions/{session['id']}/intervene"
    assert quickstart.client.post(url, json=ask).status_code == 200
    process, codes, times = psutil.Process(quickstart.process.pid), [], []
    end = time.monotonic() + 60

    def client() -> None:
        with httpx.Client(base_url=quickstart.address, timeout=60) as own:
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
