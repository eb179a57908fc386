"""A real browser for tests: Debian's Chromium without a window, spoken to through two pipes.

`--remote-debugging-pipe` takes commands of the DevTools protocol on descriptor 3 and answers on 4, JSON between zero
bytes: no port, no library. `evaluate` runs with the page's own rules (CSP) in place.
"""

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.requirements import require_tool

LIMIT_SECONDS = 60.0


class Page:
    """One page in the browser; `requests` lists every address that it asked for."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._unread, self._number = commands, answers, b"", 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{domain}.enable", self._session)

    def open(self, address: str) -> None:
        """Load the address and wait until everything in it is loaded."""
        self._call("Page.navigate", self._session, url=address)
        deadline = time.monotonic() + LIMIT_SECONDS
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.href") != address:
            assert time.monotonic() < deadline, f"{address} did not load"
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        found = self._call("Runtime.evaluate", self._session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, width: int, height: int) -> bytes:
        """Return a PNG of what a window of that size shows."""
        self.size(width, height)
        time.sleep(1.0)  # Charts are drawn again in their new size.
        found = self._call("Page.captureScreenshot", self._session, format="png")
        return base64.b64decode(found["data"])

    def press(self, key: str, code: int) -> None:
        """Press and release a key that has no letter, by its name and Windows' number for it ("ArrowRight", 39)."""
        for kind in ("rawKeyDown", "keyUp"):
            self._call(
                "Input.dispatchKeyEvent",
                self._session,
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
            )

    def size(self, width: int, height: int) -> None:
        """Give the page a window of that many pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            self._session,
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        os.write(
            self._commands, json.dumps(command | ({"sessionId": session} if session else {})).encode() + b"\0"
        )
        while True:
            message = self._next()
            if message.get("id") == self._number:
                assert "error" not in message, (method, message)
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif event.get("method") == "Log.entryAdded":
            self.complaints.append(parameters["entry"]["text"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._answers], [], [], LIMIT_SECONDS)[0], "the browser does not answer"
            received = os.read(self._answers, 1 << 20)
            assert received, "the browser ended"
            self._unread += received
        message, _, self._unread = self._unread.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def browser_page(profile: Path) -> Iterator[Page]:
    """Yield an empty page in a fresh browser with its profile in `profile`; without Chromium the test is left out."""
    chromium = require_tool("chromium")
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()

    def take_the_pipes() -> None:
        # By way of high numbers: one of the pipes may have the number 3 or 4 already.
        os.dup2(to_browser, 103)
        os.dup2(from_browser, 104)
        os.dup2(103, 3)
        os.dup2(104, 4)

    process = subprocess.Popen(
        [
            *(str(chromium), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--remote-debugging-pipe", f"--user-data-dir={profile}"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=take_the_pipes,
        close_fds=False,
        start_new_session=True,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Page(commands, answers)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait(LIMIT_SECONDS)
        os.close(commands)
        os.close(answers)
