"""Chromium without a window, driven over the DevTools protocol: two pipes, no further package."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60.0  # seconds; a loaded machine is slow, a hang is longer


def find_chromium():
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def chromium(*, width=1280, height=900, flags=()):
    """A browser with one empty page."""
    program = find_chromium()
    if program is None:
        raise FileNotFoundError(f"needs a browser: none of {', '.join(NAMES)} is installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        to_read, our_write = os.pipe()
        our_read, to_write = os.pipe()
        # The protocol is spoken on the descriptors 3 and 4, which Python would close.
        command = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        words = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        words += ["--remote-debugging-pipe", f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        process = subprocess.Popen(
            ["/bin/bash", "-c", command, "bash", *words, *flags],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_read)
        os.close(to_write)
        with os.fdopen(our_write, "wb", buffering=0) as out, os.fdopen(our_read, "rb") as into:
            killer = threading.Timer(
                5 * PATIENCE, process.kill
            )  # a read from a dead pipe ends, a hang does not
            killer.start()
            try:
                yield Page(out, into)
            finally:
                killer.cancel()
                process.kill()
                process.wait()


class Page:
    """The one page of a browser."""

    def __init__(self, out, into):
        self._out, self._into, self._rest, self._count = out, into, b"", 0
        self._session = None
        self.problems = []  # exceptions and console errors of the page
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Calls a method of the protocol and waits for its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self):
        while b"\0" not in self._rest:
            piece = self._into.read1(1 << 20)
            if not piece:
                raise RuntimeError("the browser has ended")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        answer = json.loads(line)
        match answer.get("method"), answer.get("params"):
            case "Runtime.exceptionThrown", params:
                self.problems.append(params["exceptionDetails"].get("exception", {}).get("description"))
            case "Log.entryAdded", params if params["entry"]["level"] == "error":
                self.problems.append(params["entry"]["text"])
        return answer

    def open(self, url):
        """Opens an address, and waits until the page says that it is ready or cannot be shown."""
        self.call("Page.navigate", url=url)
        self.wait("performance.getEntriesByName('ready').length || document.querySelector('#alert p')")

    def run(self, script):
        """The value of an expression in the page; promises are waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description"))
        return answer["result"].get("value")

    def wait(self, script):
        """Waits until an expression is true; returns its value."""
        end = time.monotonic() + PATIENCE
        while not (
            value := self.run(f"(() => {{ const v = {script}; return v instanceof Node ? true : v }})()")
        ):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{script} never came true; alerts: {self.run('document.body.innerText')[:2000]}"
                )
            time.sleep(0.02)
        return value

    def text(self, selector="body"):
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector):
        """Clicks the middle of an element, as a hand would."""
        place = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
        )
        where = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **where)

    def key(self, name, text=None):
        """Presses a key."""
        text = name if text is None and len(name) == 1 else text
        typed = {"text": text} if text else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
