"""What every request passes before the service sees it: who may ask, from where, how, and how much.

Host      400   another name than the server's own: DNS rebinding
origin    403   another site's page, a sandboxed frame, another port of this machine
method    405   other than GET and HEAD, which read, or POST, PUT, PATCH, DELETE; OPTIONS permits nothing
token     401   where one is set: as a bearer header, or as the cookie that a one-time link gave; a cookie
                makes no further link
type      403   a change that is no application/json: what a form of another site can send
body      413   too long, by its header or by count; 400 where JSON nests too deeply
"""

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from extractor.errors import UsageError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

READING = ("GET", "HEAD")
CHANGING = ("POST", "PUT", "PATCH", "DELETE")
SHORTEST_TOKEN = 32  # characters
LINK_SECONDS = 600.0
LINKS = "/api/v1/links"
NO_WEBSOCKETS = "no websockets here; events come as a stream over GET"
JSON_TYPE = re.compile(rb'application/json(?:[ \t]*;[ \t]*charset="?utf-8"?)?', re.IGNORECASE)
ONCE = re.compile(rb"(?:^|&)once=([A-Za-z0-9_-]{1,128})(?:&|$)")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# A string that never ends reaches to the end of the text: no start is tried twice.
STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]+|\\.)*+"?|[\[\]{}]', re.DOTALL)

CONTENT_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    b"form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS: dict[bytes, bytes] = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


class Sessions:
    """One-time codes, and the cookies that they were changed into; both only as digests, in memory.

    A session lives as long as the server. `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._codes: dict[bytes, float] = {}
        self._sessions: set[bytes] = set()

    def new_code(self) -> str:
        """Good once, for ten minutes."""
        now = self._clock()
        self._codes = {code: end for code, end in self._codes.items() if now < end}
        code = secrets.token_urlsafe(32)
        self._codes[_digest(code)] = now + LINK_SECONDS
        return code

    def redeem(self, code: str) -> str | None:
        """The session that a code stands for; None where it was used, is too old or never was."""
        end = self._codes.pop(_digest(code), None)
        if end is None or self._clock() >= end:
            return None
        session = secrets.token_urlsafe(32)
        self._sessions.add(_digest(session))
        return session

    def holds(self, session: str) -> bool:
        return _digest(session) in self._sessions


@dataclass(frozen=True)
class GuardSettings:
    """What one server answers to. Raises UsageError for a token that is too short or no header can carry."""

    origins: tuple[str, ...]
    """As a browser writes them: http://127.0.0.1:8000; the first is the one to show."""
    token: str | None = field(default=None, repr=False)
    cookie: str = "sparsebridge"
    """Browsers give all ports of a host the same cookies: the port belongs into the name."""
    body_limit: int = 256 * 1024
    """Bytes."""
    json_depth: int = 50
    sessions: Sessions = field(default_factory=Sessions, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.token is None:
            return
        if len(self.token) < SHORTEST_TOKEN or not TOKEN.fullmatch(self.token):
            raise UsageError(
                f"token: at least {SHORTEST_TOKEN} characters, of letters, digits and . _ ~ + / = - only"
            )

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(origin.partition("://")[2] for origin in self.origins))

    def link(self) -> str:
        """Where a browser starts: with a token set, a link that works once, for ten minutes."""
        return self.origins[0] + (f"/?once={self.sessions.new_code()}" if self.token else "/")


class Absent(LookupError):
    """There is nothing of that name here, or nothing that may be seen."""


class Refusal(Exception):
    """A request that is not passed on."""

    def __init__(self, status: int, message: str, *headers: Header):
        super().__init__(message)
        self.status, self.headers = status, headers


