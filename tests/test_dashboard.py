"""The dashboard in a real JupyterLab: Stop and ■ while the cell trains, a run that another process writes,
and what a saved notebook shows."""

import json
import re
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest

from cbnb.basics.jsonfiles import write_json
from cbnb.run.directory import open_run
from cbnb.run.metrics import append_metrics, read_metrics
from cbnb.run.stages import read_status, set_status
from cbnb.widgets.dashboard import static_dashboard
from helpers import NBS, code_cells, run
from lab.labharness import CHROMIUM, RUN_ALL, CellError, Lab

PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"

SETUP = """
import json
from pathlib import Path
from cbnb.config import config_to_dict, get_config
from cbnb.data.streams import encode_stream
from cbnb.masking.masker import ChatMasker
from cbnb.step.models import add_adapter, load_model, load_tokenizer
from cbnb.basics.jsonfiles import write_json
from cbnb.run.directory import open_run
from cbnb.run.stages import set_status, stage
from cbnb.transcripts.tinyworld import make_transcripts
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
folder = Path(FOLDER)
config = get_config("tinyagent", total_steps=json.loads((folder / "steps.json").read_text()), batch_size=2, warmup_steps=1, save_steps=0)
masker, teacher_model, cache, twins = ChatMasker(load_tokenizer("tinyagent")), None, None, None
harmful, _ = encode_stream(make_transcripts("injection", 20), masker, config.harmful_policy)
benign, _ = encode_stream(make_transcripts("plain", 20), masker, config.benign_policy)
student = add_adapter(load_model("tinyagent"), config)
run = open_run({}, name="lab", run_dir=folder / "run")
write_json(run.path / "config.json", config_to_dict(config))
"""  # noqa: E501
# how often the outputs of a cell are updated, and what a reader sees and does
COUNT = """() => { window.cbnbUpdates = [];
    window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.iopubMessage.connect((_, m) => {
        if (m.header.msg_type === 'update_display_data' && m.content.data['text/html'].startsWith('<p>')) window.cbnbUpdates.push(Date.now()) }) }"""  # noqa: E501
INTERRUPT = "() => window.jupyterapp.commands.execute('notebook:interrupt-kernel')"

if not Path(CHROMIUM).exists():
    pytest.skip(
        "no Chromium found: apt-get install chromium, or name one: CHROMIUM=/path make test",
        allow_module_level=True,
    )


def write_notebook(path, *sources):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, path)


def training_notebook(path, folder, steps):
    "A notebook that trains the tiny agent with the very cell of train.ipynb, its run directory `folder`/run."
    (cell,) = [c.source for c in code_cells(NBS / "train.ipynb") if "live_dashboard(run)" in c.source]
    write_notebook(path, SETUP.replace("FOLDER", repr(str(folder))).strip(), cell, "set_status(run, 'done')")
    (folder / "steps.json").write_text(str(steps))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("dashboard")) as lab:
        yield lab


def stop_of(nb):
    return nb.page.locator(".jp-OutputArea").locator(".jupyter-button", has_text="Stop")


def shown(nb, text, timeout=60):
    "Wait until an output holds `text`, a regular expression; returns the match."
    nb.page.locator(".jp-OutputArea").get_by_text(re.compile(text)).first.wait_for(timeout=timeout * 1000)
    return re.search(text, " ".join(nb.page.locator(".jp-OutputArea-output").all_inner_texts()))


def curves_step(nb, seconds=0):
    """The last step that the picture of the curves shows; with `seconds`, of the next picture that comes
    within them."""
    image = nb.page.locator('img[alt^="training curves to step"]')
    before = image.get_attribute("alt")
    if seconds:
        nb.page.locator(f"img[alt^='training curves']:not([alt='{before}'])").wait_for(timeout=seconds * 1000)
    assert image.evaluate("i => i.decode().then(() => i.naturalWidth)") == 900
    return int(re.search(r"step (\d+)", image.get_attribute("alt"))[1])


def mimes(outputs):
    return {mime for o in outputs for mime in o.get("data", ())}


def assert_slow_enough(nb):
    """At most two updates a second, on the way to the browser one may catch up with another; the last one of
    a cell may come at any time."""
    times = nb.page.evaluate("() => window.cbnbUpdates")[:-1]
    assert len(times) >= 2 and times[-1] - times[0] >= 500 * (len(times) - 1) - 300, times


