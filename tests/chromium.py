"""A page in a real headless Chromium, driven through its DevTools protocol over two pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

INSTALL = "no Chromium here: `apt-get install chromium`"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REQUIRED = os.environ.get("REQUIRE_CHROMIUM") == "1"  # then a missing browser fails
needs_chromium = pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason=INSTALL)
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)


class Page:
    """One page. `messages`: what it wrote to the console, exceptions and refusals included; `requests`: what it asked
    the network for, but for data: and its own file."""

    def __init__(self, file: Path, profile: Path, size: tuple[int, int] = (1280, 900)) -> None:
        assert CHROMIUM is not None, INSTALL
        self.file, self.messages, self.requests, self._number = file, list[str](), list[str](), 0
        theirs, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        # The protocol wants descriptors 3 and 4.
        script = f'exec "$@" 3<&{theirs} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(theirs, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(theirs_out)
        self._received, self._session = os.fdopen(self._in, "rb"), ""

    def __enter__(self) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.load()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()
        self._received.close()
        os.close(self._out)

    def load(self) -> None:
        """(Re)load the file and wait for all of it."""
        self.call("Page.navigate", url=self.file.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get(
            "value"
        )

    def press(self, keys: Sequence[str]) -> None:
        """Press keys such as ArrowRight, Tab, Space."""
        for key in keys:
            code = {"ArrowRight": 39, "ArrowLeft": 37, "Tab": 9, "Space": 32}[key]
            of = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type="keyDown", **of, **({"text": " "} if key == "Space" else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **of)

    def screenshot(self) -> bytes:
        """PNG of what can be seen."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def _next(self) -> dict[str, Any]:
        """The next message; console output and requests are noted on the way."""
        raw = bytearray()
        while (byte := self._received.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            raw += byte
        message: dict[str, Any] = json.loads(raw)
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.messages.append(str(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(str(parameters["args"]))
        elif method == "Log.entryAdded":
            self.messages.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith("data:") and url != self.file.as_uri():
                self.requests.append(url)
        return message
