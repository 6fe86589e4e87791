"""A headless Chromium for tests: DevTools' protocol over a pipe, no driver and no package.

with Browser() as browser:
    page = browser.open(path)
    page.value("document.title")
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
)
PATIENCE = 120.0  # seconds that the browser may take for an answer before the test fails


class Browser:
    """A browser process with a profile of its own, gone at the end of the `with` block."""

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None
        self.profile = tempfile.mkdtemp()
        (theirs_in, self.write), (self.read, theirs_out) = os.pipe(), os.pipe()
        # The browser reads commands from descriptor 3 and answers on 4; copies from 10 on cannot be in the way.
        ours = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]
        actions: list[Any] = [(os.POSIX_SPAWN_DUP2, ours[0], 3), (os.POSIX_SPAWN_DUP2, ours[1], 4)]
        actions += [(os.POSIX_SPAWN_OPEN, end, os.devnull, os.O_WRONLY, 0) for end in (1, 2)]
        flags = [*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={self.profile}"]
        # A group of its own: the wrapper that is started and all its children end together.
        self.pid = os.posix_spawn(CHROMIUM, [CHROMIUM, *flags], os.environ, file_actions=actions, setpgroup=0)
        for end in (theirs_in, theirs_out, *ours):
            os.close(end)
        self.number, self.rest, self.events = 0, b"", []  # type: int, bytes, list[dict[str, Any]]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.read)
        os.close(self.write)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command and its answer; what happens meanwhile is kept in `events`."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        os.write(self.write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.read, 1 << 16)
            assert part, "the browser has gone"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, *, size: tuple[int, int] = (1400, 900), dark: bool = False, hash: str = "") -> Page:
        """A page in a tab of its own, once it says that it is ready."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Runtime", "Log", "Page", "Network"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=path.resolve().as_uri() + hash)
        page.wait("document.documentElement?.dataset.ready === 'yes'")
        return page


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is, as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, met: Callable[[Any], bool] = bool) -> Any:
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE
        while not met(found := self.value(expression)):
            assert time.monotonic() < end, f"still not: {expression}; {self.complaints()}"
            time.sleep(0.02)
        return found

    def point(self, selector: str) -> tuple[float, float]:
        """The middle of the first element that a selector finds, scrolled into view."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.value(f"{element}.getBoundingClientRect().toJSON()")
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def hover(self, selector: str, dx: float = 0, dy: float = 0) -> None:
        """Move the pointer to the middle of an element, or so far from it."""
        x, y = self.point(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + dx, y=y + dy)

    def click(self, selector: str, dx: float = 0, dy: float = 0) -> None:
        """Hover, press and release."""
        self.hover(selector, dx, dy)
        x, y = self.point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x + dx, y=y + dy, button="left", clickCount=1)

    def key(self, name: str, shift: bool = False) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, modifiers=8 if shift else 0)

    def complaints(self) -> list[Any]:
        """Errors and warnings of the tab so far: exceptions, console messages, refusals by its policy."""
        told = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        own = [event for event in self.browser.events if event.get("sessionId") == self.session]
        return [event["params"] for event in own if event["method"] in told]

    def requests(self) -> list[str]:
        """The addresses that the tab has asked for."""
        own = [event for event in self.browser.events if event.get("sessionId") == self.session]
        return [e["params"]["request"]["url"] for e in own if e["method"] == "Network.requestWillBeSent"]

    def picture(self, path: Path, whole: bool = False) -> Path:
        """A screenshot as PNG: of what is in view, or of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path
