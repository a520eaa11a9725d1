"""A job's output on its way to disk: secrets out, progress bars into progress.json, lines into log.txt."""

import contextlib
import re
import threading
import time
from pathlib import Path
from typing import IO, Any

from bridges.service.redact import Redactor
from extractor.artifacts import write_json

BAR = re.compile(
    r"(?:(?P<what>[^:%|]{1,60}):\s+)?\d+%\|[^|]*\|\s*(?P<done>[\d.]+)/(?P<total>[\d.]+)\s*"
    r"\[(?P<elapsed>[\d:]+)<(?P<left>[\d:?]+)(?:,\s*(?P<rest>[^\]]*))?\]"
)
EVERY = 0.5  # seconds between two writes of progress.json
LONGEST = 1 << 16  # bytes of a line


def parse_bar(text: str) -> dict[str, Any] | None:
    """What a tqdm bar says: what, done, total, elapsed, left (as it prints them), and its values."""
    found = BAR.search(text)
    if found is None:
        return None
    values = dict(
        part.split("=", 1) for part in (found["rest"] or "").replace(" ", "").split(",") if "=" in part
    )
    return {
        "what": (found["what"] or "").strip(),
        "done": float(found["done"]),
        "total": float(found["total"]),
        "elapsed": found["elapsed"],
        "left": found["left"],
        "values": {name[:40]: value[:40] for name, value in values.items()},
    }


class LogPump(threading.Thread):
    """Reads a pipe until it ends; with it the log is complete. What the disk does not take is dropped: a job
    whose pipe nobody reads would wait for ever."""

    def __init__(self, pipe: IO[bytes], log: Path, progress: Path, redactor: Redactor):
        super().__init__(daemon=True)
        self.pipe, self.log, self.progress = pipe, log, progress
        self.stream = redactor.stream()  # a key may span lines
        self.last_line = ""
        """The last words: why a job failed that left no reason of its own."""
        self._shown = 0.0
        self._file: IO[bytes] | None = None

    def run(self) -> None:
        pending = b""
        try:
            while chunk := self.pipe.read1(1 << 16):
                *whole, pending = (pending + self.stream.feed(chunk)).split(b"\n")
                for line in whole:
                    self._line(line)
                shown = pending.split(b"\r")[-2:]  # the last may be half a bar
                self._bar(shown)
                pending = b"\r".join(shown)
                if len(pending) > LONGEST:
                    self._line(pending)
                    pending = b""
            for line in filter(None, (pending + self.stream.flush()).split(b"\n")):
                self._line(line)
        except (ValueError, OSError):  # the pipe was closed
            return
        finally:
            if self._file is not None:
                self._file.close()

    def _line(self, line: bytes) -> None:
        shown = line.rstrip(b"\r").split(b"\r")[-2:]
        self._bar(shown, is_last=True)
        # What follows the last carriage return is what a terminal would show.
        text = shown[-1].decode("utf-8", "replace")
        with contextlib.suppress(OSError):
            if self._file is None:
                self._file = self.log.open("ab", buffering=0)
            self._file.write(text.encode() + b"\n")
        if text.strip():
            self.last_line = text.strip()[-500:]

    def _bar(self, shown: list[bytes], *, is_last: bool = False) -> None:
        now = time.monotonic()
        if not is_last and now - self._shown < EVERY:
            return
        with contextlib.suppress(OSError, ValueError):  # no room; a bar of numbers that are none
            bars = (parse_bar(text.decode("utf-8", "replace")) for text in reversed(shown))
            if (found := next(filter(None, bars), None)) is not None:
                self._shown = now
                write_json(self.progress, found)