class Guard:
    """ASGI middleware, to stand outermost: around the app's own error pages too."""

    def __init__(self, app: App, *, settings: GuardSettings):
        self.app, self.settings = app, settings
        self._hosts = {host.encode("latin-1") for host in settings.hosts}
        self._origins = {origin.encode("latin-1") for origin in settings.origins}
        self._token = _digest(settings.token) if settings.token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._refuse_websocket(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, _Headed(send))
        else:
            raise ValueError("only http is served")

    async def _answer(self, scope: Scope, receive: Receive, send: "_Headed") -> None:
        try:
            code = self._take_code(scope)
            self._check_source(scope)
            if scope["method"] not in READING + CHANGING:
                allowed = ", ".join(READING + CHANGING)
                raise Refusal(405, f"allowed: {allowed}", (b"allow", allowed.encode()))
            if code is not None and scope["method"] == "GET" and scope["path"] == "/":
                return await self._redeem(scope, code, send)
            self._check_token(scope)
            receive = await self._checked_body(scope, receive)
        except Refusal as refusal:
            return await _refuse(refusal, send)
        try:
            await self.app(scope, receive, send)
        except Exception:
            if not send.is_started:
                await _refuse(Refusal(500, "the service failed; its log says why"), send)
            raise

    def _take_code(self, scope: Scope) -> str | None:
        """The one-time code of a request; codes and tokens leave the scope in place: the log reads it too."""
        query = scope.get("query_string", b"")
        is_token_in_it = bool(self.settings.token) and self.settings.token in unquote(query.decode("latin-1"))
        if b"once=" not in query and not is_token_in_it:
            return None
        scope["query_string"] = b""
        found = ONCE.search(query)
        return found[1].decode() if found else None

    def _check_source(self, scope: Scope) -> None:
        """The names a request gives: of this server, and of the page that it comes from."""
        host = _values(scope, b"host")
        if len(host) != 1 or host[0] not in self._hosts:
            raise Refusal(400, f"this server answers to {', '.join(self.settings.hosts)} only")
        origin = _values(scope, b"origin")
        # One port cannot speak for another: the page's own host, not any of the list.
        if origin and (
            len(origin) != 1 or origin[0] not in self._origins or origin[0].partition(b"://")[2] != host[0]
        ):
            raise Refusal(403, "only this server's own pages may ask")
        site = _values(scope, b"sec-fetch-site")
        if site and site not in ([b"same-origin"], [b"none"]):
            raise Refusal(
                403, "only this server's own pages may ask; type its address instead of following a link"
            )
        if any(b"websocket" in value.lower() for value in _values(scope, b"upgrade")):
            raise Refusal(403, NO_WEBSOCKETS)
        if not scope["path"].startswith("/") or CONTROL.search(scope["path"]):
            raise Refusal(400, "a path starts with / and has no control characters")

    def _check_token(self, scope: Scope) -> None:
        """One answer whatever is wrong: absent, malformed, of another length, or nearly right."""
        # A browser that was let in lets no other in: that is the token's alone.
        is_known = self._has_token(scope) if scope["path"] == LINKS else self._is_known(scope)
        if not is_known:
            raise Refusal(
                401, "a token is needed: open the link that the server gave, or send it as a bearer header",
                (b"www-authenticate", b"Bearer"),
            )  # fmt: skip

    def _is_known(self, scope: Scope) -> bool:
        is_token = self._has_token(scope)
        is_session = any(
            self.settings.sessions.holds(value) for value in _cookies(scope, self.settings.cookie)
        )
        return is_token or is_session

    def _has_token(self, scope: Scope) -> bool:
        if self._token is None:
            return True
        given = _values(scope, b"authorization")
        bearer = given[0] if len(given) == 1 else b""
        scheme, _, token = bearer.partition(b" ")
        # Digests: a comparison of two texts would tell their lengths.
        is_token = hmac.compare_digest(_digest(token.decode("latin-1")), self._token)
        return is_token and scheme.lower() == b"bearer"

    async def _redeem(self, scope: Scope, code: str, send: Send) -> None:
        """A one-time link becomes a cookie; a browser that has one already is only sent on."""
        headers: list[Header] = [(b"location", b"/"), (b"content-length", b"0")]
        if not self._is_known(scope):
            session = self.settings.sessions.redeem(code)
            if session is None:
                return self._check_token(scope)  # raises, with the answer of every other wrong token
            host = _values(scope, b"host")[0]
            flags = "Path=/; HttpOnly; SameSite=Strict" + "; Secure" * (
                b"http://" + host not in self._origins
            )
            headers.append((b"set-cookie", f"{self.settings.cookie}={session}; {flags}".encode()))
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def _checked_body(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` whose body is whole, short and shallow. GET and HEAD have none."""
        limit = self.settings.body_limit
        lengths = [int(value) if value.isdigit() else -1 for value in _values(scope, b"content-length")]
        if any(length > limit for length in lengths):
            raise Refusal(413, f"a body has at most {limit} bytes")
        if scope["method"] in READING:
            if any(lengths) or _values(scope, b"transfer-encoding"):
                raise Refusal(400, f"{' and '.join(READING)} take no body")
            return receive
        content_type = _values(scope, b"content-type")
        if len(content_type) != 1 or not JSON_TYPE.fullmatch(content_type[0]):
            raise Refusal(403, "a change is sent with content-type application/json, in UTF-8")
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise Refusal(400, "the body ended early")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                raise Refusal(413, f"a body has at most {limit} bytes")
        _check_json(bytes(body), self.settings.json_depth)
        return _replayed(bytes(body), receive)

    async def _refuse_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._take_code(scope)
        refusal = Refusal(403, NO_WEBSOCKETS)
        try:
            self._check_source(scope)
        except Refusal as earlier:
            refusal = earlier
        await receive()
        if "websocket.http.response" in (scope.get("extensions") or {}):
            await _refuse(refusal, _Headed(send, prefix="websocket."))
        else:
            await send({"type": "websocket.close", "code": 1008})


class _Headed:
    """A `send` that puts the headers of every answer on, and takes permissions for other sites off."""

    def __init__(self, send: Send, prefix: str = ""):
        self._send, self._prefix, self.is_started = send, prefix, False

    async def __call__(self, message: Message) -> None:
        message = dict(message) | {"type": self._prefix + message["type"]}
        if message["type"].endswith("http.response.start"):
            self.is_started = True
            headers = [
                (name.lower(), value)
                for name, value in message.get("headers", ())
                if name.lower() not in HEADERS and not name.lower().startswith(b"access-control-")
            ]
            if all(name != b"content-security-policy" for name, _ in headers):
                headers.append((b"content-security-policy", CONTENT_POLICY))
            message["headers"] = [*headers, *HEADERS.items()]
        await self._send(message)


async def _refuse(refusal: Refusal, send: Send) -> None:
    """One line of JSON. The connection ends with it: what the client is still sending is not read."""
    body = json.dumps({"error": str(refusal)}).encode() + b"\n"
    headers = [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"), *refusal.headers,
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value.strip(b" \t") for key, value in scope["headers"] if key.lower() == name]


def _cookies(scope: Scope, name: str) -> Iterator[str]:
    """Every value under a name: another port of this host may have set one beside ours."""
    for header in _values(scope, b"cookie"):
        for pair in header.decode("latin-1").split(";"):
            key, _, value = pair.strip().partition("=")
            if key == name:
                yield value


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _check_json(body: bytes, depth: int) -> None:
    """Raises Refusal where a parser would recurse deeply or guess an encoding. It need not be valid JSON."""
    with suppress(UnicodeDecodeError):
        body.decode("utf-8")
        if b"\0" not in body:
            return _check_depth(body, depth)
    raise Refusal(400, "a body is JSON in UTF-8")


def _check_depth(body: bytes, depth: int) -> None:
    level = 0
    for found in STRING_OR_BRACKET.finditer(body):
        if found[0] in b"[{":
            level += 1
        elif found[0] in b"]}":
            level -= 1
        if level > depth:
            raise Refusal(400, f"JSON nests at most {depth} deep")


def _replayed(body: bytes, receive: Receive) -> Receive:
    is_read = False

    async def replay() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def is_id(text: str) -> bool:
    """A plain name: what a client may call a run, a job or a file by."""
    return ID.fullmatch(text) is not None


def contained(root: Path, *parts: str) -> Path:
    """The real path of a file or folder below a root, each part a plain name.

    Raises:
        Absent: a part is no plain name, nothing is there, it leads out of the root, or it is no file.
    """
    with suppress(OSError):
        if all(is_id(part) for part in parts):
            real_root = Path(os.path.realpath(root, strict=True))
            real = Path(os.path.realpath(root.joinpath(*parts), strict=True))
            if real.is_relative_to(real_root) and (real.is_file() or real.is_dir()):
                return real
    raise Absent("there is nothing of that name")