@pytest.mark.slow
def test_stop_interrupt_and_resume(lab, tmp_path):
    training_notebook(lab.root / "train.ipynb", tmp_path, steps=1000)
    folder = tmp_path / "run"
    nb = lab.open("train.ipynb")

    nb.page.evaluate(COUNT)
    nb.page.evaluate(RUN_ALL)
    shown(nb, r"running \(training\) · step [3-9]\d* of 1000", timeout=120)
    assert shown(nb, r"of training left") and curves_step(nb) >= 1
    shot(nb, tmp_path / "training.png")
    stop_of(nb).click()
    nb.wait_idle(60)
    assert_slow_enough(nb)
    with pytest.raises(CellError, match="RunInterrupted: stopped with a checkpoint"):
        nb.check()
    stopped = len(read_metrics(folder))
    assert 3 <= stopped < 1000 and read_status(folder)["state"] == "interrupted"
    assert (folder / "checkpoints" / f"checkpoint-{stopped}" / "trainer_state.json").exists()
    assert (
        shown(nb, rf"interrupted: stopped with a checkpoint.* step {stopped} of 1000")
        and stop_of(nb).count() == 0
    )

    nb.page.evaluate(RUN_ALL)
    shown(nb, rf"running \(training\) · step (?!{stopped} )\d+ of 1000", timeout=120)
    assert shown(nb, "attempt 2")
    nb.page.evaluate(INTERRUPT)
    nb.wait_idle(60)
    with pytest.raises(CellError, match="RunInterrupted: stopped with a checkpoint"):
        nb.check()
    interrupted = len(read_metrics(folder))
    assert (
        interrupted > stopped
        and (folder / "checkpoints" / f"checkpoint-{interrupted}" / "trainer_state.json").exists()
    )
    assert read_status(folder)["state"] == "interrupted"

    (tmp_path / "steps.json").write_text(str(interrupted + 5))
    nb.run_all()
    assert shown(nb, rf"training done · step {interrupted + 5} of {interrupted + 5}")
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, interrupted + 6)) and read_status(
        folder
    )["attempt"] == 3
    nb.save()
    outputs = [o for c in code_cells(lab.root / "train.ipynb") for o in c.outputs]
    assert {PLOTLY, "text/html"} <= mimes(outputs) and WIDGET not in mimes(outputs)
    lab.assert_offline()


def shot(nb, path):
    nb.page.wait_for_timeout(300)
    nb.shot(path)
    assert path.stat().st_size > 10_000


def row(step):
    terms = {"loss_reroute": 1 / step, "loss_retain": 0.1, "loss_kl": 1e-3}
    weighted = {"weighted_reroute": 10 / step, "weighted_retain": 0.1, "weighted_kl": 3e-4}
    return {
        "step": step,
        "loss": sum(weighted.values()),
        **terms,
        **weighted,
        "c_s": 10.0,
        "c_r": 1.0,
        "lr": 1e-4,
        "grad_norm_total": 1.0,
    }


def write_run(opened, over):
    """Goes on with a run like a training process elsewhere: a line a tenth of a second, until it is asked to
    stop or `over` is set."""
    first = len(read_metrics(opened.path)) + 1
    for step in range(first, first + 600):
        append_metrics(opened, row(step))
        time.sleep(0.1)
        if (opened.path / "stop").exists():
            return set_status(opened, "interrupted", error="RunInterrupted: stopped with a checkpoint")
        if over.is_set():
            return None


