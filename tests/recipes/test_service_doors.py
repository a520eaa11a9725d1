"""Nobody comes in: what tests/bridges/test_service_guard.py asks, asked of `sparsebridge serve` itself."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bridges.cli import main
from tests.bridges.test_service_guard import CHANGES, METHODS, TOKEN, bad_hosts, push
from tests.bridges.test_service_guard import Server as Asked
from tests.recipes.service_server import Server, httpx, make_home, start

JOBS = "/api/v1/jobs"
TYPED = ("Content-Type", "application/json")
HONEST = b'{"recipe": "train", "config": "python", "run": "door"}'


class Door(Asked):
    """The real server, asked to the byte."""

    def __init__(self, server: Server):
        self.process, self.port, self.host = server.process, server.port, f"127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def door(server: Server) -> Door:
    return Door(server)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On every address of this machine, with a token."""
    home = make_home(tmp_path_factory.mktemp("locked"))
    (home / "token").write_text(TOKEN + "\n")
    (home / "token").chmod(0o600)
    server = Server(home, "--no_worker", "--host", "0.0.0.0", "--token_file", str(home / "token"))
    yield server
    server.close()
    said = server.log.read_text()
    assert TOKEN not in said
    assert "once=" not in said


def count(server: Server, **headers: str) -> int:
    return server.client.get("/readyz", headers=headers).json()["jobs"]


@pytest.mark.parametrize("method", METHODS)
def test_a_foreign_host_is_refused_on_every_method(door: Door, server: Server, method: str) -> None:
    before = count(server)
    for host in bad_hosts(door.port):
        for path in ("/", JOBS, "/nothing?once=1"):
            answer = door.ask(method, path, ("Host", host), TYPED, host=False)
            assert answer.status == 400
            assert b"evil" not in answer.body
    assert door.ask(method, "/", host=False).status == 400
    assert door.ask(method, "/", ("Host", door.host)).status == 400  # twice
    assert count(server) == before


@pytest.mark.parametrize("method", METHODS)
def test_another_site_s_page_is_refused(door: Door, server: Server, method: str) -> None:
    before, port = count(server), door.port
    for origin in (
        "null",
        "http://evil.example",
        f"http://127.0.0.1:{port + 1}",
        f"http://localhost:{port}",
        "",
    ):
        answer = door.ask(method, JOBS, TYPED, ("Origin", origin), body=HONEST if method in CHANGES else b"")
        answer.assert_refused(403) if method != "HEAD" else answer.assert_safe()
        assert answer.status == 403
    for site in ("cross-site", "same-site"):
        assert door.ask(method, JOBS, TYPED, ("Sec-Fetch-Site", site)).status == 403
    assert count(server) == before


def test_a_change_that_a_form_could_send_makes_no_job(door: Door, server: Server) -> None:
    before = count(server)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        door.ask("POST", JOBS, ("Content-Type", kind), body=HONEST).assert_refused(403)
    door.ask("POST", JOBS, body=HONEST).assert_refused(403)
    door.ask("OPTIONS", JOBS, ("Access-Control-Request-Method", "POST")).assert_refused(405)
    assert count(server) == before
    assert door.ask("POST", JOBS, TYPED, ("Origin", f"http://{door.host}"), body=HONEST).status == 201
    assert count(server) == before + 1


def test_every_kind_of_answer_carries_the_headers(door: Door) -> None:
    for path in (
        "/",
        "/nothing",
        "/runs/absent",
        "/static/service.js",
        "/healthz",
        "/api/v1/runs",
        f"{JOBS}/j",
    ):
        door.ask("GET", path).assert_safe()
        door.ask("GET", path, ("Accept", "text/html")).assert_safe()


def test_what_is_too_much_is_refused_and_memory_stays_flat(door: Door, server: Server) -> None:
    before = count(server)
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    head = f"POST {JOBS} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n"
    push(door, head, chunk, 256)
    process = psutil.Process(door.process.pid)
    memory = process.memory_info().rss
    for _ in range(4):
        sent, received = push(door, head, chunk, 1024)
        assert sent < 64 << 20
        assert received.startswith(b"HTTP/1.1 413") or not received  # a reset may overtake the answer
    assert process.memory_info().rss - memory < 16 << 20
    door.ask("POST", JOBS, TYPED, body=b"[" * 60).assert_refused(400)
    assert door.ask("POST", JOBS, TYPED, ("Content-Length", str(1 << 30))).status == 413
    assert count(server) == before


