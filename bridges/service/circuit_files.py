"""Circuits' files as the service shows them: their heads alone, and of a large one its strongest edges.

A file begins with what was found of its circuit; nodes and edges, which may be millions, stand at its end. So
lists read heads alone, and a file that is too large for a browser is read a piece at a time.
"""

import heapq
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from extractor.errors import InputError

HEAD = 4 << 20  # characters within which nodes must begin
WHOLE = 4 << 20  # bytes up to which a file is sent as it is
NODES, EDGES = 5_000, 20_000  # shown of a larger one
PIECE = 1 << 20
NODES_BEGIN = '\n "nodes": ['  # as `Circuit.save` writes it: a string cannot hold a raw line break
NUMBER = r"-?[0-9]{1,30}(?:\.[0-9]{1,30})?(?:[eE][+-]?[0-9]{1,2})?"
EDGE = re.compile(rf'\[\s*"([^"\\]{{1,99}})",\s*"([^"\\]{{1,99}})",\s*({NUMBER})\s*\]')


def circuit_files(run: Path) -> list[Path]:
    """Every circuit of a run; none that lies elsewhere."""
    own = (path for path in (run / "circuits").glob("*.json") if path.resolve().is_relative_to(run.resolve()))
    return sorted(own)


def rows(run: Path) -> list[dict[str, Any]]:
    """Each circuit: `task`, how many `nodes` and `edges`, `loss`, `verdict`; or why it is `damaged`."""
    found = []
    for path in circuit_files(run):
        try:
            found.append(_row(path))
        except InputError as error:
            found.append({"task": path.stem, "damaged": str(error)})
    return found


def _row(path: Path) -> dict[str, Any]:
    own = head(path)
    evidence = own["evidence"]
    sizes = {name: evidence.get(name) for name in ("nodes", "edges")}
    if None in sizes.values() and path.stat().st_size <= WHOLE:
        whole = _parsed(path.read_text(encoding="utf-8"))
        sizes = {name: len(whole.get(name) or ()) for name in sizes}
    verdict = evidence.get("verdict")
    if verdict is not None and not (isinstance(verdict, dict) and isinstance(verdict.get("word"), str)):
        raise InputError("its verdict has no word")
    return {"task": path.stem, **sizes, "loss": evidence.get("loss"), "verdict": verdict}


def head(path: Path) -> dict[str, Any]:
    """A circuit's file without its nodes and edges.

    Raises:
        InputError: it is damaged; the message names no path.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        own = _head(file)[0]
    if not isinstance(own.get("evidence"), dict):
        raise InputError("it holds no evidence")
    return own


def _head(file: TextIO) -> tuple[dict[str, Any], str]:
    """What stands before the nodes, and what was read beyond."""
    text = file.read(HEAD)
    before, mark, rest = text.partition(NODES_BEGIN)
    if not mark and len(text) == HEAD:
        raise InputError("its nodes do not begin within 4 MB")
    return _parsed(before.removesuffix(",") + "}" if mark else text), rest


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError("it is not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError("it is no circuit")
    return value


def strongest(path: Path) -> dict[str, Any]:
    """A large circuit's file with its first nodes and its edges of the largest weights, and of how many.

    Raises:
        InputError: it is damaged, or its nodes alone are too many to be read.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        own, rest = _head(file)
        pieces = _pieces(file, rest)
        # Nodes end at the first bracket; what follows it are edges.
        names, _, first = next(pieces, "").partition("]")
        nodes = re.findall(r'"([^"\\]{1,99})"', names)
        count = 0

        def edges() -> Iterator[tuple[str, str, float]]:
            nonlocal count
            for piece in chain([first], pieces):
                for source, target, weight in EDGE.findall(piece):
                    count += 1
                    yield source, target, float(weight)

        largest = heapq.nlargest(EDGES, edges(), key=lambda edge: abs(edge[2]))
    shown = {"nodes": len(nodes[:NODES]), "of_nodes": len(nodes), "edges": len(largest), "of_edges": count}
    return {**own, "nodes": nodes[:NODES], "edges": largest, "shown": shown}


def _pieces(file: TextIO, rest: str) -> Iterator[str]:
    """The rest of a file in pieces that end with a bracket."""
    while True:
        cut = rest.rfind("]") + 1
        if cut:
            yield rest[:cut]
        rest = rest[cut:]
        if len(rest) > 16 * PIECE:
            raise InputError("it is too large to be shown")
        piece = file.read(PIECE)
        if not piece:
            return
        rest += piece
