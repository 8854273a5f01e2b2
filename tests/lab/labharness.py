"""Open a notebook in a real JupyterLab in headless Chromium, run it, poke it, look at it.

    with Lab("nbs") as lab:
        nb = lab.open("train.ipynb")
        nb.run_all(timeout=120)                    # CellError on any error output, unrendered widget or
                                                   # JavaScript error
        nb.page.locator(".token-strip").click()
        nb.shot("train.png")
        lab.assert_offline()                       # no request left this machine

`python tests/lab/labharness.py FOLDER NOTEBOOK [SHOT.png]` does the same from a shell.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

CHROMIUM = (
    os.environ.get("CHROMIUM")
    or shutil.which("chromium")
    or shutil.which("chromium-browser")
    or "/usr/bin/chromium"
)
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
BROWSER_ARGS = (
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--font-render-hinting=none",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
# What makes a headless JupyterLab repeatable. windowingMode: else cells off the screen are not in the page at
# all.
SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}
# console errors: a widget that syncs after its kernel was shut down; a missing icon
HARMLESS = ("Cannot send", "favicon")

IS_READY = """path => { const w = window.jupyterapp?.shell.currentWidget;
    return w?.context?.path === path && w.context.isReady && w.sessionContext?.isReady
        && w.sessionContext.session?.kernel?.status === 'idle' }"""
REOPEN = """async path => { const app = window.jupyterapp, w = app.shell.currentWidget;
    if (w?.sessionContext) { await w.sessionContext.shutdown(); w.context.model.dirty = false; w.dispose() }
    await app.commands.execute('docmanager:open', {path, factory: 'Notebook'}) }"""
IS_IDLE = """() => { const nb = window.jupyterapp.shell.currentWidget;
    const running = nb.content.widgets.some(c => c.model.type === 'code' && c.model.executionState === 'running');
    return window.cbnbRan !== false && nb.sessionContext.session?.kernel?.status === 'idle' && !running }"""  # noqa: E501
RUN_ALL = """() => { window.cbnbRan = false;
    window.jupyterapp.commands.execute('notebook:run-all-cells').finally(() => { window.cbnbRan = true }) }"""
CODE_CELLS = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells].filter(c => c.type === 'code').map(c => ({
    count: c.executionCount, source: c.sharedModel.source, outputs: c.outputs.toJSON() }))"""  # noqa: E501
EXECUTE = """async code => { const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    let said = ''; const future = kernel.requestExecute({code, store_history: false});
    future.onIOPub = m => { if (m.header.msg_type === 'stream') said += m.content.text;
                            if (m.header.msg_type === 'error') said += 'ERROR ' + m.content.evalue };
    await future.done; return said }"""  # noqa: E501
BROKEN = "text=/Error displaying widget|Loading widget|Failed to load model|Javascript Error/i"


class CellError(AssertionError):
    "A notebook did not run or show as it should."


def free_port():
    "A port of 127.0.0.1 that nothing listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# the browser of this process, while there is one: Playwright's plain interface can be started only once at a
# time
OPEN = []


@contextlib.contextmanager
def chromium():
    """A headless Chromium that finds no host but this machine; inside another `chromium()`, the same one.
    Close it before other asyncio code runs."""
    if OPEN:
        yield OPEN[0]
    else:
        with (
            sync_playwright() as playwright,
            playwright.chromium.launch(executable_path=CHROMIUM, args=list(BROWSER_ARGS)) as browser,
        ):
            OPEN.append(browser)
            try:
                yield browser
            finally:
                OPEN.clear()


