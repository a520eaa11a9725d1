"""`sparsebridge link`: one more one-time link of a server that runs, for another browser."""

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from bridges.drawing import visible
from bridges.service.guard import LINKS
from bridges.service.network import find_token
from extractor.errors import MachineError, UsageError

SECONDS = 30.0  # for the server to answer


def link(arguments: argparse.Namespace) -> int:
    """Print the link.

    Raises:
        UsageError: no http address, or a token that is not the server's.
        MachineError: no server of ours answers there.
    """
    token = find_token(arguments.token_file, os.environ)
    sys.stdout.write(f"{ask_link(arguments.server, token)}\n")
    return 0


def ask_link(server: str, token: str | None) -> str:
    """Raises as `link`."""
    if urlsplit(server).scheme not in ("http", "https"):
        raise UsageError(f"server {server!r}: an address as the server printed it, http://127.0.0.1:8765")
    request = urllib.request.Request(
        server.rstrip("/") + LINKS, b"{}", {"Content-Type": "application/json"}, method="POST"
    )
    if token:  # to this server alone: after no redirect, through no proxy
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=SECONDS) as answer:
            return visible(json.load(answer)["link"])
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise UsageError(
                f"server {server!r} wants its token: give --token_file FILE, or SPARSEBRIDGE_TOKEN"
            ) from None
        raise MachineError(
            f"server {server!r} answered {error.code}: is it `sparsebridge serve`, under a name of its own?"
        ) from None
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        why = getattr(error, "reason", None) or type(error).__name__
        raise MachineError(
            f"no sparsebridge answers at {server!r} ({why}); start `sparsebridge serve`, or give --server"
        ) from None
