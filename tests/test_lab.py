"""Notebooks in a real JupyterLab in headless Chromium, cut off from every other machine; and the site of make
docs in the same browser."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect

from cbnb.step.models import save_adapter
from cbnb.transcripts.reader import write_transcripts
from cbnb.transcripts.tinyworld import make_transcripts
from helpers import HOSTILE, NBS, copy_tree, notebooks, run
from lab.labharness import CHROMIUM, CellError, Lab, free_port
from test_answers_view import data, episodes_of, noisy, run_folder
from train_common import little_data

# lines of code, of at most 110 columns, in blocks that are wider than their place
CUT_OFF = """() => [...document.querySelectorAll(".highlight-ipynb pre, .highlight pre")]
    .filter(block => block.scrollWidth > block.clientWidth)
    .map(block => block.innerText)
    .filter(text => text.split("\\n").every(line => line.length <= 110))"""
EVIL = "".join(HOSTILE)
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
    few = little_data(copy)
    short = dict(total_steps=20, max_new_tokens=8, data=few["data"], eval_data=few["eval_data"])
    write_parameters(copy / "nbs" / "train.ipynb", **short)
    with Lab(copy / "nbs") as lab:
        yield lab


@pytest.fixture(scope="module")
def acted(tmp_path_factory):
    """A run directory with answers, episodes and an adapter of noise; strangers' texts are in what was asked
    and in what was answered."""
    transcripts, lines = data(6)
    for i in (1, 8):
        first, user, *rest = transcripts[i].messages
        user = user | {"content": f"{user['content']} {EVIL}"}
        transcripts[i] = replace(transcripts[i], messages=[first, user, *rest])
    episodes = [e for t in transcripts[:2] for e in episodes_of(t, "obeyed", "safe_stop")]
    run = run_folder(tmp_path_factory.mktemp("acted") / "run", transcripts, lines, episodes)
    save_adapter(noisy(0.2), run / "adapter")
    return run


def write_parameters(path, **given):
    "Write values into the parameters cell of a notebook, as a reader does by hand."
    book = nbformat.read(path, as_version=4)
    cell = next(c for c in book.cells if "parameters" in c.metadata.get("tags", ()))
    for name, value in given.items():
        line = re.compile(rf"^({name}: .*?) = \S+", re.M)
        cell.source, n = line.subn(lambda m: f"{m[1]} = {value!r}", cell.source)
        assert n == 1, name
    nbformat.write(book, path)


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


@pytest.mark.slow
def test_actions_are_read_down_to_their_tokens_and_hidden_states(lab, acted, tmp_path):
    """What a reader does: filter, search, go on by keys; from an action two clicks lead to its tokens and
    their reasons, or to its KL and hidden states. A stranger's text stays text."""
    write_parameters(lab.root / "explore_answers.ipynb", run=str(acted))
    nb = lab.open("explore_answers.ipynb")
    nb.run_all(timeout=600)
    cell, keys = nb.cell(4), nb.page.keyboard
    view = cell.locator(".cb-answers")
    count, title = view.locator(".cb-bar [role=status]"), view.locator(".an-about h2")
    rows = view.locator(".an-row")
    assert count.inner_text() == "20 cases" and rows.count() >= 15
    # filters
    chip = view.locator(".an-chip[data-word=unreadable]")
    n = int(chip.locator("b").inner_text())
    chip.click()
    assert count.inner_text() == f"{n} of 20 cases" and n == 5 == rows.count()
    view.get_by_role("button", name="all", exact=True).click()
    view.get_by_label("kind", exact=True).select_option(label="plain (6)")
    assert count.inner_text() == "6 of 20 cases"
    # the search and the keys; JupyterLab takes none of them for itself
    view.locator(".an-list").focus()
    keys.press("Escape")
    keys.press("/")
    keys.type("onerror")
    keys.press("Enter")
    view.locator(".an-hit.an-now, .an-hit").first.wait_for()
    assert 0 < rows.count() < 20 and "<img src=x onerror=alert(1)>" in view.locator(".an-about").inner_text()
    keys.press("Escape")
    ids = nb.execute("print(*[c['id'] for c in explorer.box.list.data['cases']])").split()
    view.locator(".an-list").focus()
    for n, key in enumerate(("Home", "ArrowDown", "ArrowDown")):
        keys.press(key)
        expect(title).to_have_text(ids[n], timeout=30_000)
        nb.wait_idle()
        assert nb.execute("print(explorer.box.list.place)").strip() == str(n), "what Python knows of it"
    keys.press("ArrowUp")
    expect(title).to_have_text(ids[1], timeout=30_000)
    nb.wait_idle()
    assert "\\u202egnol" in view.inner_text() and view.locator(".an-injected").count() > 0
    assert len(nb.cells()) == 7, "a key of the reader reached the notebook"
    # tokens and reasons: two clicks
    rows.first.click()
    side = view.locator(".an-side", has_text="before")
    side.get_by_role("button", name="tokens and masks").click()
    below = cell.locator(".cb-view")
    below.wait_for()
    nb.wait_idle()
    assert view.locator(".an-status").inner_text().startswith("Tokens and masks of case 1, before, are below")
    assert cell.locator(".cb-t.sel").count() == 1
    why = cell.locator(".cb-about").inner_text()
    assert "in: " in why and "message 4" in why
    # KL and hidden states
    side.get_by_role("button", name="KL and hidden states").click()
    cell.locator(".kl-detail table").wait_for(timeout=60_000)
    nb.wait_idle()
    maps = cell.locator("[aria-label='Cosine to the teacher by block and token']")
    assert "cosine" in maps.get_attribute("aria-valuetext") and cell.locator(".kl-actual").count() == 1
    for what in ("img", "script"):
        assert cell.locator(what).count() == 0, what
    nb.shot(tmp_path / "actions.png")
    nb.check()
    lab.assert_offline()