@pytest.mark.slow
def test_a_run_elsewhere_is_watched_and_stopped(lab, tmp_path):
    opened, over = open_run({}, name="elsewhere", run_dir=tmp_path / "run"), threading.Event()
    write_json(opened.path / "config.json", {"total_steps": 600, "beta_kl": 0.3})
    set_status(
        opened, "running", stage="training", resumed_step=0, training_started="2026-01-01T00:00:00+00:00"
    )
    write_notebook(
        lab.root / "watch.ipynb", f"from cbnb.widgets.dashboard import watch\nwatch({str(opened.path)!r})"
    )
    writer = threading.Thread(target=write_run, args=(opened, over))
    writer.start()
    try:
        nb = lab.open("watch.ipynb")
        nb.page.evaluate(COUNT)
        nb.page.evaluate(RUN_ALL)
        shown(nb, r"running \(training\) · step \d+ of 600")
        first, second = curves_step(nb), curves_step(nb, 30)
        assert second > first and nb.page.locator(".jp-RenderedPlotly").count() == 0
        nb.page.wait_for_function("() => window.cbnbUpdates.length >= 4", timeout=30_000)

        nb.page.evaluate(INTERRUPT)  # of the looking, not of the run
        nb.wait_idle(30)
        nb.check()
        nb.page.locator(".jp-RenderedPlotly").wait_for()
        assert not (opened.path / "stop").exists() and stop_of(nb).count() == 0 and writer.is_alive()
        assert_slow_enough(nb)

        nb.page.evaluate(RUN_ALL)
        stop_of(nb).click()
        writer.join(10)
        nb.wait_idle(30)
        nb.check()
        assert shown(nb, r"interrupted \(training\): RunInterrupted: stopped with a checkpoint")
        assert read_status(opened.path)["state"] == "interrupted"
    finally:
        over.set()
        writer.join()
    write_notebook(
        lab.root / "nothing.ipynb",
        "from cbnb.widgets.dashboard import dashboard, watch\nwatch('/nowhere')\ndashboard('/nowhere')",
    )
    nb = lab.open("nothing.ipynb", reuse=nb)
    nb.run_all()
    assert nb.page.get_by_text("There is no folder /nowhere").count() == 2
    lab.assert_offline()


@pytest.mark.slow
def test_papermill_leaves_a_view_without_script_or_widget(lab, tmp_path):
    training_notebook(tmp_path / "train.ipynb", tmp_path, steps=3)
    done = run(
        sys.executable, "-m", "papermill", tmp_path / "train.ipynb", lab.root / "out.ipynb", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "step 3/3  reroute" in done.stdout, "plain lines in the terminal"
    nb = nbformat.read(lab.root / "out.ipynb", 4)
    outputs = [o for c in nb.cells for o in c.outputs]
    html = "".join(o.data.get("text/html", "") for o in outputs if "data" in o)
    assert (
        "training done" in html
        and "<img alt=" in html
        and not re.search(r"<script|<iframe|\bon\w+=|javascript:", html, re.I)
    )
    assert PLOTLY in mimes(outputs) and WIDGET not in mimes(outputs) and "widgets" not in nb.metadata
    assert "step 3/3" not in json.dumps(outputs), "and not below the dashboard"

    opened = lab.open("out.ipynb")  # untrusted: nobody signed it
    assert (
        shown(opened, r"training done · step 3 of 3")
        and opened.page.get_by_text("nats per token").count() > 0
    )
    lab.assert_offline()
    made = run(
        sys.executable,
        "-m",
        "nbconvert",
        "--to",
        "html",
        lab.root / "out.ipynb",
        "--output",
        tmp_path / "out.html",
        cwd=tmp_path,
    )
    assert made.returncode == 0, made.stdout
    page = lab.html(tmp_path / "out.html")
    image = page.locator('img[alt^="training curves to step 3"]')
    image.wait_for()
    assert (
        image.evaluate("i => i.complete && i.naturalWidth > 500")
        and page.get_by_text("training done").count() == 1
    )
    # nbconvert's own page asks for MathJax, which this one does without
    lab.outside.clear()


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_static_page(pages, tmp_path, theme):
    """A run as one page: the table, curves that answer the mouse, nothing from outside, nothing serious for
    axe."""
    run_dir = open_run({}, name="still", run_dir=tmp_path / "<b>still")
    for step in range(1, 40):
        append_metrics(
            run_dir,
            {
                "step": step,
                "loss": 1 / step,
                "loss_reroute": 1 - step / 50,
                "loss_retain": 0.1,
                "loss_kl": 1e-3 / step,
                "c_s": 1.0,
                "c_r": 2.0,
                "grad_norm_total": 1.0,
                **{f"weighted_{t}": 0.1 * step for t in ("reroute", "retain", "kl")},
            },
        )
    set_status(run_dir, "interrupted", error="<script>alert(1)</script>")
    page = pages.open(static_dashboard(run_dir).save(tmp_path / "page.html"), theme=theme)
    assert (
        page.locator("h1").inner_text() == "<b>still"
        and "<script>alert(1)</script>" in page.locator("p").first.inner_text()
    )
    assert page.locator("table tbody tr").count() == 4
    panel = page.locator(".js-plotly-plot .nsewdrag").first
    panel.wait_for()
    page.mouse.move(0, 0)
    panel.hover()
    page.locator(".hoverlayer text").first.wait_for()
    assert "step" in page.locator(".hoverlayer").text_content()
    assert pages.violations(page) == []
    pages.assert_clean()
