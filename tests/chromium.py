"""A headless Chromium for the pages that this package writes, and a server of files for it to visit."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 120.0  # seconds; a machine that runs other tests is slow


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A selenium driver; the test is skipped where there is no Chromium.

    profile  an empty folder
    """
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in programs:
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    try:
        yield driver
    finally:
        driver.quit()


def wait_for(driver: Any, condition: str) -> None:
    """Until a JavaScript expression is true."""
    end = time.monotonic() + PATIENCE
    while not driver.execute_script(f"return Boolean({condition})"):
        if time.monotonic() > end:
            shown = driver.execute_script("return document.body.innerText")
            raise TimeoutError(f"{condition} did not come true; the page shows:\n{shown}")
        time.sleep(0.05)


def requested(driver: Any) -> list[str]:
    """Addresses of web pages' requests since the last call; the browser's own pages are left out."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [each["params"] for each in events if each["method"] == "Network.requestWillBeSent"]
    return [each["request"]["url"] for each in asked if not each["documentURL"].startswith("chrome:")]


class FileServer:
    """A plain server of one folder on the loopback address: no headers of its own, as `python -m http.server`.

    asked  the paths of all requests so far
    """

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        handler = functools.partial(_Handler, self.asked, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.origin = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, asked: list[str], *arguments: Any, **named: Any) -> None:
        self._asked = asked
        super().__init__(*arguments, **named)

    def log_message(self, format: str, *arguments: Any) -> None:
        self._asked.append(self.path)
