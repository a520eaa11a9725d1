"""Nobody comes in: a real server in a second process is asked as strangers ask; the guard is fuzzed here."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from bridges.service import guard as guard_module
from bridges.service import network
from bridges.service.guard import HEADERS, Guard, GuardSettings, Sessions, contained, is_id
from bridges.service.network import bind_settings, bound_socket, find_token, make_token, open_port
from extractor.errors import MachineError, UsageError
from tests.conftest import ROOT

SERVER = """
import asyncio, contextlib, json, os, sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from bridges.service.guard import Guard, contained
from bridges.service.network import find_token, open_port
from extractor.errors import SparsebridgeError

host, runs, ready, token_file = sys.argv[1], *map(Path, sys.argv[2:5])
counts = {"reached": 0, "changes": 0, "streams": 0, "lifespan": 0}

def page(request):
    counts["reached"] += 1
    loose = {"Access-Control-Allow-Origin": "*", "Cache-Control": "public", "X-Frame-Options": "ALLOWALL"}
    return HTMLResponse("<p>page</p>", headers=loose)

def report(request):
    return HTMLResponse("report", headers={"Content-Security-Policy": "default-src 'none'; img-src data:"})

async def echo(request):
    counts["reached"] += 1
    counts["changes"] += 1
    return JSONResponse({"bytes": len(await request.body()), "json": (await request.body())[:40].decode()})

def file(request):
    try:
        return PlainTextResponse(contained(runs, *request.path_params["path"].split("/")).read_text())
    except (LookupError, IsADirectoryError):
        return JSONResponse({"error": "not found"}, 404)

async def events(request):
    async def lines():
        counts["streams"] += 1
        try:
            for number in range(1000):
                yield f"id: {number}\\ndata: {number}\\n\\n"
                await asyncio.sleep(0.02)
        finally:
            counts["streams"] -= 1
    return StreamingResponse(lines(), media_type="text/event-stream")

def crash(request):
    raise RuntimeError("the inside of the service")

def code(request):
    return JSONResponse({"code": settings.sessions.new_code()})

@contextlib.asynccontextmanager
async def lifespan(app):
    counts["lifespan"] += 1
    yield

app = Starlette(lifespan=lifespan, routes=[
    Route("/", page, methods=["GET"]), Route("/report", report), Route("/events", events),
    Route("/crash", crash),
    Route("/files/{path:path}", file), Route("/count", lambda request: JSONResponse(counts)),
    Route("/api/echo", echo, methods=["POST", "PUT", "PATCH", "DELETE"]), Route("/code", code,
    methods=["POST"]),
])
try:
    token = find_token(token_file if token_file.name != "-" else None, os.environ)
    bound, settings = open_port(host, 0, token)
except SparsebridgeError as error:
    sys.exit(f"error: {error}")
