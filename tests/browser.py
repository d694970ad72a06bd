"""Headless Chromium, driven over the WebDriver protocol: plain JSON over HTTP, so no package is needed beside it."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

#: Keys that type no character.
KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015"}
#: Every element of a page, through the roots that components hide their parts in.
_ALL = """
const found = [], walk = root => root.querySelectorAll('*').forEach(element => {
  found.push(element);
  if (element.shadowRoot) walk(element.shadowRoot);
});
walk(document);
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(what: str, ready: Callable[[], Any], seconds: float = 120) -> Any:
    """The first result of `ready` that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if found := ready():
                return found
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds:g} seconds")


class Browser:
    """A window of Chromium."""

    def __init__(self, url: str, session: str) -> None:
        self._session = f"{url}/session/{session}"

    def go(self, url: str) -> None:
        _ask(f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a script returns."""
        return _ask(f"{self._session}/execute/sync", {"script": script, "args": []})

    def text(self) -> str:
        """All words of the page."""
        shown = "found.filter(e => !['STYLE', 'SCRIPT'].includes(e.tagName))"
        words = f"{shown}.flatMap(e => [...e.childNodes]).filter(n => n.nodeType == 3).map(n => n.data.trim())"
        return "\n".join(line for line in self.run(f"{_ALL} return {words}") if line)

    def images(self) -> list[dict[str, Any]]:
        """src, width, height of the pictures that are loaded, in their own pixels."""
        size = "({src: e.src, width: e.naturalWidth, height: e.naturalHeight})"
        return self.run(f"{_ALL} return found.filter(e => e.tagName == 'IMG' && e.naturalWidth).map(e => {size})")

    def press(self, keys: str, seconds: float = 0.05) -> None:
        """Strokes of keys one after the other, each held so long; special keys in WebDriver's code points (`KEYS`)."""
        moves: list[dict[str, Any]] = []
        for key in keys:
            moves += [{"type": "keyDown", "value": key}, {"type": "pause", "duration": int(1000 * seconds)}]
            moves += [{"type": "keyUp", "value": key}]
        _ask(f"{self._session}/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": moves}]})

    def screenshot(self, path: Path) -> None:
        """Once lines and pictures have moved to their places."""
        time.sleep(3)
        path.write_bytes(base64.b64decode(_ask(f"{self._session}/screenshot")))


@contextlib.contextmanager
def open_browser(width: int = 1600, height: int = 1500) -> Iterator[Browser]:
    """Chromium and its driver, as Debian's packages chromium and chromium-driver install them."""
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver; apt-get install chromium chromium-driver")
    port = free_port()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    options.append(f"--window-size={width},{height}")
    wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": {"args": options}}}}
    with subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for("the driver", lambda: _ask(f"{url}/status")["ready"])
            session = _ask(f"{url}/session", wanted)["sessionId"]
            try:
                yield Browser(url, session)
            finally:
                urllib.request.urlopen(urllib.request.Request(f"{url}/session/{session}", method="DELETE"), timeout=60)
        finally:
            process.terminate()


def _ask(url: str, values: dict[str, Any] | None = None) -> Any:
    """GET, or POST with values; what came back."""
    data = None if values is None else json.dumps(values).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())["value"]
