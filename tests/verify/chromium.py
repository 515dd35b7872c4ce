"""Headless Chromium, spoken to over two pipes (DevTools protocol): no driver, no port."""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


class Chromium:
    """One tab. What the browser writes to its console as an error is in `errors`."""

    def __init__(self, profile, *options):
        ours, theirs = [], []
        for end in (0, 1):  # what it reads, what it writes
            pipe = os.pipe()
            theirs.append(fcntl.fcntl(pipe[end], fcntl.F_DUPFD, 10))
            ours.append(pipe[1 - end])
            os.close(pipe[end])

        def connect():
            os.dup2(theirs[0], 3)
            os.dup2(theirs[1], 4)

        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                   "--disable-dev-shm-usage", "--remote-debugging-pipe", "--lang=en",
                   f"--user-data-dir={profile}", *options, "about:blank"]  # fmt: skip
        self.process = subprocess.Popen(
            command, preexec_fn=connect, close_fds=False, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in theirs:
            os.close(fd)
        self._write, self._read = ours
        self._numbers, self._waiting, self.errors, self.session = itertools.count(1), b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        os.close(self._write)
        os.close(self._read)

    def call(self, method, **params):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + 60
        while True:
            while b"\0" in self._waiting:
                line, self._waiting = self._waiting.split(b"\0", 1)
                found = json.loads(line)
                if found.get("id") == number:
                    assert "error" not in found, found
                    return found["result"]
                if found.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                    self.errors.append(json.dumps(found["params"]))
            left = until - time.monotonic()
            assert left > 0, f"{method}: no answer"
            if select.select([self._read], [], [], left)[0]:
                self._waiting += os.read(self._read, 1 << 20)

    def run(self, script):
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                          returnByValue=True, userGesture=True)  # fmt: skip
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, address):
        self.call("Page.navigate", url=address)

    def wait_for(self, script, seconds=40):
        """Until an expression is true."""
        until = time.monotonic() + seconds
        tried = f"(() => {{ try {{ return !!({script}) }} catch {{ return false }} }})()"
        while not self.run(tried):
            shown = self.run("document.body ? document.body.innerText : ''")
            assert time.monotonic() < until, f"{script} never was so; {shown}; {self.errors}"
            time.sleep(0.05)

    def choose(self, selector, file):
        """A file into an input."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({selector!r})")
        self.call("DOM.setFileInputFiles", files=[str(file)],
                  objectId=found["result"]["objectId"])  # fmt: skip

    def picture(self, file, width=760, height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "light"}])  # fmt: skip
        found = self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(found["data"]))