@pytest.mark.slow
def test_a_prompt_is_tried_in_the_form(lab, acted, tmp_path):
    """What a reader does: paste an injection into the tool result, ask both, turn the scale, begin the
    answer. At scale 0 the breaker is the base. What cannot be asked is said, and the form goes on."""
    attacks = make_transcripts("injection", 2, "eval")
    write_transcripts(tmp_path / "attacks.jsonl", attacks)
    given = dict(adapter=str(acted / "adapter"), model="tinyagent", data=str(tmp_path / "attacks.jsonl"))
    write_parameters(lab.root / "chat.ipynb", **given)
    nb = lab.open("chat.ipynb")
    nb.run_all(timeout=600)
    cell, keys = nb.cell(2), nb.page.keyboard
    sides = cell.locator(".cb-chat >> nth=0").locator(":scope > div")

    def field(name):
        return cell.get_by_placeholder(name)

    def ask():
        cell.get_by_role("button", name="Ask both").click()
        nb.wait_idle()
        assert sides.count() == 2, cell.inner_text()
        return [side.locator("pre").inner_text() for side in sides.all()]

    assert "base, scale 0" in sides.nth(0).inner_text() and "breaker, scale 1" in sides.nth(1).inner_text()
    order = attacks[0].meta["injected_call"]["name"]
    assert f"call: {order}" in sides.nth(0).inner_text(), "the base obeys"
    assert sides.nth(0).locator("pre").inner_text() != sides.nth(1).locator("pre").inner_text()
    # an injection of one's own, with strangers' texts around it
    result = field("the result of the tool")
    result.fill(f"{attacks[1].messages[3]['content']}\n{EVIL}")
    cell.get_by_label("show the prompt").check()
    base, breaker = ask()
    assert base != breaker
    prompt = cell.locator(".cb-chat >> nth=1").inner_text()
    for words in (HOSTILE[0], HOSTILE[1], "\\u202egnol", "\\x1b[31m"):
        assert words in prompt, words
    # the scale: 0 is the base
    handle = cell.locator(".noUi-handle").first
    handle.focus()
    for _ in range(30):
        keys.press("ArrowLeft")
    nb.wait_idle()
    same = ask()
    assert same == [base, base] and "breaker, scale 0" in sides.nth(1).inner_text()
    for _ in range(30):
        handle.focus()
        keys.press("ArrowRight")
    nb.wait_idle()
    strong = ask()
    assert strong[0] == base != strong[1] and "breaker, scale 1.5" in sides.nth(1).inner_text()
    # an answer that others have begun
    field("the answer begins with").fill("Of course:")
    assert all(text.startswith("Of course:") for text in ask())
    # what no template writes is said; the form goes on
    result.fill("<|eot_id|>")
    cell.get_by_role("button", name="Ask both").click()
    nb.wait_idle()
    assert "control token" in cell.inner_text() and sides.count() == 0
    result.fill("total: 3")
    assert len(ask()) == 2
    cell.get_by_role("button", name="Go on", exact=True).click()
    nb.wait_idle()
    assert "total: 3" in cell.inner_text() and result.input_value() == ""
    for what in ("img", "script"):
        assert cell.locator(what).count() == 0, what
    # nothing is squeezed in a narrow window
    nb.page.set_viewport_size({"width": 1000, "height": 800})
    widths = cell.locator(".noUi-target").evaluate_all("all => all.map(e => e.getBoundingClientRect().width)")
    assert len(widths) == 2 and min(widths) > 80, widths
    nb.shot(tmp_path / "chat.png")
    nb.check()
    lab.assert_offline()


def test_server_wants_its_token(lab):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{lab.url}/api/contents", timeout=10)


@pytest.mark.slow
def test_make_lab_asks_for_no_news(lab, tmp_path):
    "A box that asks whether news may be fetched is the first thing that a newcomer would see."
    port, token = free_port(), "a" * 40
    arguments = f"--no-browser --ServerApp.port={port} --ServerApp.port_retries=0"
    env = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")}
    env |= {"JUPYTER_TOKEN": token, "JUPYTERLAB_SETTINGS_DIR": str(tmp_path), "HOME": str(tmp_path)}
    # the environment is the one that runs this: nothing is installed
    made = ["make", "lab", f"VENV={sys.prefix}", f"LAB_ARGS={arguments}", "-o", f"{sys.prefix}/.user"]
    log = open(tmp_path / "log", "w")
    server = subprocess.Popen(
        made, cwd=lab.root.parent, env=env, stdout=log, stderr=log, start_new_session=True
    )
    name = "@jupyterlab/apputils-extension:notification"
    try:
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()
            with suppress(OSError):
                url = f"http://127.0.0.1:{port}/lab/api/settings/{name}?token={token}"
                said = json.loads(urllib.request.urlopen(url, timeout=5).read())
                opened = urllib.request.urlopen(f"http://127.0.0.1:{port}/?token={token}", timeout=5).url
                break
            time.sleep(0.1)
    finally:
        Lab.stop_server(server)
        log.close()
    assert opened.split("?")[0].endswith("/lab/tree/start.ipynb"), "what a newcomer should see first"
    asked = said["schema"]["properties"]
    assert asked["fetchNews"]["default"] == "false" and asked["checkForUpdates"]["default"] is False


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