def test_without_its_token_nothing_is_said(locked: Server) -> None:
    door, answers = Door(locked), []
    paths = ["/", JOBS, "/healthz", "/nothing", "/static/service.js", "/api/v1/openapi.json"]
    for path in paths:
        for given in (
            None,
            f"Bearer {TOKEN[:-1]}",
            f"Bearer {TOKEN}x",
            f"Basic {TOKEN}",
            "Bearer ",
            "x" * 9000,
        ):
            headers = [] if given is None else [("Authorization", given)]
            answers.append(door.ask("GET", path, *headers))
            answers[-1].assert_refused(401)
        assert door.ask("GET", f"{path}?token={TOKEN}").status == 401
    assert door.ask("POST", JOBS, TYPED, body=HONEST).status == 401
    assert len({answer.body for answer in answers}) == 1
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert locked.client.get("/", headers=bearer).status_code == 200
    assert count(locked, **bearer) == 0
    assert (
        locked.client.post(
            JOBS, content=HONEST, headers=bearer | {"content-type": "application/json"}
        ).status_code
        == 201
    )


def test_the_link_it_prints_opens_the_pages_once(locked: Server) -> None:
    with httpx.Client(base_url=locked.address, follow_redirects=True) as browser:
        assert "<h1>Jobs and runs</h1>" in browser.get(locked.link).text
        assert browser.get("/").status_code == 200
    with httpx.Client(base_url=locked.address, follow_redirects=True) as other:
        assert other.get(locked.link).status_code == 401


def test_the_token_makes_further_links_and_a_cookie_does_not(locked: Server, monkeypatch, capsys) -> None:
    words = ["link", "--server", locked.address]
    monkeypatch.delenv("SPARSEBRIDGE_TOKEN", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "wants its token: give --token_file" in capsys.readouterr().err
    links = []
    for _ in range(2):
        main([*words, "--token_file", str(locked.home / "token")])
        links.append(capsys.readouterr().out.strip())
    assert len(set(links)) == 2
    for link in links:  # each good for one browser
        with httpx.Client(base_url=locked.address, follow_redirects=True) as browser:
            code = link.partition("/?")[2]
            assert "<h1>Jobs and runs</h1>" in browser.get(f"/?{code}").text
            assert browser.post("/api/v1/jobs", json={}).status_code == 422  # it is let in
            assert browser.post("/api/v1/links", json={}).status_code == 401
            assert browser.post("/api/v1/links/", json={}).status_code == 401
    door = Door(locked)
    bearer = ("Authorization", f"Bearer {TOKEN}")
    assert door.ask("POST", "/api/v1/links", bearer, body=b"{}").status == 403  # as a form could send it
    door.ask("POST", "/api/v1/links", TYPED, ("Authorization", "Bearer x"), body=b"{}").assert_refused(401)


def test_without_a_token_the_link_is_the_address_and_no_server_is_one_line(server: Server, capsys) -> None:
    main(["link", "--server", f"{server.address}/"])
    assert capsys.readouterr().out == f"{server.address}/\n"
    other = socket.create_server(("127.0.0.1", 0))  # of another kind
    threading.Thread(target=lambda: other.accept()[0].sendall(b"220 mail\r\n"), daemon=True).start()
    mail = f"http://127.0.0.1:{other.getsockname()[1]}"
    for address, code, why in ((mail, "4", "no sparsebridge answers"),
                               ("http://127.0.0.1:1", "4", "no sparsebridge answers"),
                               ("file:///etc", "2", "an address as the server printed it"),
                               (f"{server.address}/runs", "4", "answered 404")):  # fmt: skip
        with pytest.raises(SystemExit, match=code):
            main(["link", "--server", address])
        said = capsys.readouterr().err
        assert why in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["--host", "0.0.0.0"], 2, "can be reached from other machines"),
        (["--token_file", "loose"], 2, "chmod 600"),
        (["--new_token"], 2, "--token_file"),
        (["--port", "PORT"], 4, "taken by process PID"),
    ],
)
def test_a_server_that_may_not_start_says_why(
    server: Server, tmp_path: Path, words: list[str], code: int, why: str
) -> None:
    """One line and an exit code; the server that has the port goes on."""
    (tmp_path / "loose").write_text(TOKEN)
    (tmp_path / "loose").chmod(0o644)
    own = start(tmp_path, "--no_worker", *[word.replace("PORT", str(server.port)) for word in words])
    said, error = own.communicate(timeout=120)
    assert (own.returncode, said) == (code, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert why.replace("PID", str(server.process.pid)) in error
    assert server.client.get("/healthz").json() == {"ok": True}