partial = ready.with_suffix(".part")
partial.write_text(json.dumps({"port": bound.getsockname()[1], "link": settings.link()}))
partial.rename(ready)
uvicorn.Server(uvicorn.Config(Guard(app, settings=settings), log_level="info")).run(sockets=[bound])
"""

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
CHANGES = ("POST", "PUT", "PATCH", "DELETE")
TOKEN = "a-token.of_forty~characters+and/more===="
Headers = list[tuple[str, str]]


def words(text: str) -> list[str]:
    return text.split()


@dataclass
class Answer:
    status: int
    headers: Headers
    body: bytes
    is_reached: bool = False

    def __getitem__(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key.lower() == name]
        return ", ".join(values) or None

    def assert_safe(self) -> None:
        """What every answer carries, and what none does."""
        for name, value in HEADERS.items():
            assert self[name.decode()] == value.decode()
        assert self["content-security-policy"]
        assert not [name for name, _ in self.headers if name.lower().startswith("access-control")]

    def assert_refused(self, status: int) -> None:
        assert self.status == status
        assert not self.is_reached
        self.assert_safe()
        assert list(json.loads(self.body)) == ["error"]
        assert self.body.count(b"\n") == 1
        assert len(self.body) < 400


class Server:
    """The server's process, and requests to the byte."""

    def __init__(self, folder: Path, host: str = "127.0.0.1", token_file: str = "-"):
        self.runs, self.log = folder / "runs", folder / "log.txt"
        (self.runs / "one").mkdir(parents=True)
        (self.runs / "one" / "here.txt").write_text("here")
        (folder / "server.py").write_text(SERVER)
        ready = folder / "ready.json"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, folder / "server.py", host, self.runs, ready, token_file],
                cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        found = json.loads(ready.read_text())
        self.port, self.link = found["port"], found["link"]
        self.host = f"127.0.0.1:{self.port}"

    def send(self, data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as client:
            client.sendall(data)
            received = b""
            while piece := client.recv(65536):
                received += piece
        return received

    def ask(
        self, method: str, path: str, *headers: tuple[str, str], body: bytes = b"", host: bool = True
    ) -> Answer:
        """One request on a connection of its own. `host` puts the honest one on."""
        lines = [("Connection", "close"), *headers]
        lines = [("Host", self.host), *lines] if host else lines
        if body:
            lines.append(("Content-Length", str(len(body))))
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines)
        head, _, content = self.send(head.encode("latin-1") + b"\r\n" + body).partition(b"\r\n\r\n")
        first, *rest = head.decode("latin-1").split("\r\n")
        pairs = [(line.partition(": ")[0], line.partition(": ")[2]) for line in rest]
        return Answer(int(first.split()[1]), pairs, content)

    def change(self, method: str = "POST", *headers: tuple[str, str], body: bytes = b"{}") -> Answer:
        return self.ask(method, "/api/echo", ("Content-Type", "application/json"), *headers, body=body)

    def counts(self, *headers: tuple[str, str]) -> dict[str, int]:
        return json.loads(self.ask("GET", "/count", *headers).body)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On loopback, without a token."""
    yield from started(tmp_path_factory.mktemp("open"))


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On every address, with a token."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "token").write_text(TOKEN + "\n")
    (folder / "token").chmod(0o600)
    yield from started(folder, "0.0.0.0", str(folder / "token"))


def started(folder: Path, *words: str) -> Iterator[Server]:
    server = Server(folder, *words)
    yield server
    server.process.terminate()
    try:
        assert server.process.wait(10) in (0, -signal.SIGTERM)
    finally:
        server.process.kill()


class App:
    """What stands behind a guard in this process."""

    def __init__(self) -> None:
        self.body: bytes | None = None
        self.query: bytes | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.query = scope["query_string"]
        self.body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"reached"})


def ask(
    settings: GuardSettings, method: str = "GET", path: str = "/", 
    headers: Sequence[tuple[bytes, bytes]] = (),
    pieces: Sequence[bytes] = (b"",), query: bytes = b"", kind: str = "http", extensions: Sequence[str] = (),
) -> Answer:  # fmt: skip
    """Through a guard in this process: what no client library and no HTTP parser would let through, too."""
    app, sent = App(), []
    more = list(pieces)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": more.pop(0), "more_body": bool(more)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path, "headers": list(headers), "query_string": query,
             "extensions": {name: {} for name in extensions}}  # fmt: skip
    asyncio.run(Guard(app, settings=settings)(scope, receive, send))
    if sent[0]["type"] == "websocket.close":
        return Answer(0, [], b"")
    pairs = [(name.decode(), value.decode()) for name, value in sent[0]["headers"]]
    return Answer(sent[0]["status"], pairs, sent[1]["body"], app.body is not None)


SETTINGS = bind_settings("127.0.0.1", 8000)
LOCKED = bind_settings("127.0.0.1", 8000, TOKEN)
HOST = (b"host", b"127.0.0.1:8000")
JSON = (b"content-type", b"application/json")


# --- 67: the name that is asked for ------------------------------------------------------------------------


def bad_hosts(port: int) -> list[str]:
    return [
        "evil.example", f"evil.example:{port}", "127.0.0.1", "localhost", f"127.0.0.1:{port + 1}",
        f"127.0.0.2:{port}", f"127.0.0.1:{port}.evil.example", f"evil.example@127.0.0.1:{port}",
        f"127.0.0.1:{port},evil.example", "", "null", f"127.0.0.1.nip.io:{port}", f"localhost.:{port}",
        f"LOCALHOST:{port}:", f"[::1%25lo]:{port}", f"0.0.0.0:{port}", f"127.1:{port}",
        f"2130706433:{port}", f"127.0.0.1:0{port}", f"<script>:{port}", f"http://127.0.0.1:{port}",
    ]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_foreign_host_is_refused_on_every_method(server: Server, method: str) -> None:
    before = server.counts()
    for host in bad_hosts(server.port):
        for path in ("/", "/api/echo", "/nothing?once=1"):
            answer = server.ask(
                method, path, ("Host", host), ("Content-Type", "application/json"), host=False
            )
            assert answer.status == 400
            assert b"<script>" not in answer.body
            assert b"evil" not in answer.body
    assert server.ask(method, "/", host=False).status == 400
    assert server.ask(method, "/", ("Host", server.host)).status == 400  # twice
    assert server.send(f"{method} / HTTP/1.0\r\n\r\n".encode()).split()[1] == b"400"
    assert server.counts() == before


def test_every_name_of_its_own_is_answered(server: Server) -> None:
    for host in (f"127.0.0.1:{server.port}", f"localhost:{server.port}", f"[::1]:{server.port}"):
        answer = server.ask("GET", "/", ("Host", host), host=False)
        assert answer.status == 200
        answer.assert_safe()


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_hosts_that_no_parser_lets_through_are_refused(kind: str) -> None:
    odd = [[(b"host", name)] for name in (b"127.0.0.1:8000\0", b"\xff", b"")]
    for headers in ([], [HOST, HOST], [HOST, (b"Host", b"evil")], *odd):
        ask(SETTINGS, "GET", "/", headers, kind=kind, extensions=["websocket.http.response"]).assert_refused(
            400
        )
    ask(SETTINGS, "GET", "evil:80", [HOST]).assert_refused(400)


def test_websockets_are_refused(server: Server) -> None:
    keys = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13"),
            ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")]  # fmt: skip
    assert server.ask("GET", "/events", *keys).status == 403
    assert server.ask("GET", "/events", ("Host", "evil.example"), *keys, host=False).status == 400
    extension = ["websocket.http.response"]
    ask(SETTINGS, headers=[HOST], kind="websocket", extensions=extension).assert_refused(403)
    assert ask(SETTINGS, headers=[HOST], kind="websocket").status == 0  # closed before it was accepted
    with pytest.raises(ValueError, match="only http"):
        ask(SETTINGS, headers=[HOST], kind="smtp")


# --- 68: the page that asks --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_another_sites_page_is_refused(server: Server, method: str) -> None:
    port = server.port
    origins = [
        "null", "http://evil.example", f"http://evil.example:{port}", f"https://127.0.0.1:{port}",
        "http://127.0.0.1", f"http://127.0.0.1:{port + 1}", f"http://127.0.0.1:{port}.evil.example",
        f"http://127.0.0.1:{port}/", "", f"http://localhost:{port}", f"http://sub.localhost:{port}",
        f"HTTP://127.0.0.1:{port}", "file://", f"http://127.0.0.1:{port} http://evil.example",
        "chrome-extension://abc", "*",
    ]  # fmt: skip
    before = server.counts()
    typed = ("Content-Type", "application/json")
    for origin in origins:
        server.ask(method, "/api/echo", typed, ("Origin", origin)).assert_safe()
        assert server.ask(method, "/api/echo", typed, ("Origin", origin)).status == 403
    for site in ("cross-site", "same-site", "same-origin, cross-site", "", "Same-Origin", "unknown"):
        assert server.ask(method, "/api/echo", typed, ("Sec-Fetch-Site", site)).status == 403
    own = ("Origin", f"http://{server.host}")
    assert server.ask(method, "/api/echo", typed, own, ("Origin", "null")).status == 403
    twice = [("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Site", "cross-site")]
    assert server.ask(method, "/api/echo", typed, *twice).status == 403
    assert server.counts() == before


@pytest.mark.parametrize("method", CHANGES)
def test_a_change_that_a_form_could_send_is_refused(server: Server, method: str) -> None:
    before = server.counts()
    types = [
        "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp",
        "text/plain; application/json", "application/json, text/plain", "application/json; charset=utf-16",
        "application/json; boundary=x", "application/problem+json", "application/csp-report", "*/*",
    ]  # fmt: skip
    for content_type in types:
        answer = server.ask(method, "/api/echo", ("Content-Type", content_type), body=b'{"a": 1}')
        answer.assert_refused(403)
    server.ask(method, "/api/echo", body=b"{}").assert_refused(403)
    typed = ("Content-Type", "application/json")
    server.ask(method, "/api/echo", typed, typed, body=b"{}").assert_refused(403)
    assert server.counts() == before
    allowed = ["application/json", "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"']
    for content_type in allowed:
        answer = server.ask(method, "/api/echo", ("Content-Type", content_type), body=b'{"a": 1}')
        assert answer.status == 200
        assert json.loads(answer.body) == {"bytes": 8, "json": '{"a": 1}'}


def test_no_preflight_is_answered_and_reading_changes_nothing(server: Server) -> None:
    before = server.counts()["changes"]
    asked = "Access-Control-Request-"
    preflight = [(asked + "Method", "DELETE"), (asked + "Headers", "content-type")]
    for path in ("/", "/api/echo", "*"):
        server.ask("OPTIONS", path, *preflight).assert_refused(405 if path != "*" else 400)
    for method in ("GET", "HEAD"):
        for path in ("/", "/api/echo", "/report", "/code", "/nothing", "/?method=DELETE&_method=POST"):
            server.ask(method, path, ("X-HTTP-Method-Override", "POST")).assert_safe()
    assert server.counts()["changes"] == before


def test_honest_pages_and_tools_pass(server: Server) -> None:
    page = [("Origin", f"http://{server.host}"), ("Sec-Fetch-Site", "same-origin")]
    for headers in (page, page[1:], page[:1], []):
        assert server.change("POST", *headers).status == 200
    assert server.ask("GET", "/", ("Sec-Fetch-Site", "none")).status == 200
    with httpx.Client(base_url=f"http://{server.host}") as client:
        assert client.get("/").text == "<p>page</p>"
        assert client.head("/").status_code == 200
        assert client.post("/api/echo", json={"a": [1, 2]}).json()["json"] == '{"a":[1,2]}'
        assert client.delete("/api/echo", headers={"content-type": "application/json"}).json()["bytes"] == 0
        assert client.get("/count").json()["lifespan"] == 1


# --- 69: where it listens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "0", "10.1.2.3", "169.254.1.1", "fd00::1", "::ffff:127.0.0.1"]
)
def test_an_address_for_others_needs_a_token(host: str) -> None:
    for token in (None, "", "short", "x" * 31, "x" * 40 + "\n", "ü" * 40, "with space " * 5):
        with pytest.raises(UsageError, match="32 characters"):
            bind_settings(host, 8000, token)
    assert bind_settings(host, 8000, TOKEN).token == TOKEN


def test_a_name_that_leads_elsewhere_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.0.1", "10.1.2.3")
    ]
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(UsageError, match="other machines"):
        open_port("box.example", 0)


def test_a_server_that_may_not_listen_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="error: host '0.0.0.0' can be reached from other machines"):
        Server(tmp_path, "0.0.0.0")


def test_what_it_answers_to() -> None:
    assert SETTINGS.hosts == ("127.0.0.1:8000", "localhost:8000", "[::1]:8000")
    assert bind_settings("10.1.2.3", 8000, TOKEN).origins[0] == "http://10.1.2.3:8000"
    listed = bind_settings("0.0.0.0", 80, TOKEN, ["https://Lab.example", "box", "box:9000"]).origins
    assert listed[:3] == ("https://lab.example", "http://box", "http://box:9000")
    assert listed[3:] == ("http://127.0.0.1", "http://localhost", "http://[::1]")
    for name in [
        "a b",
        "",
        *words("* *.lab.example https://lab.example/path user@lab lab:99999 ftp://lab ::1"),
    ]:
        with pytest.raises(UsageError, match="allowed host"):
            bind_settings("127.0.0.1", 8000, None, [name])
    for host, port in (("", 8000), ("no such name", 8000), ("127.0.0.1", 0), ("127.0.0.1", 70000)):
        with pytest.raises(UsageError):
            bind_settings(host, port)


def test_tokens_come_from_files_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "secrets" / "token"
    token = make_token(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(token) >= 43
    environ = {"SPARSEBRIDGE_TOKEN": TOKEN, "HOME": "/"}
    assert find_token(file, environ) == token
    assert environ == {"HOME": "/"}  # no job inherits it
    assert find_token(None, {"SPARSEBRIDGE_TOKEN": TOKEN}) == TOKEN
    assert find_token(None, {}) is None
    with pytest.raises(MachineError, match="File exists"):
        make_token(file)
    file.chmod(0o640)
    with pytest.raises(UsageError, match="can be read by others"):
        find_token(file, {})
    with pytest.raises(UsageError, match="cannot be read"):
        find_token(tmp_path / "absent", {})
    with pytest.raises(UsageError, match="32 characters"):
        find_token(None, {"SPARSEBRIDGE_TOKEN": "short"})
    assert TOKEN not in repr(LOCKED)


# --- 70: the token -----------------------------------------------------------------------------------------


def test_a_wrong_token_is_answered_the_same_whatever_is_wrong(locked: Server) -> None:
    wrong = [
        [], [f"Bearer {TOKEN[:-1]}"], [f"Bearer {TOKEN}x"], ["Bearer "], ["Bearer"], [TOKEN],
        [f"Basic {TOKEN}"], [f"Bearer  {TOKEN}"], [f"Bearer {TOKEN.upper()}"], [f"Bearer {TOKEN}"] * 2,
        [f"Bearer {TOKEN}, Bearer x"],
        ["Bearer " + "x" * len(TOKEN)], ["Bearer " + "x" * 4000], ["Bearer \xff\xfe"], [f"Bearer{TOKEN}"],
    ]  # fmt: skip
    answers = [
        locked.ask("GET", "/count", *(("Authorization", value) for value in values)) for values in wrong
    ]
    cookie = f"sparsebridge_{locked.port}="
    cookies = [cookie + TOKEN, cookie, "sparsebridge=x", "a;b;=;;"]
    answers += [locked.ask("GET", "/count", ("Cookie", value)) for value in cookies]
    queries = ["?token=" + TOKEN, "?once=wrong", "?once=" + TOKEN, "?once=", "absent", "count?once=wrong"]
    answers += [locked.ask("GET", f"/{query}") for query in queries]
    answers += [locked.change(method) for method in CHANGES]
    for answer in answers:
        answer.assert_refused(401)
    varying = {"date"}
    assert len({(a.body, tuple(h for h in a.headers if h[0] not in varying)) for a in answers}) == 1
    honest = ("Authorization", f"Bearer {TOKEN}")
    assert locked.counts(honest)["changes"] == 0
    assert locked.change("POST", honest).status == 200
    assert locked.counts(("authorization", f"bearer {TOKEN}"))["changes"] == 1


def test_the_comparison_is_of_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant time: neither the length nor the start of a guess reaches the comparison."""
    seen: list[tuple[bytes, bytes]] = []
    real = guard_module.hmac.compare_digest
    spy = lambda a, b: (seen.append((a, b)), real(a, b))[1]  # noqa: E731
    monkeypatch.setattr(guard_module.hmac, "compare_digest", spy)
    for guess in (TOKEN[:-1], TOKEN, "x", ""):
        ask(LOCKED, headers=[HOST, (b"authorization", b"Bearer " + guess.encode())])
    assert [len(a) == len(b) == 32 for a, b in seen] == [True] * 4
    assert len({a[:4] for a, _ in seen}) == 4


