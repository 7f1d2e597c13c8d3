"""A real browser without a screen, driven by its DevTools protocol over pipes."""

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEADLINE_S = 60.0


def found_browser() -> str | None:
    """Chromium's command; None: there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """Chromium with one page.

    Attributes:
        complaints: what the page's console and the browser had to say: errors, and what its policy forbade.
    """

    def __init__(self, command: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="browser-")
        self.complaints: list[str] = []
        # It reads from 3 and writes to 4.
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={self._folder.name}", "about:blank"]
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", command, *options],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._read, self._number, self._session = b"", 0, ""
        (target,) = [it for it in self.call("Target.getTargets")["targetInfos"] if it["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._out)
        try:
            self._process.wait(DEADLINE_S)
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            os.close(self._in)
            self._folder.cleanup()

    def call(self, method: str, **parameters: Any) -> Any:
        """Ask the browser, and wait for what it says."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next_message()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._listen(answer)

    def open(self, url: str) -> None:
        """Go to a page, and wait until its script has run."""
        self.call("Page.navigate", url=url)
        self.wait_for(f"document.readyState === 'complete' && location.href.startsWith({url!r})")

    def ask(self, script: str) -> Any:
        """What an expression of JavaScript gives, in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (script, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait_for(self, script: str, wanted: Callable[[Any], bool] = bool) -> Any:
        """Ask until the answer is as wanted."""
        end = time.monotonic() + DEADLINE_S
        while not wanted(answer := self.ask(script)):
            assert time.monotonic() < end, f"{script}: still {answer!r}; {self.complaints}"
            time.sleep(0.05)
        return answer

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key, as of a keyboard."""
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

    def screen(self, width: int, height: int, scheme: str = "light") -> None:
        """Size of the window, and "light" or "dark"."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _next_message(self) -> Any:
        while b"\0" not in self._read:
            piece = os.read(self._in, 2**16)
            assert piece, "the browser has ended"
            self._read += piece
        line, _, self._read = self._read.partition(b"\0")
        return json.loads(line)

    def _listen(self, event: Any) -> None:
        kind, parameters = event.get("method"), event.get("params", {})
        if kind == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.complaints.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        if kind in ("Runtime.exceptionThrown",) or (
            kind == "Runtime.consoleAPICalled" and parameters["type"] == "error"
        ):
            self.complaints.append(json.dumps(parameters))
