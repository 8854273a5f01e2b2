"""Notebooks in a real JupyterLab in headless Chromium, cut off from every other machine; and the site of make
docs in the same browser."""

import sys
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest

from helpers import NBS, copy_tree, notebooks, run
from lab.labharness import CHROMIUM, CellError, Lab
from train_common import little_data

# lines of code, of at most 110 columns, in blocks that are wider than their place
CUT_OFF = """() => [...document.querySelectorAll(".highlight-ipynb pre, .highlight pre")]
    .filter(block => block.scrollWidth > block.clientWidth)
    .map(block => block.innerText)
    .filter(text => text.split("\\n").every(line => line.length <= 110))"""
NOTEBOOKS = ["index.ipynb", "train.ipynb", "explore_masks.ipynb"]

if not Path(CHROMIUM).exists():
    pytest.skip(
        "no Chromium found: apt-get install chromium, or name one: CHROMIUM=/path make test",
        allow_module_level=True,
    )


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the notebooks: what they write stays out of the sources. There train.ipynb is
    short, on few transcripts: test_train.py has all of it."""
    copy = copy_tree(tmp_path_factory.mktemp("lab") / "cbnb")
    train = nbformat.read(copy / "nbs" / "train.ipynb", as_version=4)
    parameters = next(c for c in train.cells if "parameters" in c.metadata.get("tags", ()))
    few = little_data(copy)
    for whole, short in (
        ('total_steps: "Optional[int]" = None', 'total_steps: "Optional[int]" = 20'),
        ("max_new_tokens: int = 128", "max_new_tokens: int = 8"),
        ('data: str = "tinyagent"', f"data: str = {few['data']!r}"),
        ('eval_data: str = ""', f"eval_data: str = {few['eval_data']!r}"),
    ):
        assert parameters.source.count(f"\n{whole}") == 1
        parameters.source = parameters.source.replace(f"\n{whole}", f"\n{short}")
    nbformat.write(train, copy / "nbs" / "train.ipynb")
    with Lab(copy / "nbs") as lab:
        yield lab


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_in_jupyterlab(lab, tmp_path, name):
    nb = lab.open(name)
    nb.run_all(timeout=600)
    nb.shot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    lab.assert_offline()
    assert nb.execute("import sys; print(sys.prefix)").strip() == sys.prefix, (
        "the kernel is not the environment's"
    )


@pytest.mark.slow
def test_masks_are_explored_by_hand(lab, tmp_path):
    """What a reader does: another transcript, another mask B, the difference and its reasons, a pasted
    record, another policy's tokens, the exports."""
    nb = lab.open("explore_masks.ipynb")
    nb.run_all(timeout=600)
    view, keys = nb.cell(2), nb.page.keyboard
    nb.shot(tmp_path / "masks.png", cell=2)
    view.get_by_role("button", name="next ▸").click()
    nb.wait_idle()
    picked = view.locator("select").first
    assert picked.input_value().replace("\xa0", " ") == "2: injection-train-0-00001 (harmful)"
    view.get_by_label("what is shown").select_option("difference")
    view.get_by_label("mask B").select_option("full_sequence")
    assert view.locator(".cb-view .cb-t.minus").count() > 50
    view.locator(".cb-view").focus()
    keys.press("d")
    assert "B full_sequence: in: " in view.locator(".cb-about").inner_text()
    nb.wait_idle()
    picked.select_option(label="4:\xa0plain-train-0-00000\xa0(benign)")
    nb.wait_idle()
    # what was chosen stays
    assert view.get_by_label("mask B").input_value() == "full_sequence"
    assert "assistant_only stands in" in view.inner_text()
    view.get_by_text("paste a record").click()
    view.locator("textarea").fill(
        '[{"role": "user", "content": "<img src=x onerror=boom()>"}, {"role": "assistant", "content": "ok"}]'
    )
    view.get_by_role("button", name="show", exact=True).click()
    nb.wait_idle()
    assert (
        view.locator(".cb-view").inner_text().replace("\n", "").endswith("ok<|eot_id|>")
        and view.locator("img").count() == 0
    )
    view.get_by_text("save page").click()
    view.get_by_text("save tokens").click()
    nb.wait_idle()
    assert {p.name for p in lab.root.glob("masks-*")} == {
        "masks-pasted-1.html",
        "masks-pasted-1.csv",
    } and "masks-pasted-1.csv" in view.inner_text()
    bad = nb.cell(4)
    bad.get_by_role("button", name="next ▸").scroll_into_view_if_needed()
    bad.locator("select").first.select_option(label="5:\xa0injected-eot\xa0(benign)")
    nb.wait_idle()
    assert "control token" in bad.get_by_role("alert").inner_text() and "no_mask" in bad.inner_text()
    nb.check()
    lab.assert_offline()


def test_server_wants_its_token(lab):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{lab.url}/api/contents", timeout=10)


@pytest.mark.slow
def test_harness_sees_what_goes_wrong(lab):
    """An error output, a failing script and a request to elsewhere must not pass: else the tests above prove
    nothing."""

    def write(name, source):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        nb.metadata.kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
        nbformat.write(nb, lab.root / name)

    write("_error.ipynb", "1/0")
    write(
        "_script.ipynb",
        "from IPython.display import HTML, display\ndisplay(HTML('<script>throw new "
        'Error("boom")</script>\'))',
    )
    write(
        "_outside.ipynb",
        "from IPython.display import HTML, display\ndisplay(HTML('<img src=\"http://example.com/a.png\">'))",
    )
    nb = lab.open("_error.ipynb")
    with pytest.raises(CellError, match="ZeroDivisionError"):
        nb.run_all()
    nb = lab.open("_script.ipynb", reuse=nb)
    with pytest.raises(CellError, match="boom"):
        nb.run_all()
    nb = lab.open("_outside.ipynb", reuse=nb)
    nb.run_all(check=False)
    nb.page.wait_for_timeout(200)
    with pytest.raises(AssertionError, match="example.com"):
        lab.assert_offline()
    lab.outside.clear()


@pytest.mark.slow
def test_site_needs_no_other_machine(lab, tmp_path):
    copy = copy_tree(tmp_path / "cbnb")
    built = run(sys.executable, ".ci/pages.py", "docs", cwd=copy)
    assert built.returncode == 0, built.stdout
    site = copy / "_docs"
    written = {p for p in [*NBS.rglob("*.md"), *notebooks()] if p.name != "README.md"}
    assert {p.relative_to(NBS).with_suffix(".html") for p in written} <= {
        p.relative_to(site) for p in site.rglob("*.html")
    }
    # its links are for a server's root
    pages = {page: page.read_text() for page in sorted(site.rglob("*.html")) if page.name != "404.html"}
    assert not [page for page, text in pages.items() if "<h1" not in text], "each shows a title"
    usual = min(text.count("<script") for text in pages.values())
    # with a figure or a view; what a page names, pages.py has read
    lively = [page for page, text in pages.items() if text.count("<script") > usual][:4]
    opened = None
    for page in [
        site / "index.html",
        site / "step" / "00_losses.html",
        site / "howto" / "wrong.html",
        *lively,
    ]:
        opened = lab.html(page, opened)
        assert opened.locator("h1").count() >= 1, f"{page.relative_to(site)} shows no title"
        opened.set_viewport_size({"width": 1440, "height": 900})
        assert opened.evaluate(CUT_OFF) == [], f"{page.relative_to(site)} cuts code off"
    assert len(lively) > 1
    opened.close()
    lab.assert_offline()
