"""Pages in a headless Chromium without a network: what they complain of, what they ask for, and what is in them.

It is driven by the DevTools protocol through a pair of pipes, which needs no library.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0
"""Seconds for an answer of the browser."""

SWITCHES = (
    "--headless",
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--proxy-server=127.0.0.1:9",
    "--proxy-bypass-list=<-loopback>",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)
# The browser reads its orders from descriptor 3 and answers on 4, whatever the pipes' numbers are here.
START = """import fcntl, os, sys
read, write = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])"""


@dataclass
class Page:
    """A page that was opened.

    Attributes:
        messages: of the console, "level: text", those of level warning and error; uncaught exceptions are errors.
        requests: addresses that the page asked for, without itself and what it carries as `data:`.
        failures: "address: reason" of requests that failed.
    """

    browser: Browser
    session: str
    address: str
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _addresses: dict[str, str] = field(default_factory=dict)

    @property
    def complaints(self) -> list[str]:
        """All that a page which is whole and free of errors has none of."""
        self.browser.settle(self)
        return [*self.messages, *(f"asked for {address}" for address in self.requests), *self.failures]

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, as JSON carries it."""
        found = self.browser.call("Runtime.evaluate", self, expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise AssertionError(f"{script}: {found['exceptionDetails']['exception'].get('description')}")
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """PNG of the whole page."""
        found = self.browser.call("Page.captureScreenshot", self, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def take(self, method: str, event: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled" and event["type"] in ("warning", "error", "assert"):
            texts = (str(part.get("value", part.get("description"))) for part in event["args"])
            self.messages.append(f"{event['type']}: {' '.join(texts)}")
        elif method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.messages.append(f"error: {details.get('exception', {}).get('description', details['text'])}")
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("warning", "error"):
            self.messages.append(f"{event['entry']['level']}: {event['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            address = self._addresses[event["requestId"]] = event["request"]["url"]
            if address != self.address and not address.startswith("data:"):
                self.requests.append(address)
        elif method == "Network.loadingFailed":
            reason = event.get("blockedReason") or event["errorText"]
            self.failures.append(f"{self._addresses.get(event['requestId'], '?')}: {reason}")


class Browser:
    """A running Chromium; made by `launch`."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._pages: dict[str, Page] = {}
        self._loaded: set[str] = set()

    def open(self, path: Path, width: int = 1200, height: int = 900) -> Page:
        """Opens a file, and returns once it and all it refers to have been loaded or have failed."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, path.resolve().as_uri())
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", page)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", page, **size)
        self.call("Page.navigate", page, url=page.address)
        deadline = time.monotonic() + PATIENCE
        while session not in self._loaded:
            self._receive(deadline)
        self.settle(page)
        return page

    def settle(self, page: Page) -> None:
        """Returns once what the page had to do by now is done and told."""
        waiting = "new Promise(done => setTimeout(done, 50))"
        self.call("Runtime.evaluate", page, expression=waiting, awaitPromise=True)

    def call(self, method: str, page: Page | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if page is not None:
            message["sessionId"] = page.session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._reading, 1 << 20) if ready else b""
            if not part:
                raise TimeoutError(f"the browser {'has gone' if ready else f'did not answer in {PATIENCE:.0f} s'}")
            self._buffer += part
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(raw)
        session = message.get("sessionId")
        if "method" in message and session in self._pages:
            self._pages[session].take(message["method"], message["params"])
            if message["method"] == "Page.loadEventFired":
                self._loaded.add(session)
        return message


@contextmanager
def launch() -> Iterator[Browser]:
    """A browser that reaches no network; the test is skipped where none is installed."""
    program = next((found for found in map(shutil.which, NAMES) if found), None)
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    orders, write_orders = os.pipe()
    read_answers, answers = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(orders), str(answers), program, *SWITCHES, f"--user-data-dir={profile}"],
            pass_fds=(orders, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(orders)
        os.close(answers)
        try:
            browser = Browser(read_answers, write_orders)
            yield browser
            # It may be gone before it has answered.
            with suppress(TimeoutError):
                browser.call("Browser.close")
            process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()
            os.close(read_answers)
            os.close(write_orders)