def test_a_one_time_link_becomes_a_cookie_once(locked: Server) -> None:
    code = re.fullmatch(rf"http://127.0.0.1:{locked.port}/\?once=([A-Za-z0-9_-]{{43}})", locked.link)[1]
    assert locked.ask("HEAD", f"/?once={code}").status == 401  # a preview of the link does not use it up
    assert locked.ask("GET", f"/?once={code}", ("Host", "evil.example"), host=False).status == 400
    assert locked.ask("GET", f"/?once={code}", ("Sec-Fetch-Site", "cross-site")).status == 403
    answer = locked.ask("GET", f"/?once={code}", ("Sec-Fetch-Site", "none"))
    assert (answer.status, answer["location"], answer.body) == (303, "/", b"")
    answer.assert_safe()
    cookie, flags = answer["set-cookie"].split("; ", 1)
    assert flags == "Path=/; HttpOnly; SameSite=Strict"
    name, value = cookie.split("=", 1)
    assert name == f"sparsebridge_{locked.port}"
    assert len(value) == 43
    assert value not in (code, TOKEN)
    own = ("Cookie", f"other=1; {cookie}")
    page = locked.ask("GET", "/", own)
    assert page.status == 200
    assert page["referrer-policy"] == "no-referrer"
    assert locked.change("POST", own, ("Origin", f"http://{locked.host}")).status == 200
    locked.change("POST", own, ("Origin", "http://evil.example")).assert_refused(403)
    locked.ask("GET", f"/?once={code}").assert_refused(401)
    assert locked.ask("GET", f"/?once={code}", own).status == 303  # a bookmark of a browser that is known
    text = b"".join(bytes(str(a.headers), "utf-8") + a.body for a in (page, locked.ask("GET", "/count", own)))
    assert not any(secret.encode() in text for secret in (code, value, TOKEN))


