"""Open a standalone page in headless Chromium, without a server; see what went wrong in it and what an
accessibility check finds.

    def test_view(pages):                          # the fixture is in conftest.py
        page = pages.open(html, theme="dark")      # HTML text, or the Path of a file; also
                                                   # forced_colors=True, reduced_motion=False
        page.locator("button").click()             # a Playwright page, loaded and 1280 x 1000
        frame = pages.framed(html)                 # the same in <iframe sandbox="allow-scripts" srcdoc=...>
        assert pages.violations(page) == pages.violations(frame) == []
        pages.assert_clean()                       # no console error, uncaught exception or dialog, nothing
                                                   # loaded from outside the page

What was seen since the last `clear()`: `console`, texts of errors; `outside`, addresses (also other files: a
standalone page needs none). `python tests/lab/pageharness.py [PAGE.html ...]` fetches axe-core and checks
pages from a shell.
"""

import contextlib
import hashlib
import html
import socketserver
import sys
import tempfile
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the use from a shell
import outside
from lab.labharness import chromium

# of its package/axe.min.js
AXE_SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"
RUN_AXE = """() => axe.run(document, {resultTypes: ['violations'], runOnly: {type: 'tag', values:
    ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22a', 'wcag22aa', 'best-practice']}}).then(result => result.violations)"""  # noqa: E501
FRAME = """<!DOCTYPE html><html lang="en"><title>frame</title><body style="margin: 0">
<iframe title="view" sandbox="allow-scripts" style="border: 0; width: 100vw; height: 100vh" srcdoc="{}"></iframe>"""  # noqa: E501
SERIOUS = ("serious", "critical")


def axe_source():
    """The text of axe-core, fetched from npm once into the cache of tests/outside.py. Raises NotFetched, and
    ValueError if it is another text."""
    path = outside.fetch("axe") / "package" / "axe.min.js"
    text = path.read_bytes()
    if hashlib.sha256(text).hexdigest() != AXE_SHA256:
        raise ValueError(f"{path} is not that of {outside.NPM['axe']}: remove {outside.CACHE / 'axe'}")
    return text.decode()


def readable(violation):
    "One of axe's violations as text: rule, impact, kind, then where, at most five times."
    kind = "best practice" if "best-practice" in violation["tags"] else "WCAG"
    where = [
        f"\n    {' '.join(map(str, node['target']))}: {node['html'][:300]}" for node in violation["nodes"]
    ]
    more = f"\n    and {len(where) - 5} more" if len(where) > 5 else ""
    return (
        f"{violation['id']} ({violation['impact']}, {kind}): {violation['help']}" + "".join(where[:5]) + more
    )


class Refusal(socketserver.StreamRequestHandler):
    """A proxy's answer to everything: no. It keeps what was asked for; Playwright itself misses what a
    sandboxed frame loads at its start."""

    timeout = 5

    def handle(self):
        with contextlib.suppress(OSError):
            words = self.rfile.readline(65536).decode("latin-1").split()
            if len(words) > 1:
                self.server.asked.append(words[1])
            self.wfile.write(b"HTTP/1.1 502 Refused\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


class Pages:
    """Standalone pages, each with a browser profile of its own, and what went wrong in them. A context
    manager."""

    def __init__(self):
        self.console, self.outside, self.contexts, self.stack = [], [], [], contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as stack:  # undone here if anything below fails
            self.browser = stack.enter_context(chromium())
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cbnb-pages-")))
            self.proxy = stack.enter_context(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refusal))
            self.proxy.daemon_threads, self.proxy.asked = True, self.outside
            threading.Thread(
                target=self.proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
            ).start()
            stack.callback(self.proxy.shutdown)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        for context in self.contexts:
            context.close()
        self.stack.close()

    def open(self, page, theme="light", forced_colors=False, reduced_motion=True):
        """Show `page`, HTML text or the Path of a file, in a new profile; returns the Playwright page once it
        is loaded."""
        path = page if isinstance(page, Path) else self.folder / f"page{len(self.contexts)}.html"
        if path != page:
            path.write_text(page, encoding="utf-8")
        address = path.resolve().as_uri()
        context = self.browser.new_context(
            viewport={"width": 1280, "height": 1000},
            color_scheme=theme,
            forced_colors="active" if forced_colors else "none",
            reduced_motion="reduce" if reduced_motion else "no-preference",
            proxy={"server": f"http://127.0.0.1:{self.proxy.server_address[1]}"},
        )
        self.contexts.append(context)
        context.on(
            "console", lambda message: self.console.append(message.text) if message.type == "error" else None
        )
        context.on("weberror", lambda error: self.console.append(str(error.error)))
        context.on("dialog", self.dismiss)
        context.on("request", lambda request: self.note(request.url, address))
        shown = context.new_page()
        shown.goto(address)
        return shown

    def framed(self, text, **settings):
        """Show the HTML `text` as a notebook would, in a frame that may run scripts and nothing else; returns
        the Playwright frame."""
        return self.open(FRAME.format(html.escape(text)), **settings).frames[1]

    def dismiss(self, dialog):
        self.console.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    def note(self, url, own):
        if url.split("#")[0] != own and not url.startswith(("data:", "blob:", "about:")):
            self.outside.append(url)

    def clear(self):
        self.settle()
        self.console.clear(), self.outside.clear()

    def settle(self, seconds=0.2):
        "Let the open pages do what they have begun, and hear of it."
        for page in [p for c in self.contexts for p in c.pages]:
            page.wait_for_timeout(1000 * seconds)

    def assert_clean(self):
        self.settle()
        assert not self.console, f"errors in the page: {self.console[:10]}"
        assert not self.outside, f"requests out of the page: {sorted(set(self.outside))[:10]}"

    def violations(self, page, impacts=SERIOUS):
        """What axe-core finds in a page or frame against WCAG 2.2 A and AA and its own best practices, as
        texts; by default the grave only."""
        try:
            source = axe_source()
        except outside.NotFetched:
            pytest.skip(
                f"{outside.NPM['axe']} could not be fetched; with npm and its registry in reach run: python "
                "tests/lab/pageharness.py"
            )
        page.evaluate(source + "\n;0")
        return [readable(v) for v in page.evaluate(RUN_AXE) if v["impact"] in impacts]


if __name__ == "__main__":
    axe_source()
    with Pages() as pages:
        for name in sys.argv[1:]:
            found = [
                v
                for theme in ("light", "dark")
                for v in pages.violations(pages.open(Path(name), theme=theme))
            ]
            print(f"{name}: {len(found)} serious violations", *found, sep="\n  ")
        pages.assert_clean()
