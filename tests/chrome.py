"""Drives headless Chromium over the DevTools protocol, for end-to-end tests."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from websockets.sync.client import connect

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0",
]  # fmt: skip
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowDown": 40, "1": 49, "2": 50, "3": 51}
"""Key codes by name; a key whose name is one character also types it."""


class PageError(AssertionError):
    """Raised if the page throws, or does not reach an expected state in time."""


class Chrome:
    """Runs one browser with one page. Selectors are CSS; times are seconds.

    `problems` collects errors that the page logged, policy violations and failed loads included;
    `requests` collects every address that it requested.
    """

    def __init__(self, binary: str = "chromium"):
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._sent = 0
        self._loaded = False
        self._profile = tempfile.TemporaryDirectory(prefix="chrome-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [binary, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._socket = connect(
                self._page_address(),
                max_size=None,
                compression=None,
                open_timeout=60,
                ping_interval=None,  # a busy browser may answer late
            )
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.command(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops the browser and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._profile.cleanup()

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends one protocol command and returns its result. Raises PageError if it is refused."""
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._sent:
                if "error" in message:
                    raise PageError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._note(message)

    def open(self, url: str, timeout: float = 120) -> None:
        """Opens an address and waits until it has loaded."""
        self._loaded = False
        if error := self.command("Page.navigate", url=url).get("errorText"):
            raise PageError(f"{url}: {error}")
        # The event of the first, empty page may come late.
        complete = "location.href !== 'about:blank' && document.readyState === 'complete'"
        self._until(lambda: self._loaded and self.eval(complete), f"{url} to load", timeout)

    def eval(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression, awaiting it if it is a promise."""
        answer = self.command(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def wait(self, expression: str, timeout: float = 120) -> None:
        """Waits until a JavaScript expression is true."""
        self._until(lambda: self.eval(f"Boolean({expression})") is True, expression, timeout)

    def text(self, selector: str) -> str:
        return str(self.eval(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """Clicks the middle of an element. Raises PageError if something covers it."""
        point = self.eval(
            f"""(() => {{
              const node = document.querySelector({json.dumps(selector)});
              node.scrollIntoView({{block: 'nearest', behavior: 'instant'}});
              const box = node.getBoundingClientRect();
              const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
              return node.contains(document.elementFromPoint(x, y)) ? [x, y] : null;
            }})()"""
        )
        if point is None:
            raise PageError(f"{selector} cannot be clicked: it is hidden or something covers it")
        for kind in ("mousePressed", "mouseReleased"):
            self.command(
                "Input.dispatchMouseEvent",
                type=kind, x=point[0], y=point[1], button="left", clickCount=1,
            )  # fmt: skip

    def type(self, selector: str, text: str) -> None:
        """Replaces the content of a field with text."""
        self.eval(
            f"(() => {{ const field = document.querySelector({json.dumps(selector)});"
            " field.focus(); field.select(); })()"
        )
        self.command("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """Presses one of KEYS in the focused element."""
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        common = {"key": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        self.command("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.command("Input.dispatchKeyEvent", type="keyUp", **common)

    def choose(self, selector: str, value: str) -> None:
        """Sets a select, slider or number field, and fires its input and change events."""
        self.eval(
            f"(() => {{ const field = document.querySelector({json.dumps(selector)});"
            f" field.value = {json.dumps(value)};"
            " field.dispatchEvent(new Event('input', {bubbles: true}));"
            " field.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def emulate(
        self, width: int = 1280, height: int = 800, dark: bool = False, calm: bool = False
    ) -> None:
        """Sets window size and user preferences; a width under 600 px emulates a phone."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.command(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
                {"name": "prefers-reduced-motion", "value": "reduce" if calm else "no-preference"},
            ],
        )

    def downloads_to(self, folder: Path) -> None:
        self.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def screenshot(self, path: Path) -> None:
        """Saves a screenshot of the window as PNG."""
        image = self.command("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(image))

    def _note(self, message: dict[str, Any]) -> None:
        """Records an event that tests may check."""
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.problems.append(details.get("exception", {}).get("description", ""))
            case "Runtime.consoleAPICalled" if params["type"] == "error":
                self.problems.append(" ".join(str(a.get("value")) for a in params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                entry = params["entry"]
                self.problems.append(f"{entry['text']} {entry.get('url', '')}".strip())

    def _until(self, done: Callable[[], bool], what: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            # One more look after a pause of this process
            if time.monotonic() > deadline and not done():
                raise PageError(f"waited {timeout} s for {what}; problems: {self.problems}")
            time.sleep(0.05)
            self.command("Runtime.evaluate", expression="0")  # receives pending events

    def _page_address(self) -> str:
        """Returns the page's socket address; Chromium writes its port to the profile once ready."""
        written = Path(self._profile.name) / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise PageError(f"the browser exited with code {self._process.returncode}")
            if written.exists() and (lines := written.read_text().splitlines()):
                with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                    pages = [t for t in json.load(answer) if t["type"] == "page"]
                if pages:
                    return str(pages[0]["webSocketDebuggerUrl"])
            time.sleep(0.1)
        raise PageError("the browser did not come up in 60 s")