def test_a_browser_comes_in_by_the_link(locked: Server) -> None:
    issued = locked.ask(
        "POST", "/code", ("Authorization", f"Bearer {TOKEN}"), ("Content-Type", "application/json")
    )
    code = json.loads(issued.body)["code"]
    with httpx.Client(base_url=f"http://{locked.host}", follow_redirects=True) as client:
        first = client.get("/", params={"once": code})
        assert first.text == "<p>page</p>"
        assert str(first.url).endswith("/")
        assert client.get("/count").status_code == 200
    with httpx.Client(base_url=f"http://{locked.host}") as client:
        assert client.get("/count").status_code == 401


def test_neither_codes_nor_tokens_are_logged(locked: Server) -> None:
    codes = [f"canary-code-{number:032}" for number in range(3)]
    locked.ask("GET", f"/?once={codes[0]}", ("Authorization", f"Bearer {TOKEN}"))
    locked.ask("GET", f"/count?a=1&once={codes[1]}")
    locked.ask("DELETE", f"/x?once={codes[2]}", ("Host", "evil.example"), host=False)
    assert locked.ask("GET", "/seen-in-the-log?a=1").status == 401
    log = locked.log.read_text()
    assert "GET /seen-in-the-log?a=1" in log
    assert not any(secret in log for secret in [*codes, TOKEN, locked.link.partition("once=")[2]])


