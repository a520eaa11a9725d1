"""`sparsebridge serve` as a second process, and a browser on it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

httpx = pytest.importorskip("httpx", reason="httpx is in the test extra")
pytest.importorskip("fastapi", reason="FastAPI is in the test extra")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium")


def start(home: Path, *words: str, stderr: object = subprocess.PIPE) -> subprocess.Popen:
    """`sparsebridge serve` in a folder with the recipes."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "bridges.cli", "serve", *words],
        cwd=home, env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=stderr, text=True,
    )  # fmt: skip


class Server:
    """One that answers, on a free port; what it says on stderr lies in a file."""

    def __init__(self, home: Path, *words: str):
        self.home, self.runs, self.log = home, home / "runs", home / "server.txt"
        with self.log.open("a") as log:
            self.process = start(home, "--port", "0", *words, stderr=log)
        self.link = self.process.stdout.readline().split()[-1]
        self.address = re.match(r"http://[^/]+", self.link)[0]
        self.port = int(self.address.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.address, timeout=120)

    def close(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=180)


def make_home(folder: Path) -> Path:
    """Where `serve` may be started: with the recipes, and no run."""
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "runs").mkdir()
    return folder


class Browser:
    """A page that nothing may be said on; SPARSEBRIDGE_PICTURES is a folder for pictures of it."""

    def __init__(self, address: str, **context: object):
        playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is in the test extra")
        self.driver = playwright.sync_playwright().start()
        browser = self.driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        self.page = browser.new_context(viewport={"width": 1100, "height": 900}, **context).new_page()
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(address)

    def picture(self, name: str) -> None:
        if "SPARSEBRIDGE_PICTURES" in os.environ:
            self.page.screenshot(path=Path(os.environ["SPARSEBRIDGE_PICTURES"]) / name, full_page=True)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.driver.stop()
        assert kind is not None or self.said == []
