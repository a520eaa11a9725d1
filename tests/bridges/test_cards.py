"""Cards from a real run's files, and the upload to a hub: a small one, spoken to over HTTP."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import ModelCard, constants

from bridges.cards import push, write_cards
from extractor.artifacts import read_json
from extractor.errors import InputError, UsageError
from tests.recipes.test_recipes import EDIT, EXTRACT, TRAIN, open_every_read, run_in_process


@pytest.fixture(scope="module")
def finished(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "cards"
    with pytest.MonkeyPatch.context() as monkeypatch:
        dense = ["--dense.path", tiny_checkpoint, "--run", run]
        run_in_process(monkeypatch, "train", *dense, *TRAIN)
        run_in_process(monkeypatch, "extract", "--run", run, *EXTRACT, "--tasks", "[with_as]")
        open_every_read(run)
        run_in_process(monkeypatch, "edit", *dense, *EDIT)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


# --- cards -------------------------------------------------------------------------------------------------


def test_every_part_of_a_run_gets_a_card_with_its_own_figures(run: Path) -> None:
    paths = write_cards(run)
    folders = {path.parent.relative_to(run).as_posix() for path in paths}
    assert folders == {".", "student", "bridges", "circuits", "edits/with_as"}
    evaluation = read_json(run / "evaluation.json", "evaluation", "train")
    edit = read_json(run / "edits" / "with_as" / "edit.json", "edit", "edit")
    circuit = read_json(run / "circuits" / "with_as.json", "circuit", "extract")
    for path in paths:
        card = ModelCard.load(path)
        data = card.data.to_dict()
        assert data["density"] == 0.125
        assert data["kl_dense_nats_per_token"] == evaluation["student"]["kl_dense"]
        assert "sparsebridge" in data["tags"]
        assert data["library_name"] == ("transformers" if path.parent.name == "student" else "sparsebridge")
        assert "base_model" not in data  # a folder is no hub id
        assert evaluation["dense"]["sha256"] in card.text
        assert not re.search(r"\{\{|\{%|\bNone\b|Undefined", card.content)
    text = (run / "student" / "README.md").read_text()
    assert f"{evaluation['student']['kl_dense']:.3f}" in text
    assert f"{evaluation['student']['nonzeros']:,}" in text
    assert f"| {circuit['evidence']['nodes']} |" in (run / "circuits" / "README.md").read_text()
    assert f"{edit['size']} nodes" in (run / "edits" / "with_as" / "README.md").read_text()
    assert len(re.findall(r"^\| \d\.resid", (run / "bridges" / "README.md").read_text(), re.MULTILINE)) == 4


def test_what_a_card_says_to_load_loads(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    for path in write_cards(run)[1:]:
        names: dict[str, object] = {}
        code = re.search(r"```python\n(.*?)```", path.read_text(), re.DOTALL).group(1)
        exec(code, names)
        assert {"model", "bridges", "circuit", "edit"} & names.keys(), path


def test_cards_written_again_are_the_same(run: Path) -> None:
    before = [path.read_text() for path in write_cards(run)]
    assert [path.read_text() for path in write_cards(run)] == before


def test_a_hub_id_at_a_commit_becomes_the_base_model(run: Path) -> None:
    manifest, evaluation = run / "manifest.json", run / "evaluation.json"
    facts = json.loads(manifest.read_text())
    facts["train"]["inputs"]["dense"] |= {"commit": "a" * 40, "tokenizer": "org/name", "random_weights": True}
    manifest.write_text(json.dumps(facts))
    figures = json.loads(evaluation.read_text())
    figures["dense"]["name"] = "org/name"
    evaluation.write_text(json.dumps(figures))
    write_cards(run)
    card = ModelCard.load(run / "edits" / "with_as" / "README.md")
    assert card.data.base_model == "org/name"
    assert f"DenseConfig(path='org/name', revision='{'a' * 40}', random_weights=True)" in card.text
    assert "random weights: this is a test" in card.text


def test_without_circuits_and_edits_there_are_three_cards(run: Path) -> None:
    shutil.rmtree(run / "circuits")
    shutil.rmtree(run / "edits")
    assert len(write_cards(run)) == 3
    assert "circuits" not in (run / "README.md").read_text()


def test_a_run_without_evaluation_has_no_cards(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no evaluation at"):
        write_cards(tmp_path)
    assert not list(tmp_path.iterdir())


# --- upload ------------------------------------------------------------------------------------------------


class SmallHub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that an upload uses; keeps what it is sent."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        self.server.seen.append(self.path)
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.url}/org/run"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in files
            ]
            self._answer({"files": modes})
        elif "/branch/" in path:
            self._answer({})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{self.server.url}/org/run/commit/{'b' * 40}", "commitOid": "b" * 40})
        else:
            self._answer({"error": f"unknown path {path}"}, 404)

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        self._answer({"id": "org/run", "private": self.server.is_private, "siblings": [], "sha": "c" * 40})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, value: dict, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test_alone")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), SmallHub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.seen, server.created, server.files, server.is_private = [], [], {}, True
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_push_sends_the_run_as_it_lies_there_and_nothing_unfinished(run: Path, hub) -> None:
    write_cards(run)
    (run / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    (run / "checkpoints" / "checkpoint-4" / "model.safetensors").write_bytes(b"x")
    (run / ".tmp-student").mkdir()
    (run / ".tmp-student" / "config.json").write_text("{}")
    (run / "student" / ".tmp-config.json").write_text("{}")
    url = push(run, "org/run", revision="first", endpoint=hub.url)
    assert url == f"{hub.url}/org/run/commit/{'b' * 40}"
    assert hub.created[0]["name"] == "run"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    unfinished = ("checkpoints/", ".tmp-")
    expected = {
        name: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file()
        and not any(mark in (name := path.relative_to(run).as_posix()) for mark in unfinished)
    }
    assert hub.files == expected
    assert any(path.endswith("/branch/first") for path in hub.seen)


def test_an_existing_public_repository_is_not_filled_unasked(run: Path, hub) -> None:
    hub.is_private = False
    with pytest.raises(InputError, match="exists and is public"):
        push(run, "org/run", endpoint=hub.url)
    assert not hub.files
    push(run, "org/run", private=False, endpoint=hub.url)
    assert hub.files


def test_a_hub_that_refuses_is_one_line(run: Path, hub) -> None:
    with pytest.raises(InputError, match="could not be sent to 'org/run'") as error:
        push(run, "org/run", endpoint=f"{hub.url}/elsewhere")
    assert "\n" not in str(error.value)
    assert not hub.files


def test_offline_nothing_is_sent(run: Path, hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set") as error:
        push(run, "org/run", endpoint=hub.url)
    assert "\n" not in str(error.value)
    assert not hub.seen


@pytest.mark.parametrize("name", ["", "no spaces here", "a/b/c", "-x"])
def test_a_name_that_cannot_be_a_repository_is_refused_before_anything(name: str, run: Path, hub) -> None:
    with pytest.raises(UsageError, match="cannot name a hub repository"):
        push(run, name, endpoint=hub.url)
    assert not hub.seen


def test_an_unfinished_run_is_not_sent(tmp_path: Path, hub) -> None:
    with pytest.raises(InputError, match="no evaluation at"):
        push(tmp_path, "org/run", endpoint=hub.url)
    assert not hub.seen