def test_codes_end_and_are_used_once() -> None:
    now = [0.0]
    sessions = Sessions(clock=lambda: now[0])
    old, kept = sessions.new_code(), sessions.new_code()
    session = sessions.redeem(kept)
    assert session is not None
    assert sessions.holds(session)
    assert not sessions.holds(kept)
    now[0] = 600.0
    assert [sessions.redeem(code) for code in (kept, old, "", "x")] == [None] * 4
    assert sessions.holds(session)
    assert not any(text in repr(vars(sessions)) for text in (old, kept, session))


def test_a_cookie_over_https_is_secure() -> None:
    settings = bind_settings("127.0.0.1", 8000, TOKEN, ["https://lab.example"])
    query = f"once={settings.sessions.new_code()}".encode()
    secure = ask(settings, headers=[(b"host", b"lab.example")], query=query)
    assert secure["set-cookie"].endswith("; HttpOnly; SameSite=Strict; Secure")
    own = [JSON, (b"authorization", f"Bearer {TOKEN}".encode()), (b"host", b"lab.example")]
    assert ask(settings, "POST", headers=[*own, (b"origin", b"https://lab.example")]).is_reached
    ask(settings, "POST", headers=[*own, (b"origin", b"http://lab.example")]).assert_refused(403)
    ask(settings, "POST", headers=[*own, (b"origin", b"http://127.0.0.1:8000")]).assert_refused(403)


