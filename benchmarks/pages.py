"""Open pages of sparlow in headless Chromium, on a desk and on a phone, light and dark: no error, nothing overflows.

    python benchmarks/pages.py run/report.html compared/compare.html --out pictures

Prints a line a page and form; writes a picture of each to --out. Needs a browser (apt-get install chromium), and
nothing else: it is spoken to over a pipe. Exit code 1 if anything is wrong with a page.
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = {1280: 900, 390: 844}  # and heights, in pixels
SCHEMES = ("light", "dark")
WIDER = """[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg") &&
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .slice(0, 3).map(e => e.tagName + "." + e.className + ": " + e.textContent.slice(0, 40))"""
CLIPPED = """[...document.querySelectorAll("svg[role=img]")].flatMap(s => { const box = s.getBoundingClientRect();
  return [...s.querySelectorAll("text")].filter(t => { const b = t.getBoundingClientRect();
    return b.right > box.right + 2 || b.left < box.left - 2 || b.bottom > box.bottom + 2 || b.top < box.top - 2; })
  .map(t => s.getAttribute("aria-label") + ": " + t.textContent); }).slice(0, 5)"""


@dataclass(frozen=True)
class Seen:
    """How a page looks in one form.

    Attributes:
        errors: What the console said.
        wider: Elements that reach beyond the window.
        clipped: Texts of charts that reach beyond their picture.
        scrolls: Pixels by which the page is wider than the window.
        picture: PNG.
    """

    errors: list[str]
    wider: list[str]
    clipped: list[str]
    scrolls: int
    picture: bytes

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, a sentence each."""
        found = [f"The console says: {error}" for error in self.errors]
        found += [f"Reaches beyond the window: {one}" for one in self.wider]
        found += [f"Reaches beyond its picture: {one}" for one in self.clipped]
        return found + ([f"The page is {self.scrolls} pixels wider than the window."] if self.scrolls > 0 else [])


def browser() -> str | None:
    """Return the program, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """A browser that is spoken to over a pipe, by its own protocol: JSON, ended by a zero byte."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers = os.fdopen(requests, "wb", 0), os.fdopen(answers, "rb", 0)
        self._number, self._left, self.events = 0, b"", list[dict[str, Any]]()

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        """Send a request, and return its answer; what else comes in between is kept in ``events``."""
        self._number += 1
        said: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session:
            said["sessionId"] = session
        self._requests.write(json.dumps(said).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']['message']}")
                return dict(found["result"])
            self.events.append(found)

    def until(self, method: str) -> None:
        """Wait for an event."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            more = self._answers.read(1 << 20)
            if not more:
                raise RuntimeError("The browser ended.")
            self._left += more
        one, _, self._left = self._left.partition(b"\0")
        return dict(json.loads(one))

    def look(self, page: Path, width: int, height: int, scheme: str) -> Seen:
        """Open a page in a window of its own."""
        self.events = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", session, **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", session, media="screen", features=features)
        self.ask("Page.navigate", session, url=page.resolve().as_uri())
        self.until("Page.loadEventFired")
        root = "document.documentElement"
        scrolls = self._value(session, f"{root}.scrollWidth - {root}.clientWidth")
        wider, clipped = self._value(session, WIDER), self._value(session, CLIPPED)
        shot = self.ask("Page.captureScreenshot", session, format="png", captureBeyondViewport=True)
        self.ask("Target.closeTarget", targetId=target)
        return Seen(self._errors(), wider, clipped, scrolls, base64.b64decode(shot["data"]))

    def _value(self, session: str, expression: str) -> Any:  # noqa: ANN401 - whatever the page computes
        found = self.ask("Runtime.evaluate", session, expression=expression, returnByValue=True)
        return found["result"]["value"]

    def _errors(self) -> list[str]:
        said = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                said.append(params["exceptionDetails"]["text"])
            elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                said.append(params["entry"]["text"])
            elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                said.append(str(params["args"]))
        return said


@contextmanager
def opened(program: str) -> Iterator[Chromium]:
    """Start a browser with a profile of its own; end it."""
    read, write = os.pipe()
    back, answer = os.pipe()

    def wire() -> None:
        """Put the pipes where the browser looks for them; the numbers may be each other's."""
        first, second = os.dup(read), os.dup(answer)
        os.dup2(first, 3)
        os.dup2(second, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        process = subprocess.Popen(  # noqa: S603 - the browser that was found
            [program, *flags, "--disable-background-networking", f"--user-data-dir={profile}", "about:blank"],
            close_fds=False,
            preexec_fn=wire,  # noqa: PLW1509 - no thread is there yet
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(answer)
        try:
            yield Chromium(write, back)
        finally:
            process.terminate()
            process.wait()


def look_at(program: str, pages: Sequence[Path]) -> Iterator[tuple[Path, int, str, Seen]]:
    """Open every page in every form."""
    with opened(program) as chromium:
        for page in pages:
            for width, height in WIDTHS.items():
                for scheme in SCHEMES:
                    yield page, width, scheme, chromium.look(page, width, height, scheme)


def main() -> None:
    """Print what is wrong, and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="directory for the pictures")
    given = parser.parse_args()
    program = browser()
    if program is None:
        sys.exit(f"There is no browser. Install one of {', '.join(NAMES)}.")
    missing = [page for page in given.pages if not page.is_file()]
    if missing:
        sys.exit(f"There is no page {missing[0]}.")
    wrong = 0
    for page, width, scheme, seen in look_at(program, given.pages):
        print(f"{page}, {width} pixels, {scheme}: {'; '.join(seen.problems) or 'good'}", flush=True)
        wrong += bool(seen.problems)
        if given.out:
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / f"{page.parent.name}-{page.stem}-{width}-{scheme}.png").write_bytes(seen.picture)
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    main()
