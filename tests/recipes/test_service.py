"""The service's HTTP API, asked as clients ask it: a server in a second process."""

import json
import re
import time
from pathlib import Path

import psutil
import pytest

from bridges.service.follow import NO_WORKER, views
from bridges.service.jobs import Job, JobFolder, Status
from bridges.service.queue import FILE, Queue, reindex
from bridges.service.serve import OneWorker
from extractor.artifacts import write_json
from tests.bridges.test_queue import fill
from tests.conftest import ROOT
from tests.recipes.service_server import Server, make_home


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
    elsewhere = server.client.post(
        "/api/v1/jobs", json=ask | {"run": "another"}, headers={"Idempotency-Key": "one"}
    )
    assert elsewhere.status_code == 400  # not silently a second job
    known = server.client.get("/api/v1/jobs").json()["jobs"]
    assert [own["id"] for own in known if own["run"] in ("mine", "another")] == [job["id"]]
    assert "no worker is running" in job["waits"]
    assert server.client.post(f"/api/v1/jobs/{job['id']}/cancel", json={}).json()["state"] == "cancelled"
    with server.client.stream("GET", f"/api/v1/jobs/{job['id']}/events") as events:
        lines = list(events.iter_lines())
    assert [line for line in lines if line.startswith("event")] == ["event: job", "event: end"]