# --- 71: files ---------------------------------------------------------------------------------------------


def test_no_path_leads_out(server: Server) -> None:
    outside = server.runs.parent / "runs2"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (server.runs.parent / "secret.txt").write_text("secret")
    (server.runs / "one" / "link.txt").symlink_to(outside / "secret.txt")
    (server.runs / "one" / "folder").symlink_to(outside)
    (server.runs / "one" / "loop").symlink_to("loop")
    (server.runs / "one" / ".hidden").write_text("secret")
    os.mkfifo(server.runs / "one" / "pipe")
    absent = server.ask("GET", "/files/one/absent.txt")
    assert absent.status == 404
    for path in (
        "../secret.txt", "one/../../secret.txt", "%2e%2e/secret.txt", "..%2fsecret.txt",
        "%252e%252e/secret.txt", "..%5csecret.txt", "one/link.txt", "one/folder/secret.txt",
        "../runs2/secret.txt", "%2e%2e%2fruns2/secret.txt", "one/.hidden", "one/./here.txt",
        "one//here.txt", "/etc/hostname", "%2fetc%2fhostname", "one/loop", "one/pipe", "one", "", "~root",
        "one/here.txt/", "x" * 300, "C:/windows", "one%2fhere.txt/..", "....//secret.txt",
        "%c0%ae%c0%ae/secret.txt", "one/here.txt;.png",
    ):  # fmt: skip
        answer = server.ask("GET", f"/files/{path}")
        assert (answer.status, answer.body) == (404, absent.body), path
    for path in words("one/here.txt%00 one/here.txt%00.png one/here.txt%0a one/absent%0a %00 one/%7f"):
        server.ask("GET", f"/files/{path}").assert_refused(400)
    assert server.ask("GET", "/files/one/here.txt").body == b"here"


def test_containment_holds_for_random_names(tmp_path: Path) -> None:
    """Property: whatever is returned is real, lies below the root, and was named by plain names."""
    root = tmp_path / "runs"
    (root / "a" / "b").mkdir(parents=True)
    for folder in (root, root / "a", root / "a" / "b", tmp_path):
        (folder / "f.txt").write_text(str(folder))
    (tmp_path / "runs2").mkdir()
    (root / "in").symlink_to(root / "a")
    (root / "out").symlink_to(tmp_path / "runs2")
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "upup").symlink_to("../..")
    (tmp_path / "alias").symlink_to(root)
    inside = words("a b f.txt in out up upup")
    odd = ["", "\0", "a\0", "a\n", "\u2024\u2024", "é", "A" * 128, "A" * 129, str(tmp_path)]
    names = [*inside, *odd, *words(".. . / /etc a/b a\\b %2e%2e runs2 ~ -a")]
    chance, found = random.Random(0), set()
    for _ in range(20_000):
        parts = chance.choices(names, weights=[9] * 7 + [1] * (len(names) - 7), k=chance.randint(1, 5))
        base = chance.choice([root, tmp_path / "alias"])
        try:
            path = contained(base, *parts)
        except LookupError as error:
            assert str(error) == "there is nothing of that name"  # noqa: PT017
            continue
        assert path == Path(os.path.realpath(path))
        assert path.is_relative_to(root.resolve())
        assert all(is_id(part) for part in parts)
        assert "out" not in parts
        found.add(path)
    folders = (root, root / "a", root / "a" / "b")
    everything = [*folders, *(folder / "f.txt" for folder in folders)]
    assert found == {path.resolve() for path in everything}
    with pytest.raises(LookupError):
        contained(tmp_path / "absent", "a")


def test_ids() -> None:
    assert all(is_id(text) for text in ("a", "0", "a.b-c_d", "A" * 128, "j0123456789", "run..1"))
    for text in ["", "a b", "a\n", "a\0", "A" * 129, "é", "١", *words(". .. .a -a _a a/b a\\b %61 a:b")]:
        assert not is_id(text)


# --- 72: what a browser is told ----------------------------------------------------------------------------


def test_every_answer_carries_the_headers(server: Server, locked: Server) -> None:
    paths = {"page": "/", "crash": "/crash", "absent": "/absent", "report": "/report", "events": "/count"}
    answers = {name: server.ask("GET", path) for name, path in paths.items()}
    answers["head"], answers["change"] = server.ask("HEAD", "/"), server.change()
    answers["host"] = server.ask("GET", "/", ("Host", "x"), host=False)
    answers["token"], answers["method"] = locked.ask("GET", "/"), server.ask("OPTIONS", "/")
    answers["big"] = server.ask("POST", "/", ("Content-Length", "9" * 12))
    for answer in answers.values():
        answer.assert_safe()
    assert answers["crash"].status == 500
    assert b"inside" not in answers["crash"].body
    assert answers["report"]["content-security-policy"] == "default-src 'none'; img-src data:"
    policy = answers["page"]["content-security-policy"]
    for rule in ("default-src 'none'", "frame-ancestors 'none'", "form-action 'none'", "script-src 'self'"):
        assert rule in policy.split("; ")
    assert "unsafe" not in policy


