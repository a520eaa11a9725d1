"""Secrets taken out of text before it is written: known by their shape, a name before them, the environment.

Each pattern is linear in the text: what stands before a start fixes it, and no run is tried twice. A line of
any length and content costs milliseconds.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple
from urllib.parse import quote

REDACTED = "[redacted]"
SHORTEST_VALUE = 8  # characters of an environment variable; shorter ones stand in ordinary text
SHORTEST_LINE = 16  # characters of one line of a value that has several
LONGEST_LINE = 1 << 16  # bytes that wait for their line's end
HELD = 8192  # characters of a longer line that still wait: more than a key has, which must not be cut in two
LONGEST_BLOCK = 500  # lines of a private key

_START = r"(?<![A-Za-z0-9_-])"
# Neither a word that is no secret nor a secret that was taken out before.
_REAL = r"(?!\[redacted\])(?!(?i:none|null|true|false|str|bytes|int|bool|optional)\b)"
_KEY_CHARACTER = r"[A-Za-z0-9._~+/=-]"
_NUMBER = (
    rf"[-+]?\d[\d.,_/:-]*(?:[eE][-+]?\d+)?(?:[A-Za-z%]{{1,2}}(?:/[A-Za-z]{{1,6}})?)?(?!{_KEY_CHARACTER})"
)
# What may be a key after a name with everyday meanings here (token): letters with digits, or one long word.
_KEYLIKE = (
    rf"(?!{_NUMBER})(?:(?=[A-Za-z._~+/=-]{{0,128}}\d){_KEY_CHARACTER}{{8,}}|[A-Za-z+=~-]{{16,}}+(?![._/]))"
)
_NAME = (
    r"(?i:pass(?:word|wd|phrase)|secret|credentials?"
    r"|(?:api|access|secret|private|account|signing|encryption)[_-]?key"
    r"|(?:access|auth|refresh|session|security|client)[_-]?token)"
)
_IS = r"""\\?["']?[ \t]{0,4}(?:=>|:=|==|[:=])[ \t]{0,4}"""
_QUOTED = r"(?:(?!(?P=quote))(?:\\[^\r\n]|[^\\\r\n]))+"
_VALUE = rf"""(?P<quote>\\?["'])?{_REAL}(?P<secret>(?(quote){_QUOTED}|[^\s"'&<>]{{3,}}))"""
_OPTION = r"(?<![\w-])--[\w-]{0,64}?"

# Where a pattern has a group `secret`, that is taken out, else the whole match.
PATTERNS: dict[str, re.Pattern[str]] = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "private key": (
            r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
            r"(?:(?:[A-Za-z0-9+/=\s,:]|\\[nr]|-(?!----))*+-----END [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
            r"|(?:[A-Za-z0-9+/=]{60,}|\\[nr]|[\r\n])*+)"
        ),
        "hub token": rf"{_START}(?:hf|api_org)_[A-Za-z0-9]{{20,}}",
        "GitHub token": rf"{_START}(?:gh[pousr]_[A-Za-z0-9]{{20,}}|github_pat_[A-Za-z0-9_]{{20,}})",
        "GitLab token": rf"{_START}glpat-[A-Za-z0-9_-]{{16,}}",
        "API key": rf"{_START}sk-(?=[A-Za-z_-]{{0,128}}\d)[A-Za-z0-9_-]{{20,}}",
        "AWS key": r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
        "Slack token": rf"{_START}(?:xox[a-z]|xapp)-[A-Za-z0-9-]{{10,}}",
        "Google key": rf"{_START}(?:AIza[A-Za-z0-9_-]{{30,}}|ya29\.[A-Za-z0-9_-]{{20,}})",
        "JSON web token": rf"{_START}(?:hf_oauth_)?eyJ[\w-]{{8,}}+\.[\w-]{{8,}}+(?:\.[\w-]*)?",
        "authorization header": (
            rf"(?i:authorization){_IS}[\"']?(?:(?i:basic|bearer|digest|token|negotiate|apikey)[ \t]{{1,4}})?+"
            rf"{_REAL}(?P<secret>[^\s\"',]{{4,}})"
        ),
        "bearer header": rf"(?i:\bbearer)[ \t]{{1,4}}{_REAL}(?P<secret>{_KEYLIKE})",
        "URL user": rf"(?<=://){_REAL}(?P<secret>[^\s/?#@:\"'<>]*:[^\s/@\"'<>]*)@",
        "URL user without password": rf"(?:(?<=http://)|(?<=https://)){_REAL}(?P<secret>[^\s/?#@:\"'<>]+)@",
        "URL signature": (
            r"[?&;](?i:once|token|sig|signature|x-(?:amz|goog)-(?:signature|credential|security-token))="
            rf"{_REAL}(?P<secret>[^\s&\"'<>]{{4,}})"
        ),
        "assignment": rf"{_NAME}{_IS}{_VALUE}",
        "token assignment": rf"(?i:token){_IS}\\?[\"']?{_REAL}(?P<secret>{_KEYLIKE})",
        "option": rf"{_OPTION}{_NAME}\s{{1,2}}(?!-){_VALUE}",
        "token option": rf"{_OPTION}(?i:token)\s{{1,2}}[\"']?{_REAL}(?P<secret>{_KEYLIKE})",
    }.items()
}

SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS|PWD|CREDENTIALS?|APIKEY|PAT|AUTH|COOKIE)\d*(?:_|$)"
    r"|(?:API|ACCESS|SECRET|PRIVATE|SIGNING|ENCRYPTION|ACCOUNT|SSH)_?KEY"
)
ORDINARY_VARIABLE = re.compile(r"^PWD$|_(?:FILE|PATH|DIR|HOST|PORT|ID|NAME|TYPE|COUNT|LIMIT|TTL|TIMEOUT)$")
PASSWORD_IN_URL = re.compile(r"://[^\s/?#@:]*:([^\s/@]+)@")

BLOCK_BEGINS = re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
BLOCK_ENDS = re.compile(r"-----END [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
BLOCK_LINE = re.compile(r"\s*(?:[A-Za-z0-9+/=]{1,80}|[A-Za-z-]{1,40}: .*|-----END [A-Z ]{0,60}-----.*|)\s*")
LINE = re.compile(r"[^\r\n]*(?:\r\n|[\r\n])|[^\r\n]+")


class Hit(NamedTuple):
    """A secret at text[start:end], known by what begins at `context`."""

    start: int
    end: int
    context: int
    kind: str


class Redactor:
    """Knows what secrets look like, and the ones of an environment. Has no state: jobs may share one."""

    def __init__(self, environ: Mapping[str, str]):
        self._patterns = dict(PATTERNS)
        values = {form for value in secret_values(environ) for form in _forms(value)}
        if values:
            longest_first = sorted(values, key=lambda value: (-len(value), value))
            self._patterns["environment variable"] = re.compile("|".join(map(re.escape, longest_first)))

    def redact(self, text: str) -> str:
        """Every secret becomes `[redacted]`; all else stays as it is."""
        parts, done = [], 0
        for start, end in _merged(self.hits(text)):
            parts += [text[done:start], REDACTED]
            done = end
        return "".join([*parts, text[done:]])

    def find_secrets(self, text: str) -> list[str]:
        """The kind of every secret, in the order of the text."""
        return [hit.kind for hit in self.hits(text)]

    def hits(self, text: str) -> list[Hit]:
        """Ordered; two patterns may know the same secret."""
        found = []
        for kind, pattern in self._patterns.items():
            group = "secret" if "secret" in pattern.groupindex else 0
            found += [Hit(*match.span(group), match.start(), kind) for match in pattern.finditer(text)]
        return sorted(found)

    def stream(self) -> "RedactedStream":
        """For the output of one process."""
        return RedactedStream(self)


class RedactedStream:
    """Bytes in as they come, bytes out by whole lines: no secret is missed where two reads cut it in two.

    A line ends in \\n or \\r. Of one that is too long to wait for, all but its end is given out.
    """

    def __init__(self, redactor: Redactor):
        self._redactor = redactor
        self._pending = bytearray()
        self._block_lines = 0

    def feed(self, data: bytes) -> bytes:
        """What can be written by now."""
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        end += len(self._pending) if end else 0
        self._pending += data
        if not end and len(self._pending) > LONGEST_LINE:
            end = self._safe_cut()
        whole = bytes(self._pending[:end])
        del self._pending[:end]
        return self._redacted(whole)

    def flush(self) -> bytes:
        """The rest: at the end of the stream."""
        rest = bytes(self._pending)
        self._pending.clear()
        return self._redacted(rest)

    def _redacted(self, data: bytes) -> bytes:
        text = _decoded(data)
        if self._block_lines or BLOCK_BEGINS.search(text):
            text = "".join(self._without_blocks(LINE.findall(text)))
        return self._redactor.redact(text).encode("utf-8", "surrogateescape")

    def _without_blocks(self, lines: Iterable[str]) -> Iterator[str]:
        """Private keys go over many lines, which may come one by one."""
        for line in lines:
            if 0 < self._block_lines < LONGEST_BLOCK and BLOCK_LINE.fullmatch(line):
                self._block_lines = 0 if BLOCK_ENDS.search(line) else self._block_lines + 1
                continue
            self._block_lines = 0
            begin = BLOCK_BEGINS.search(line)
            if begin and not BLOCK_ENDS.search(line, begin.end()):
                self._block_lines = 1
                line = line[: begin.start()] + REDACTED + line[len(line.rstrip("\r\n")) :]
            yield line

    def _safe_cut(self) -> int:
        """Bytes of the pending line that can go: no secret reaches over the cut."""
        text = _decoded(self._pending)
        cut = max(len(text) - HELD, 0)
        for hit in reversed(self._redactor.hits(text)):
            if hit.context < cut < hit.end:
                cut = hit.context
        # A secret without an end would be kept for ever.
        cut = cut or len(text)
        return len(text[:cut].encode("utf-8", "surrogateescape"))


def redact(text: str) -> str:
    """Text without secrets, by their shape and names alone."""
    return _PLAIN.redact(text)


def secret_values(environ: Mapping[str, str]) -> set[str]:
    """Values of variables whose names say that they hold a secret, and passwords in URLs of any variable."""
    values: set[str] = set()
    for name, value in environ.items():
        name = name.upper()
        is_secret = SECRET_VARIABLE.search(name) and not ORDINARY_VARIABLE.search(name)
        if is_secret and not (value.startswith("/") and os.path.exists(value)):
            values.add(value.strip())
            lines = [line.strip() for line in value.splitlines()]
            values |= {line for line in lines if len(line) >= SHORTEST_LINE}
        values |= set(PASSWORD_IN_URL.findall(value))
    return {value for value in values if len(value) >= SHORTEST_VALUE}


def _forms(value: str) -> set[str]:
    """As it may stand in a log: plain, in a URL, in JSON, in a Python text."""
    escaped = {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]}
    return {
        value,
        quote(value, safe="", errors="surrogatepass"),
        quote(value, errors="surrogatepass"),
    } | escaped


def _merged(hits: Iterable[Hit]) -> Iterator[tuple[int, int]]:
    """Spans that do not overlap, of hits in order."""
    start = end = -1
    for hit in hits:
        if hit.start > end or end < 0:
            if end >= 0:
                yield start, end
            start, end = hit.start, hit.end
        else:
            end = max(end, hit.end)
    if end >= 0:
        yield start, end


def _decoded(data: bytes | bytearray) -> str:
    return data.decode("utf-8", "surrogateescape")


_PLAIN = Redactor({})
