"""Where the service listens, for whom, and with which token: all settled before it answers anyone.

Loopback needs no token; every other address does. A token comes from a file or the environment, never from
the command line, which every user of the machine can read.
"""

import errno
import ipaddress
import os
import re
import secrets
import socket
import stat
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from bridges.service.guard import SHORTEST_TOKEN, GuardSettings
from extractor.errors import MachineError, UsageError

TOKEN_VARIABLE = "SPARSEBRIDGE_TOKEN"
BACKLOG = 128
# A name, an IPv4 address or an IPv6 address in brackets, as browsers write them.
LISTED = re.compile(r"(?:(https?)://)?([a-z0-9](?:[a-z0-9._-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")


def open_port(
    host: str, port: int, token: str | None = None, allowed_hosts: Sequence[str] = ()
) -> tuple[socket.socket, GuardSettings]:
    """Checks, then a listening socket for `uvicorn.Server.serve(sockets=[...])`, and what it answers to.

    The host's name is looked up once: what was checked is what is bound. Port 0 takes a free one.

    Raises:
        UsageError: as `bind_settings`.
        MachineError: as `bound_socket`.
    """
    address = address_of(host)
    names = [*allowed_hosts, *([] if _is_address(host) else [host])]
    bind_settings(address, port or 1, token, names)
    bound = bound_socket(address, port)
    return bound, bind_settings(address, bound.getsockname()[1], token, names)


def bind_settings(
    host: str, port: int, token: str | None = None, allowed_hosts: Sequence[str] = ()
) -> GuardSettings:
    """What a server on this address answers to: loopback names, the address, what the operator lists.

    An allowed host is NAME (with this port), NAME:PORT, or http(s)://NAME[:PORT] as browsers see it behind a
    proxy.

    Raises:
        UsageError: an address other than loopback without a token, a token that is too short, or a host, port
            or allowed host that is none.
    """
    address = address_of(host)
    if not 1 <= port <= 65535:
        raise UsageError(f"port {port}: it is 1 to 65535")
    if token is None and not _is_loopback(address):
        raise UsageError(
            f"host '{_shown(host)}' can be reached from other machines: that needs a token of at least "
            f"{SHORTEST_TOKEN} characters, from a file or {TOKEN_VARIABLE}; or use 127.0.0.1 and ssh -L"
        )
    own = [] if ipaddress.ip_address(address).is_unspecified else [_origin("http", _bracketed(address), port)]
    loopback = [_origin("http", name, port) for name in ("127.0.0.1", "localhost", "[::1]")]
    listed = [_listed(name, port) for name in allowed_hosts]
    # A server for other machines shows a name that they can use.
    first = own if own else listed
    origins = tuple(dict.fromkeys([*first, *loopback, *listed]))
    return GuardSettings(origins, token, cookie=f"sparsebridge_{port}")


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that listens on this port and no other.

    It listens at once: until then Linux would let a second server bind the same port. Nothing is answered
    before a server takes it over.

    Raises:
        MachineError: the port is taken (which process, where this user may know), or must not be used.
        UsageError: no such address on this machine.
    """
    address = address_of(host)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or a restart waits for old connections
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((address, port))
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise MachineError(
                f"port {port} on {address} is taken by {_holder(address, port)}; end it or take another port"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UsageError(f"host '{_shown(host)}': this machine has no address {address}") from None
        raise MachineError(f"port {port} on {address} cannot be used ({error.strerror})") from None
    return bound


def address_of(host: str) -> str:
    """The address that a name stands for; of several, one that other machines can reach.

    Raises UsageError for a name that there is none of.
    """
    try:
        found = socket.getaddrinfo(host or None, None, type=socket.SOCK_STREAM) if host else []
    except (OSError, UnicodeError):
        found = []
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses:
        raise UsageError(
            f"host '{_shown(host)}' is no address or known name; 127.0.0.1 is this machine alone"
        )
    return min(addresses, key=lambda address: (_is_loopback(address), ":" in address))


def find_token(file: Path | None, environ: MutableMapping[str, str]) -> str | None:
    """The token of a file, else of SPARSEBRIDGE_TOKEN; else None. The variable goes: no job inherits it.

    Raises UsageError where it is too short, the file cannot be read, or others may read it.
    """
    inherited = environ.pop(TOKEN_VARIABLE, None)
    if file is None:
        return None if inherited is None else _checked(inherited.strip())
    try:
        with file.open(encoding="ascii") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            token = stream.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII"
        raise UsageError(f"token file '{file}' cannot be read ({reason})") from None
    if mode & 0o077:
        raise UsageError(f"token file '{file}' can be read by others (mode {mode:03o}): chmod 600 it")
    return _checked(token)


def make_token(file: Path) -> str:
    """A new token, written to a file that only this user can read.

    Raises MachineError where the file is there already or cannot be written.
    """
    token = secrets.token_urlsafe(32)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise MachineError(f"token file '{file}' cannot be made ({error.strerror})") from None
    with os.fdopen(handle, "w", encoding="ascii") as stream:
        stream.write(token + "\n")
    return token


def _checked(token: str) -> str:
    return replace(GuardSettings(()), token=token).token or ""


def _listed(text: str, port: int) -> str:
    found = LISTED.fullmatch(text.lower())
    if not found or (found[3] and not 1 <= int(found[3]) <= 65535):
        raise UsageError(
            f"allowed host '{_shown(text)}': NAME, NAME:PORT or https://NAME, without a path; * is no name"
        )
    scheme, name, own_port = found[1], found[2], found[3]
    default = {"http": 80, "https": 443}.get(scheme or "", port)
    return _origin(scheme or "http", name, int(own_port or default))


def _origin(scheme: str, name: str, port: int) -> str:
    """As browsers write it: they leave a scheme's own port out."""
    return f"{scheme}://{name}" + (f":{port}" if port != {"http": 80, "https": 443}[scheme] else "")


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _shown(text: str) -> str:
    """What was typed, on one line."""
    return ascii(text)[1:-1][:80]


def _holder(address: str, port: int) -> str:
    """Which process listens there, as far as this user may know."""
    unknown = "a process that this user may not see"
    wildcards = {"0.0.0.0", "::"}
    try:
        pids = {
            connection.pid
            for connection in psutil.net_connections(kind="tcp")
            if connection.status == psutil.CONN_LISTEN
            and connection.laddr.port == port
            and (connection.laddr.ip in wildcards | {address} or address in wildcards)
        }
        names = [f"process {pid} ({psutil.Process(pid).name()})" for pid in sorted(pids - {None})]
    except psutil.Error:
        return unknown
    return " and ".join(names) or unknown