def test_an_app_that_fails_still_answers() -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("inside")

    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [HOST], "query_string": b""}
    with pytest.raises(RuntimeError, match="inside"):
        asyncio.run(Guard(failing, settings=SETTINGS)(scope, None, send))
    pairs = [(name.decode(), value.decode()) for name, value in sent[0]["headers"]]
    Answer(sent[0]["status"], pairs, sent[1]["body"]).assert_refused(500)


def test_events_come_as_they_happen_and_end_with_the_client(server: Server) -> None:
    with closing(httpx.Client(base_url=f"http://{server.host}", timeout=10)) as client:
        with client.stream("GET", "/events") as stream:
            lines = stream.iter_lines()
            assert [next(lines) for _ in range(6)] == ["id: 0", "data: 0", "", "id: 1", "data: 1", ""]
            assert server.counts()["streams"] == 1
        deadline = time.monotonic() + 5
        while server.counts()["streams"] and time.monotonic() < deadline:
            time.sleep(0.02)
    assert server.counts()["streams"] == 0


# --- 76: too much ------------------------------------------------------------------------------------------


def push(server: Server, head: str, piece: bytes, times: int) -> tuple[int, bytes]:
    """Send until the server has had enough: bytes sent, and what it said."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(f"{head}Host: {server.host}\r\nContent-Type: application/json\r\n\r\n".encode())
        sent, received = 0, b""
        with suppress(OSError):
            for _ in range(times):
                client.sendall(piece)
                sent += len(piece)
        with suppress(OSError):
            while data := client.recv(65536):
                received += data
    return sent, received


def test_a_gigabyte_is_refused_and_memory_stays_flat(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    push(server, "POST /api/echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n", chunk, 1024)
    before, changes = process.memory_info().rss, server.counts()["changes"]
    answers = []
    for method in ("POST", "PUT", "DELETE") * 4:
        for length in ("Transfer-Encoding: chunked", f"Content-Length: {1 << 30}"):
            sent, received = push(server, f"{method} /api/echo HTTP/1.1\r\n{length}\r\n", chunk, 1024)
            assert sent < 64 << 20  # what fits the two sockets' buffers, not a gigabyte
            answers.append(received)
    assert any(answer.startswith(b"HTTP/1.1 413") for answer in answers)  # a reset may overtake the answer
    assert all(answer.startswith(b"HTTP/1.1 413") or not answer for answer in answers)
    assert process.memory_info().rss - before < 16 << 20
    assert server.counts()["changes"] == changes


def test_the_limit_is_exact(server: Server) -> None:
    limit = 256 * 1024
    whole = b'"' + b"x" * (limit - 2) + b'"'
    assert json.loads(server.change(body=whole).body)["bytes"] == limit
    assert server.ask("POST", "/api/echo", ("Content-Length", str(limit + 1))).status == 413
    own = [HOST, JSON]
    assert ask(SETTINGS, "POST", headers=own, pieces=[whole[:1000], b"", whole[1000:]]).is_reached
    ask(SETTINGS, "POST", headers=own, pieces=[whole, b" "]).assert_refused(413)
    lying = [*own, (b"content-length", b"5")]
    ask(SETTINGS, "POST", headers=lying, pieces=[whole, whole]).assert_refused(413)
    for headers in ([("Content-Length", "5")], [("Transfer-Encoding", "chunked")]):
        server.ask("GET", "/", *headers).assert_refused(400)
    server.ask("GET", "/", ("Content-Length", str(1 << 30))).assert_refused(413)
    assert server.ask("GET", "/", ("Content-Length", "0")).status == 200


@pytest.mark.parametrize(
    "body",
    [b"[" * 51, b"[" * 100_000, b'{"a":' * 60, b'[{"a":' * 26 + b"1", b'["]]]]]]"' * 60,
     b'"\\"' + b'",' + b"[" * 51,
     b'"\\\\"' + b"[" * 51, b"]" * 9 + b"[" * 60, "[1]".encode("utf-16"), "[1]".encode("utf-16-le"),
     "[1]".encode("utf-32"), b'"\xff"', b"\xff\xfe", b'{"a": "\0"}', b"\xed\xa0\x80"],
)  # fmt: skip
def test_a_body_that_would_recurse_or_be_guessed_is_refused(server: Server, body: bytes) -> None:
    server.change(body=body).assert_refused(400)


def nested(chance: random.Random, depth: int) -> Any:
    """Random JSON of at most this depth, with brackets and quotes in its texts."""
    text = "".join(chance.choices('[]{}"\\\u2028é,: \n', k=chance.randint(0, 8)))
    if depth == 0 or chance.random() < 0.2:
        return chance.choice([text, 1, -2.5, None, True])
    if chance.random() < 0.5:
        return [nested(chance, depth - 1) for _ in range(chance.randint(0, 3))]
    return {text + str(key): nested(chance, depth - 1) for key in range(chance.randint(0, 3))}


def depth_of(value: Any) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inside is None else 1 + max(map(depth_of, inside), default=0)


def test_random_bodies_pass_by_their_depth() -> None:
    """Property: JSON passes exactly where it nests at most `json_depth` deep; what passes never recurses."""
    chance = random.Random(1)
    settings = GuardSettings(SETTINGS.origins, json_depth=4)
    outcomes = set()
    for _ in range(400):
        value = nested(chance, chance.randint(0, 7))
        body = json.dumps(value, ensure_ascii=chance.random() < 0.5).encode()
        answer = ask(settings, "POST", headers=[HOST, JSON], pieces=[body])
        assert answer.is_reached == (depth_of(value) <= 4)
        outcomes.add(answer.status)
        torn = bytearray(body)
        for _ in range(chance.randint(1, 4)):
            torn.insert(chance.randint(0, len(torn)), chance.choice(b'[]{}"\\,:0 \xff\0'))
        if ask(settings, "POST", headers=[HOST, JSON], pieces=[bytes(torn)]).is_reached:
            with suppress(ValueError):
                assert depth_of(json.loads(bytes(torn))) <= 4
    assert outcomes == {200, 400}


@pytest.mark.parametrize("part", [b'\\"', b'"', b"[]", b'"\\', b"\\", b'"[', b"x", b'""'])
def test_no_body_is_slow(part: bytes) -> None:
    body = part * (256 * 1024 // len(part))
    start = time.process_time()
    ask(SETTINGS, "POST", headers=[HOST, JSON], pieces=[body])
    assert time.process_time() - start < 1.0  # measured: under 0.1 s; what is quadratic takes minutes


def test_random_changes_to_an_honest_request_are_refused() -> None:
    """Property: one byte more, less or other in what identifies a request, and the app never sees it."""
    chance = random.Random(2)
    bearer = b"Bearer " + TOKEN.encode()
    honest = [HOST, (b"origin", b"http://127.0.0.1:8000"), (b"sec-fetch-site", b"same-origin"),
              (b"authorization", bearer), JSON]  # fmt: skip
    statuses = [400, 403, 403, 401, 403]
    expected = {name: status for (name, _), status in zip(honest, statuses, strict=True)}
    junk = [
        name.encode() for name in words("x-forwarded-host forwarded x-http-method-override referer cookie")
    ]
    for _ in range(1500):
        extra = [(chance.choice(junk), chance.randbytes(9)) for _ in range(chance.randint(0, 4))]
        headers = chance.sample([*honest, *extra], len(honest) + len(extra))
        assert ask(LOCKED, "POST", headers=headers).is_reached
        at = chance.choice([index for index, (name, _) in enumerate(headers) if name in expected])
        name, value = headers[at]
        place = chance.randrange(len(value))
        byte = bytes([chance.choice([b for b in range(33, 256) if b not in (value[place], value[-1])])])
        before, after = value[:place], value[place + 1 :]
        changes = [before + byte + value[place:], before + byte + after, before + after, value + byte]
        changed = chance.choice(changes)
        if changed.lower() == value.lower():
            continue  # the case of Bearer and of the type is free; tested elsewhere where it is not
        headers[at] = (name, changed)
        ask(LOCKED, "POST", headers=headers).assert_refused(expected[name])


# --- 77: the port ------------------------------------------------------------------------------------------


def test_a_taken_port_names_its_process_and_leaves_it_alone(server: Server) -> None:
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        named = rf"port {server.port} on \S+ is taken by process {server.process.pid} \(python[^)]*\); end"
        with pytest.raises(MachineError, match=named):
            open_port(host, server.port, TOKEN)
    assert server.process.poll() is None
    assert server.ask("GET", "/").status == 200
    assert not [c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]


def test_a_port_is_taken_from_the_moment_it_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(bound_socket("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(MachineError, match=f"process {os.getpid()} "):
            bound_socket("127.0.0.1", port)

        def deny(**_: object) -> None:
            raise psutil.AccessDenied

        monkeypatch.setattr(network.psutil, "net_connections", deny)
        with pytest.raises(MachineError, match="a process that this user may not see"):
            bound_socket("127.0.0.1", port)
    with closing(bound_socket("127.0.0.1", port)) as again:
        assert again.getsockname() == ("127.0.0.1", port)
    with pytest.raises(UsageError, match="no address 192.0.2.1"):
        bound_socket("192.0.2.1", 8000)