def test_events_go_on_where_a_reader_stopped(server: Server) -> None:
    """Each step and each line of the log once, though the reader comes back and the file is written again."""
    job = Job.new("long", "train")
    folder = JobFolder(server.runs, "long", job.id)
    folder.write_job(job)
    folder.write_status(Status(state="done"))
    rows = [{"step": step, "ce": 1.0} for step in range(1, 5001)]
    (server.runs / "long" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = (server.runs / "long" / "metrics.jsonl").stat().st_size
    folder.log.write_text("".join(f"line {i}\n" for i in range(20_000)))
    reindex(server.runs)

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

    metrics = server.runs / "long" / "metrics.jsonl"
    seen, last = [], None
    while not seen or seen[-1][0] != "end":
        some, last = read(last, most=2)
        seen += some
        if metrics.stat().st_size == size:  # as training that is resumed does: the same steps, other bytes
            metrics.write_text("".join(json.dumps(row | {"s": 12.5}) + "\n" for row in rows))
    steps = [row["step"] for kind, value in seen if kind == "metrics" for row in value]
    assert steps == list(range(1, 5001))
    assert "".join(value for kind, value in seen if kind == "log") == folder.log.read_text()


def test_a_job_that_writes_no_losses_shows_none_and_a_long_log_begins_near_its_end(server: Server) -> None:
    job = Job.new("extracted", "extract")
    folder = JobFolder(server.runs, "extracted", job.id)
    folder.write_job(job)
    folder.write_status(Status(state="done"))
    (server.runs / "extracted" / "metrics.jsonl").write_text('{"step": 1, "ce": 0.5}\n')  # its training's
    folder.log.write_text("".join(f"line {i:07}\n" for i in range(300_000)))
    reindex(server.runs)
    url = f"/api/v1/jobs/{job.id}/events"
    events = server.client.get(url).text
    assert server.client.get(url, headers={"Last-Event-ID": "0.0.0"}).text == events  # lost at its beginning
    assert "event: metrics" not in events
    logs = [json.loads(line[6:]) for line in events.splitlines() if line.startswith('data: "')]
    size = folder.log.stat().st_size
    assert f"`sparsebridge logs {job.id}` prints all" in logs[0]
    left_out = int(re.search(r"\d+", logs[0])[0])
    assert 0 <= left_out - (size - (1 << 20)) < 13
    assert "".join(logs[1:]).encode() == folder.log.read_bytes()[left_out:]


def test_hostile_text_is_shown_as_text(server: Server) -> None:
    hostile = "</script><img src=x onerror=alert(1)>'\"&\u2028\u202e"
    folder = server.runs / "hostile"
    (folder / "circuits").mkdir(parents=True)
    evidence = {"nodes": 1, "edges": 1, "loss": 0.1, "verdict": {"word": hostile}}
    circuit = {"task": hostile, "nodes": [], "edges": [], "evidence": evidence}
    (folder / "circuits" / "x'\"<b>.json").write_text(json.dumps(circuit))
    job = Job.new("hostile", "train", [hostile])
    JobFolder(server.runs, "hostile", job.id).write_job(job)
    JobFolder(server.runs, "hostile", job.id).write_status(Status(state="failed", reason=hostile))
    reindex(server.runs)
    for path in ("/", "/runs/hostile", f"/jobs/{job.id}"):
        answer = server.client.get(path)
        assert answer.status_code == 200, path
        assert "<img" not in answer.text, path
        assert "<b>" not in answer.text, path
        assert "&lt;/script&gt;" in answer.text, path
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "\u202e" not in answer.text, path
        assert "[U+202E]" in answer.text, path


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
    ask = {"recipe": "train", "config": "python", "run": "wrong"} | change
    before = server.client.get("/readyz").json()
    answer = server.client.post(
        "/api/v1/jobs", content=json.dumps(ask), headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 422)
    assert words in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert server.client.get("/readyz").json() == before


def test_ten_thousand_jobs_come_page_by_page(server: Server) -> None:
    """And their runs, which a job makes."""
    wanted = fill(server.runs, 10_000)
    for i in range(10_000):
        (server.runs / f"run{i}").mkdir()
    seen, before, largest = [], None, 0
    while True:
        query = {"limit": 200, "state": "queued"} | ({"before": before} if before else {})
        answer = server.client.get("/api/v1/jobs", params=query)
        seen += [job["id"] for job in answer.json()["jobs"]]
        largest = max(largest, len(answer.content))
        if (before := answer.json()["before"]) is None:
            break
    assert len(seen) == len(set(seen))
    assert wanted <= set(seen)
    assert largest < 256 << 10
    assert server.client.get("/readyz").json()["jobs"] >= 10_000
    page = server.client.get("/").text
    older = re.search(r'href="/\?before=(\d+)"', page)
    assert f"50 of {server.client.get('/readyz').json()['jobs']}" in page
    assert server.client.get(f"/?before={older[1]}").text.count('<tr><th scope="row">') == 50
    assert len(page) < 64 << 10
    assert page.count("<li>") == 50


def test_ten_thousand_runs_come_page_by_page(server: Server) -> None:
    for i in range(120):
        (server.runs / f"zz-page{i}").mkdir()
    seen, after, pages = [], "zz-page", []
    while after is not None:
        answer = server.client.get("/api/v1/runs", params={"after": after, "limit": 60}).json()
        pages.append(len(answer["runs"]))
        seen += [run["run"] for run in answer["runs"]]
        after = answer["after"]
    assert seen == sorted(f"zz-page{i}" for i in range(120))
    assert pages == [60, 60]  # no empty one at the end
    first = server.client.get("/?before=7&after=zz-page").text
    assert first.count("<li>") == 50
    link = re.search(r'href="(/\?before=7&amp;after=(zz-page\d+)#runs)">More runs', first)
    assert link[2] == seen[49]
    last = server.client.get(f"/?after={seen[99]}").text
    assert last.count("<li>") == 20
    assert "More runs" not in last
    assert "No run yet" not in server.client.get("/?after=zzz").text


def test_a_full_last_page_leads_to_no_empty_one_and_no_number_is_too_large(server: Server) -> None:
    for _ in range(2):
        ask = {"recipe": "train", "config": "python", "run": "last-page"}
        job = server.client.post("/api/v1/jobs", json=ask).json()["id"]
        server.client.post(f"/api/v1/jobs/{job}/cancel", json={})

    def page(**query: int) -> dict:
        return server.client.get("/api/v1/jobs", params={"state": "cancelled", **query}).json()

    count = len(page(limit=200)["jobs"])
    assert (len(page(limit=count)["jobs"]), page(limit=count)["before"]) == (count, None)
    first = page(limit=count - 1)
    assert len(page(limit=count, before=first["before"])["jobs"]) == 1
    for path in (f"/?before={10**20}", f"/api/v1/jobs?before={10**20}"):
        assert server.client.get(path).status_code == 422
    assert server.client.get(f"/api/v1/jobs?before={2**63 - 1}").status_code == 200


def test_many_jobs_are_viewed_with_one_look_for_a_worker(tmp_path: Path, monkeypatch) -> None:
    looks = []

    class Looked(OneWorker):
        def __init__(self, runs: Path):
            looks.append(runs)
            super().__init__(runs)

    monkeypatch.setattr("bridges.service.follow.OneWorker", Looked)
    shown = views(Queue(tmp_path), [(Job.new(f"run{i}", "train"), Status()) for i in range(50)])
    assert {own.waits for own in shown} == {NO_WORKER}
    assert len(looks) == 1


def test_a_server_goes_on_with_an_index_that_was_removed(server: Server) -> None:
    """What it queues then, a new worker finds."""
    ask = {"recipe": "train", "config": "python", "run": "before-loss"}
    before = server.client.post("/api/v1/jobs", json=ask).json()["id"]
    (server.runs / FILE).unlink()
    after = server.client.post("/api/v1/jobs", json=ask | {"run": "after-loss"}).json()["id"]
    worker = Queue(server.runs)
    assert [worker.get(job)[1].state for job in (before, after)] == ["queued", "queued"]
    worker.close()
    assert server.client.get(f"/api/v1/jobs/{before}").status_code == 200


def test_a_job_that_an_engine_has_is_shown_and_left_to_it(server: Server) -> None:
    job = Job.new("far", "extract")
    folder = JobFolder(server.runs, "far", job.id)
    folder.write_job(job)
    write_json(folder.engine, {"schema_version": 1, "engine": "slurm", "engine_id": "4711"})
    found = server.client.get(f"/api/v1/jobs/{job.id}").json()
    assert (found["engine"], found["waits"], found["state"]) == ("slurm", "", "queued")
    index = server.client.get("/").text
    assert "Handed to other engines" in index
    assert f"/jobs/{job.id}" in index
    page = server.client.get(f"/jobs/{job.id}").text
    assert "slurm has this job" in page
    assert "writes no losses" in page
    for i in range(50):  # more than a page has
        other = Job.new(f"farther{i}", "extract")
        JobFolder(server.runs, other.run, other.id).write_job(other)
        write_json(JobFolder(server.runs, other.run, other.id).engine, {"engine": "slurm", "engine_id": "1"})
    assert re.search(r"50 of \d+, newest first, as their files say", server.client.get("/").text)
    listed = server.client.get("/api/v1/jobs?limit=200").json()
    assert job.id in [own["id"] for own in listed["handed_over"]]
    assert listed["of_handed_over"] == len(listed["handed_over"])
    assert server.client.get("/api/v1/jobs?state=done").json()["handed_over"] == []
    assert server.client.get("/api/v1/jobs?before=1").json()["handed_over"] == []
    answer = server.client.post(f"/api/v1/jobs/{job.id}/cancel", json={})
    assert answer.status_code == 400
    assert f"sparsebridge cancel {job.id}" in answer.json()["error"]


# --- circuits --------------------------------------------------------------------------------------------


def circuit_of(task: str, **changes: object) -> dict:
    evidence = {"nodes": 2, "edges": 1, "loss": 0.1, "verdict": {"word": "supported"}}
    nodes = ["0.mlp.act_in:1", "0.mlp.post_act:2"]
    return {"schema_version": 1, "task": task, "evidence": evidence, "nodes": nodes,
            "edges": [[*nodes, 0.5]]} | changes  # fmt: skip


def test_a_damaged_circuit_is_a_row_of_its_own_and_names_no_path(server: Server) -> None:
    folder = server.runs / "damaged" / "circuits"
    write_json(folder / "fine.json", circuit_of("fine"))
    (folder / "bare.json").write_text(json.dumps({"task": "bare", "evidence": {}}))
    damages = {"text": "{", "list": "[]", "empty": "", "none": "{}", "deep": "[" * 100_000,
               "word": json.dumps(circuit_of("word", evidence={"verdict": 1}))}  # fmt: skip
    for name, text in damages.items():
        (folder / f"{name}.json").write_text(text)
    answer = server.client.get("/api/v1/runs/damaged/claims")
    assert answer.status_code == 200
    claims = {claim["task"]: claim for claim in answer.json()}
    assert (claims["fine"]["nodes"], claims["fine"]["verdict"]["word"]) == (2, "supported")
    assert (claims["bare"]["nodes"], claims["bare"]["verdict"]) == (0, None)
    assert {name for name, claim in claims.items() if "damaged" in claim} == set(damages)
    page = server.client.get("/runs/damaged")
    assert page.status_code == 200
    assert page.text.count("extract it again") == len(damages)
    for text in (answer.text, page.text):
        assert str(server.home) not in text


def test_a_mistake_is_a_page_for_a_browser_and_names_no_path(server: Server) -> None:
    (server.runs / "broken").mkdir()
    (server.runs / "broken" / "evaluation.json").write_text("{")
    found = server.client.get("/api/v1/runs/broken")
    assert found.status_code == 422
    assert "evaluation 'broken/evaluation.json' is not valid JSON" in found.json()["error"]
    assert str(server.home) not in found.text
    for path, code in (("/runs/absent", 404), ("/jobs/jnone", 404), ("/?before=x", 422)):
        answer = server.client.get(path, headers={"accept": "text/html,*/*;q=0.8"})
        assert answer.status_code == code
        assert "<h1>This cannot be shown</h1>" in answer.text
        assert 'href="/"' in answer.text


def test_of_a_huge_circuit_the_strongest_edges_are_sent(server: Server) -> None:
    """14,000 nodes, 100,000 edges: lists read its head alone, and no answer is large."""
    nodes = [f"{i // 1000}.mlp.act_in:{i % 1000}" for i in range(14_000)]
    weights = [((i * 7919) % 100_000 - 50_000) / 1e4 for i in range(100_000)]
    edges = [[nodes[i % 14_000], nodes[(i * 7) % 14_000], weight] for i, weight in enumerate(weights)]
    sizes = {"nodes": len(nodes), "edges": len(edges), "loss": 0.1, "verdict": None}
    path = server.runs / "huge" / "circuits" / "huge.json"
    write_json(path, circuit_of("huge", evidence=sizes, nodes=nodes, edges=edges))
    assert path.stat().st_size > 4 << 20
    found = server.client.get("/api/v1/runs/huge/circuits/huge")
    assert len(found.content) < 4 << 20
    shown = found.json()
    assert shown["shown"] == {"nodes": 5_000, "of_nodes": 14_000, "edges": 20_000, "of_edges": 100_000}
    assert shown["nodes"] == nodes[:5000]
    found = sorted(abs(weight) for _, _, weight in shown["edges"])
    assert found == sorted(map(abs, weights))[-20_000:]
    with path.open("a") as file:  # what is not read cannot be missed
        file.write("no JSON")
    assert server.client.get("/api/v1/runs/huge/claims").json()[0]["edges"] == 100_000
    assert "<td>14000</td><td>100000</td>" in server.client.get("/runs/huge").text


def test_a_server_that_is_stopped_takes_its_worker_with_it(tmp_path: Path) -> None:
    server = Server(make_home(tmp_path))
    lock, deadline = OneWorker(server.runs), time.monotonic() + 60
    while not lock.is_held:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "no worker" not in server.client.get("/").text
    worker = psutil.Process(int(lock.holder()))
    server.close()
    assert server.process.returncode == 0
    assert not worker.is_running()
    assert not lock.is_held


def test_what_is_absent_and_what_lies_elsewhere_answer_alike(server: Server) -> None:
    (server.home / "runs2").mkdir()
    (server.home / "runs2" / "report.json").write_text("secret")
    (server.runs / "links").mkdir()
    (server.runs / "links" / "report.json").symlink_to(server.home / "runs2" / "report.json")
    (server.runs / "link").symlink_to(server.home / "runs2")
    paths = [
        "/api/v1/runs/absent", "/api/v1/runs/links/report.json", "/api/v1/runs/..%2fruns2/report.json",
        "/api/v1/runs/%2e%2e/report.json", "/api/v1/jobs/jnone", "/runs/absent/report.html", "/nowhere",
        "/runs/link", "/api/v1/runs/link",
        "/static/../app.py", "/static/app.py", "/api/v1/runs/links/circuits/..%2f..%2fx",
    ]  # fmt: skip
    answers = {path: server.client.get(path) for path in paths}
    assert {answer.status_code for answer in answers.values()} == {404}, answers
    assert len({answer.text for answer in answers.values()}) == 1
    shown = server.client.get("/api/v1/runs?after=lin").json()["runs"]
    assert "links" in [run["run"] for run in shown]
    assert "link" not in [run["run"] for run in shown]
    assert 'href="/runs/link"' not in server.client.get("/?after=lin").text


def test_no_file_is_read_or_written_through_a_link_that_leads_elsewhere(server: Server) -> None:
    outside = server.home / "outside"
    (outside / "jobs").mkdir(parents=True)
    (outside / "evaluation.json").write_text('{"of": "another"}')
    (outside / "metrics.jsonl").write_text('{"step": 1, "ce": 0.5}\n')
    (outside / "log.txt").write_text("another's log\n")
    progress = {"what": "another", "done": 1, "total": 2, "elapsed": "", "left": "", "values": {}}
    (outside / "progress.json").write_text(json.dumps(progress))
    job = Job.new("leads", "train")
    folder = JobFolder(server.runs, "leads", job.id)
    folder.write_job(job)
    folder.write_status(Status(state="done"))
    for link in (folder.log, folder.progress, *(server.runs / "leads" / f"{name}" for name in
                 ("evaluation.json", "metrics.jsonl"))):  # fmt: skip
        link.symlink_to(outside / link.name)
    (server.runs / "leads-out").symlink_to(outside)
    (server.runs / "leads-within").mkdir()
    (server.runs / "leads-within" / "jobs").symlink_to(outside / "jobs")
    reindex(server.runs)
    away = Job.new("leads-away", "train")
    folder = JobFolder(server.home / "runs3", "away", away.id)
    folder.write_job(away)
    write_json(folder.engine, {"engine": "slurm", "engine_id": "1"})
    (server.runs / "leads-away").symlink_to(server.home / "runs3" / "away")
    assert server.client.get(f"/api/v1/jobs/{away.id}").status_code == 404
    assert away.id not in server.client.get("/api/v1/jobs?limit=200").text
    assert server.client.get("/api/v1/runs/leads").json()["evaluation"] is None
    assert server.client.get(f"/api/v1/jobs/{job.id}").json()["progress"] is None
    events = server.client.get(f"/api/v1/jobs/{job.id}/events").text
    assert "event: end" in events
    assert "event: log" not in events
    assert "event: metrics" not in events
    for name in ("leads-out", "leads-within"):
        ask = {"recipe": "train", "config": "python", "run": name}
        answer = server.client.post("/api/v1/jobs", json=ask)
        assert answer.status_code == 400
        assert f"run '{name}': its folder leads elsewhere" in answer.json()["error"]
    for name in ("leads-out", "%2e%2e", "..%2foutside"):
        assert server.client.post(f"/api/v1/runs/{name}/sessions", json={}).status_code == 404
    assert list((outside / "jobs").iterdir()) == []


def test_the_committed_openapi_file_is_what_the_code_says(server: Server) -> None:
    found = server.client.get("/api/v1/openapi.json").json()
    committed = json.loads((ROOT / "bridges" / "service" / "openapi.json").read_text())
    for value in (found, committed):  # FastAPI's own parts change with its releases
        value.pop("openapi")
        for name in ("HTTPValidationError", "ValidationError"):
            value["components"]["schemas"].pop(name, None)
    assert found == committed
