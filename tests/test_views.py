"""A view in each way in which a notebook is read: beside its kernel, untrusted, after papermill, and as
nbconvert's HTML."""

import sys

import nbformat
import pytest

from helpers import run
from lab.labharness import Lab

SOURCE = """from cbnb.masking.masker import ChatMasker
from cbnb.step.models import load_tokenizer
from cbnb.transcripts.tinyworld import make_transcripts
from cbnb.widgets.strip import token_strip
masker, t = ChatMasker(load_tokenizer("tinyagent")), make_transcripts("injection", 1)[0]
encoded = masker.encode(t.messages, t.tools, t.injection_spans, t.label)
strip = token_strip(encoded, masker.tokenizer, ("post_injection_only", "first_header"), title="injected")
strip"""


def write_notebook(path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SOURCE)])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("views")


@pytest.fixture(scope="module")
def lab(folder):
    with Lab(folder) as lab:
        yield lab


@pytest.fixture(scope="module")
def executed(folder):
    "The notebook as papermill leaves it."
    write_notebook(folder / "plain.ipynb")
    done = run(
        "env",
        "-u",
        "JPY_SESSION_NAME",
        "-u",
        "VSCODE_PID",
        "-u",
        "VSCODE_CWD",
        sys.executable,
        "-m",
        "papermill",
        "plain.ipynb",
        "out.ipynb",
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout
    return folder / "out.ipynb"


@pytest.mark.slow
def test_live(lab, folder):
    write_notebook(folder / "live.ipynb")
    nb = lab.open("live.ipynb")
    nb.run_all()
    nb.page.locator(".cb-view .cb-t").nth(5).click()
    nb.page.wait_for_function(
        "document.querySelector('.cb-about [role=status]').textContent.startsWith('token 5 ')"
    )
    nb.wait_idle()
    assert nb.execute("print(strip.selected)").strip() == "5"
    nb.execute("strip.selected = 60; strip.view = 'difference'")
    nb.page.locator(".cb-t.sel").wait_for()
    nb.page.wait_for_function(
        "document.querySelector('.cb-t.sel')?.id.endsWith('-60') && document.querySelector('.cb-view .minus')"
    )
    nb.page.locator(".cb-view").focus()
    nb.page.keyboard.press("d"), nb.page.keyboard.press("d")  # JupyterLab would delete the cell
    nb.wait_idle()
    assert len(nb.cells()) == 1 and nb.execute("print(strip.selected > 60)").strip() == "True"
    nb.check()
    lab.assert_offline()
    nb.save()
    bundle = nbformat.read(folder / "live.ipynb", as_version=4).cells[0].outputs[-1].data
    assert (
        "application/vnd.jupyter.widget-view+json" in bundle
        and "<script" not in bundle["text/html"]
        and "<table" in bundle["text/html"]
    )


@pytest.mark.slow
def test_untrusted_shows_html_without_scripts(lab, folder, executed):
    "What was saved beside a kernel, and what papermill left, opened by somebody who has not run it."
    live = nbformat.read(folder / "live.ipynb", as_version=4)
    for cell in live.cells:
        cell.metadata.pop("trusted", None)
    live.cells[0].source += "\n# mailed"
    nbformat.write(live, folder / "mailed.ipynb")
    for name in ("mailed.ipynb", "out.ipynb"):
        nb = lab.open(name)
        output = nb.cell(0).locator(".jp-OutputArea-output").last
        output.locator("table").wait_for(state="attached")
        assert output.locator("iframe, script").count() == 0 and "post_injection_only" in output.inner_html()
    lab.assert_offline()


@pytest.mark.slow
def test_after_papermill_a_trusted_notebook_is_interactive(lab, executed):
    lab.trust("out.ipynb")
    nb = lab.open("out.ipynb")
    frame = nb.page.frame_locator("iframe[title=injected]")
    frame.locator(".cb-view .cb-t").nth(5).click()
    assert frame.locator(".cb-about [role=status]").inner_text().startswith("token 5 ")
    assert "model_id" not in executed.read_text() and "widget-state" not in executed.read_text()
    lab.assert_offline()


def test_html_of_nbconvert(pages, executed):
    done = run(
        sys.executable,
        "-m",
        "nbconvert",
        "--to",
        "html",
        "--HTMLExporter.require_js_url=",
        "--HTMLExporter.mathjax_url=",
        executed,
        cwd=executed.parent,
    )
    assert done.returncode == 0, done.stdout
    page = pages.open(executed.with_suffix(".html"))
    frame = page.frame_locator("iframe[title=injected]")
    frame.locator(".cb-view .cb-t").nth(5).click()
    assert frame.locator(".cb-about [role=status]").inner_text().startswith("token 5 ")
    pages.assert_clean()