class Lab:
    """A JupyterLab server with its own, empty Jupyter folders, and a browser that reaches nothing but this
    machine. A context manager."""

    def __init__(self, root, theme="light", width=1280, height=1000):
        self.root, self.theme, self.size = Path(root).resolve(), theme, {"width": width, "height": height}
        self.outside, self.console = [], []

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:  # undone here if anything below fails
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cbnb-lab-")))
            self.start_server(stack)
            self.start_browser(stack)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self.stack.close()

    def start_server(self, stack):
        "Start JupyterLab on a free port and wait until it answers."
        settings = SETTINGS | {
            "@jupyterlab/apputils-extension:themes": {"theme": f"JupyterLab {self.theme.title()}"}
        }
        for key, value in settings.items():
            path = self.folder / "settings" / f"{key.replace(':', '/')}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value))
        port, self.token = free_port(), secrets.token_hex(16)
        self.url = f"http://127.0.0.1:{port}"
        own = {
            "JUPYTER_CONFIG_DIR": "config",
            "JUPYTER_DATA_DIR": "data",
            "JUPYTER_RUNTIME_DIR": "runtime",
            "IPYTHONDIR": "ipython",
            "JUPYTERLAB_SETTINGS_DIR": "settings",
            "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        }
        self.env = {k: v for k, v in os.environ.items() if k != "JUPYTER_PATH"} | {
            k: str(self.folder / v) for k, v in own.items()
        }
        self.env |= {
            "JUPYTER_PREFER_ENV_PATH": "1",
            "JUPYTER_TOKEN": self.token,
            "PYTHONPATH": str(PACKAGE_ROOT),
        }
        log = stack.enter_context(open(self.folder / "server.log", "w+"))
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--ip=127.0.0.1",
                f"--ServerApp.port={port}",
                "--ServerApp.port_retries=0",
                f"--ServerApp.root_dir={self.root}",
                "--allow-root",
                "--LabApp.expose_app_in_browser=True",
                "--LabApp.news_url=",
                "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
                "--ServerApp.iopub_data_rate_limit=1e10",
                "--ServerApp.websocket_max_message_size=268435456",
            ],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stack.callback(self.stop_server, server)
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/api/status?token={self.token}", timeout=1).read()
                return
            if server.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"JupyterLab ended or did not answer:\n{Path(log.name).read_text()[-2000:]}")

    @staticmethod
    def stop_server(server):
        "End the server and the kernels it started: they are one process group of our own."
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)

    def start_browser(self, stack):
        "Start Chromium; every request of every page is noted, those to other machines in `outside`."
        browser = stack.enter_context(chromium())
        self.context = browser.new_context(
            viewport=self.size, color_scheme=self.theme, reduced_motion="reduce"
        )
        stack.callback(self.context.close)
        self.context.on("request", lambda request: self.note(request.url))

    def note(self, url):
        if not url.startswith(
            (self.url, self.url.replace("http", "ws", 1), "data:", "blob:", "about:", "file:")
        ):
            self.outside.append(url)

    def dismiss(self, dialog):
        "A script that opens a dialog, as a stranger's would, is an error of the page."
        self.console.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    def new_page(self):
        "A page whose console errors are kept in `console`."
        page = self.context.new_page()
        page.on("console", lambda m: self.console.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.on("dialog", self.dismiss)
        page.on("websocket", lambda socket: self.note(socket.url))
        return page

    def trust(self, path):
        "Sign a notebook for this server: saved widget output is not shown in an untrusted one."
        subprocess.run(
            [sys.executable, "-m", "jupyter", "trust", str(self.root / path)],
            env=self.env,
            check=True,
            capture_output=True,
        )

    def open(self, path, reuse=None):
        """Open a notebook; `reuse`, an opened Notebook, gives its page (saves the 5-10 s start of JupyterLab)
        and loses its kernel."""
        page = reuse.page if reuse else self.new_page()
        if reuse:
            page.evaluate(REOPEN, path)
        else:
            page.goto(f"{self.url}/lab/tree/{path}?token={self.token}&reset", wait_until="domcontentloaded")
            page.wait_for_selector("#jupyterlab-splash", state="detached", timeout=90_000)
        page.wait_for_function(IS_READY, arg=path, timeout=90_000)
        return Notebook(self, page, path)

    def html(self, path, page=None):
        "Open a page file (a report, the site of make docs) in the same browser, in `page` or a new one."
        page = page or self.new_page()
        page.goto(Path(path).resolve().as_uri())
        return page

    def assert_offline(self):
        assert not self.outside, f"requests to other machines: {self.outside[:10]}"


class Notebook:
    "A notebook open in a page of a Lab."

    def __init__(self, lab, page, path):
        self.lab, self.page, self.path, self.seen = lab, page, path, len(lab.console)

    def cells(self):
        "Its code cells as dicts: execution count, source, outputs."
        return self.page.evaluate(CODE_CELLS)

    def run_all(self, timeout=300, check=True):
        "Run all cells; `timeout` in seconds for all of them together."
        self.page.evaluate(RUN_ALL)
        self.wait_idle(timeout)
        if check:
            self.check()

    def wait_idle(self, timeout=120, quiet=0.3):
        "Wait until the kernel is idle and no cell pending for `quiet` seconds: widget messages make it flap."
        end, since = time.monotonic() + timeout, None
        while time.monotonic() < end:
            idle = self.page.evaluate(IS_IDLE)
            since = (since or time.monotonic()) if idle else None
            if since and time.monotonic() - since >= quiet:
                return
            self.page.wait_for_timeout(50)
        raise TimeoutError(f"{self.path}: kernel not idle after {timeout} s")

    def check(self):
        """CellError for an error output, a cell that did not run, a widget that did not show or a JavaScript
        error."""
        for cell in self.cells():
            for output in cell["outputs"]:
                if output["output_type"] == "error":
                    trace = "\n".join(output["traceback"] or [])
                    raise CellError(
                        f"{cell['source'][:80]!r}: {output['ename']}: {output['evalue']}\n{trace}"
                    )
            if cell["source"].strip() and cell["count"] is None:
                raise CellError(f"not executed: {cell['source'][:80]!r}")
        if broken := self.page.locator(BROKEN).count():
            raise CellError(f"{broken} widget(s) did not show")
        errors = [text for text in self.lab.console[self.seen :] if not any(h in text for h in HARMLESS)]
        if errors:
            raise CellError(
                f"JavaScript error (a widget whose render() throws is a blank cell): {errors[0][:500]}"
            )

    def save(self):
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        self.page.wait_for_function(
            "() => !window.jupyterapp.shell.currentWidget.context.model.dirty", timeout=60_000
        )

    def execute(self, code):
        """Run code in the notebook's kernel beside its cells and return what it printed: to look at the state
        after a click."""
        return self.page.evaluate(EXECUTE, code)

    def cell(self, i):
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(i)

    def shot(self, path, cell=None):
        "A screenshot of the page, or of one code cell's output, as PNG."
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shown = self.page if cell is None else self.cell(cell).locator(".jp-Cell-outputWrapper")
        shown.screenshot(path=str(path))


if __name__ == "__main__":
    folder, name, *shot = sys.argv[1:]
    with Lab(folder) as lab:
        nb = lab.open(name)
        nb.run_all()
        nb.shot(shot[0] if shot else "shot.png")
        lab.assert_offline()
