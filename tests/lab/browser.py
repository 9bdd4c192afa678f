"""A headless Chromium, driven through its own driver (W3C WebDriver), without any package.

    python tests/lab/browser.py look.html picture.png [STEP]

takes the README's picture of a page that `tinygpt look` wrote: at a step, 46 where none is named.
"""

import base64
import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

KEYS = {"ArrowLeft": "\ue012", "ArrowRight": "\ue014", "Shift": "\ue008", "End": "\ue010", "Home": "\ue011"}


class Browser:
    """A window. Use it as a context, which ends the browser."""

    is_here = shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("google-chrome"))

    def __init__(self, folder: Path, width: int = 1280, height: int = 900) -> None:
        """folder: for the browser's own files."""
        self._driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        line = next(line for line in self._driver.stdout if "on port" in line and "success" in line)
        self._address = f"http://127.0.0.1:{line.rstrip().rstrip('.').split()[-1]}/session"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                     f"--window-size={width},{height}", f"--user-data-dir={folder}"]  # fmt: skip
        wanted = {"goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            self._address += "/" + self._call("", capabilities={"alwaysMatch": wanted})["sessionId"]
        except BaseException:
            self._driver.kill()
            raise

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        try:
            self._call("", "DELETE")
        finally:
            self._driver.terminate()
            self._driver.wait()

    def _call(self, path: str, method: str = "POST", **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self._address + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path) -> None:
        self._call("/url", url=page.resolve().as_uri())

    def run(self, script: str, *arguments):
        """What a script returns."""
        return self._call("/execute/sync", script=script, args=arguments)

    def press(self, *keys: str) -> None:
        """Presses keys one after the other; those before the last stay down until the last is up."""
        down = [{"type": "keyDown", "value": KEYS[key]} for key in keys]
        up = [{"type": "keyUp", "value": KEYS[key]} for key in reversed(keys)]
        self._call("/actions", actions=[{"type": "key", "id": "keyboard", "actions": down + up}])

    def point(self, x: int, y: int) -> None:
        """Moves the pointer to a place in the window, in pixels."""
        move = {"type": "pointerMove", "x": x, "y": y, "duration": 0}
        self._call("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": [move]}])

    def is_phone(self, width: int, height: int, dark: bool = False) -> None:
        """From now on the window is this large, and a phone's."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
        self._call("/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": scheme})

    def errors(self) -> list[str]:
        """What the page has written to its console since the last call."""
        return [entry["message"] for entry in self._call("/se/log", type="browser")]

    def picture(self) -> bytes:
        """The window, as PNG."""
        return base64.b64decode(self._call("/screenshot", "GET"))


if __name__ == "__main__":
    import tempfile

    page, picture, *step = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder), 1200, 880) as browser:
        browser.open(Path(page))
        browser.run("go({ step: arguments[0] - 1 })", int(*step) if step else 46)
        Path(picture).write_bytes(browser.picture())
