"""Headless Chromium for tests, spoken to through two pipes (the Chrome DevTools Protocol): no driver, no port.

Commands and answers are JSON, each ended by a zero byte: chromium reads from its descriptor 3 and writes to 4.
Source: chromedevtools.github.io/devtools-protocol, and chromium's --remote-debugging-pipe.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
PHONE, LAPTOP = (390, 844), (1366, 900)  # CSS pixels


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. Use as a context: the process ends with it."""

    def __init__(self, path: str, *more_flags: str, timeout: float = 60):
        self.timeout = timeout
        self.events: list[dict] = []
        self._count = 0
        self._waiting = b""
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def connect() -> None:
            # Above both: a descriptor that is copied onto itself would be closed at exec.
            a, b = (os.dup2(fd, 20 + fd) for fd in (to_browser, from_browser))
            os.dup2(a, 3)
            os.dup2(b, 4)

        flags = ["--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += ["--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={self._profile.name}"]
        flags += more_flags
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([path, *flags], preexec_fn=connect, close_fds=False, **quiet)
        for fd in (to_browser, from_browser):
            os.close(fd)
        self._session: str | None = None
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def do(self, method: str, **params) -> dict:
        """Send a command and wait for its answer; events that come meanwhile are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict:
        end = time.monotonic() + self.timeout
        while b"\0" not in self._waiting:
            ready, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            assert data, "chromium gives no answer"
            self._waiting += data
        message, _, self._waiting = self._waiting.partition(b"\0")
        return json.loads(message)

    def wait_for(self, event: str) -> dict:
        while not any(found.get("method") == event for found in self.events):
            self.events.append(self._next())
        return next(found for found in self.events if found.get("method") == event)

    def screen(self, size: tuple[int, int], dark: bool = False) -> None:
        phone = size == PHONE
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> float:
        """Load a page, without what was loaded before; returns the seconds that it took."""
        self.events.clear()
        self.do("Page.navigate", url="about:blank")
        self.wait_for("Page.loadEventFired")
        self.events.clear()
        start = time.monotonic()
        self.do("Page.navigate", url=address)
        self.wait_for("Page.loadEventFired")
        return time.monotonic() - start

    def run(self, script: str):
        """The value of a JavaScript expression, as plain data; promises are waited for."""
        done = self.do("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of the element, which has to be visible there."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{found}.scrollIntoView({{block: 'center'}})")
        box = f"(b => [b.x + b.width / 2, b.y + b.height / 2])({found}.getBoundingClientRect())"
        x, y = self.run(box)
        hit = f"document.elementFromPoint({x}, {y})"
        assert self.run(f"{found}.contains({hit}) || (({hit}) !== null && ({hit}).contains({found}))"), (
            f"{selector} is hidden"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13, "ArrowLeft": 37}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def complaints(self) -> list[dict]:
        """Errors and warnings of the console, and exceptions, since the page was opened."""
        self.run("new Promise(done => setTimeout(done, 50))")
        bad = ("Runtime.exceptionThrown", "Log.entryAdded")
        console = "Runtime.consoleAPICalled"
        return [
            e
            for e in self.events
            if e.get("method") in bad or (e.get("method") == console and e["params"]["type"] in ("error", "warning"))
        ]

    def requests(self) -> list[str]:
        """Addresses that the page has asked for, itself included."""
        found = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [address for address in found if not address.startswith("data:")]

    def screenshot(self, path: Path, whole: bool = False) -> None:
        clip = {}
        if whole:
            size = self.do("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
        shot = self.do("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **clip)
        path.write_bytes(base64.b64decode(shot["data"]))
