"""How long the token strip and its peers take in a real JupyterLab: `python tests/strip_bench.py [tokens ...]` prints a line of JSON for each measurement.

All run in one browser, in turn, on the same tokens. A time is the median of three, from the start of the cell to the second frame after the
view is there ("show"), and from the request to the kernel to the second frame with the new colours ("recolour"); "scroll" is the slowest of 40 frames while the view scrolls from top to bottom; "bytes" is what the
saved notebook holds of the view. Nothing here asserts a time.
"""  # noqa: E501

import json
import statistics
import sys
import tempfile

import nbformat

from lab.labharness import Lab
from outside import fetch

SIZES = (8_000, 32_000, 128_000)
SETUP = """
import html, json, sys, numpy as np, plotly.graph_objects as go, ipywidgets
sys.path.insert(0, {circuitsvis!r})
import circuitsvis.tokens
from circuitsvis.utils import render
render.internet_on = lambda: False
from IPython.display import display, HTML
from cbnb.masking.policies import Encoding
from cbnb.masking.turns import Segment
from cbnb.widgets.strip import strip_mask, token_strip
n, rng = {n}, np.random.default_rng(0)
words = [f" {{a}}{{b}}" for a in ("ka", "ter", "min", "lo", "ver", "an", "sti") for b in ("po", "ra", "ing", "el", "sho", ".", ",")] + ["\\n"]
pieces = [words[k] for k in rng.integers(0, len(words), n)]
ends = np.cumsum([len(p) for p in pieces]).astype(np.int32)
message = (np.arange(n) // 150).astype(np.int16)
roles = tuple("user" if m % 2 else "assistant" for m in range(int(message.max()) + 1))
encoded = Encoding("".join(pieces), np.arange(n, dtype=np.int32) % 50_000, np.where(message % 2, Segment.USER, Segment.TEXT).astype(np.uint8), message,
                  np.stack([ends - [len(p) for p in pieces], ends], 1).astype(np.int32), roles=roles)
mask = message % 2 == 0
def spans(mask, version):
    "The tokens as HTML, a span each, with what the strip says of them: role and mask to be seen, the rest on hover."
    style = ["background:#bde", "color:#555"]
    edge = dict(user="#56B4E9", assistant="#009E73")
    why = ["out: content of message {{}} ({{}}), which no assistant generates", "in: text of message {{}} ({{}})"]
    return f"<div class='peer v{{version}}' style='white-space:pre-wrap'>" + "".join(
        f"<span class='tok' style='border-bottom:2px solid {{edge[roles[o]]}};{{style[not m]}}' title='token {{i}}, id {{k}}, predicted at position {{i - 1}}; "
        f"{{why[m].format(o, roles[o])}}'>{{html.escape(p)}}</span>"
        for i, (p, m, o, k) in enumerate(zip(pieces, mask.tolist(), message.tolist(), encoded.input_ids.tolist()))) + "</div>"
def heat_map(mask, version):
    "The tokens as a plotly heat map of 64 columns with the texts on hover."
    rows = -(-n // 64)
    z = np.full(rows * 64, np.nan); z[:n] = mask
    text = np.array(pieces + [""] * (rows * 64 - n), dtype=object)
    figure = go.Figure(go.Heatmap(z=z.reshape(rows, 64), text=text.reshape(rows, 64), hovertemplate="%{{text}}", showscale=False),
                       layout=dict(height=420, title=f"v{{version}}"))
    return {{"application/vnd.plotly.v1+json": json.loads(figure.to_json())}}
"""  # noqa: E501
WARM = """display(token_strip(message="warm")); display(ipywidgets.HTML("warm")); display(HTML(circuitsvis.tokens.colored_tokens(["a"], [1.0]).local_src))
display({"application/vnd.plotly.v1+json": {"data": [], "layout": {}}}, raw=True)"""  # the first of its kind in a page loads its scripts  # noqa: E501
# name: (code that shows it, when it is there, code of the k-th recolouring, when that is done, what scrolls)
PEERS = {
    "cbnb": (
        "s = token_strip(encoded, None, (), masks={'mask': mask}); display(s)",
        "out.querySelectorAll('.cb-t.in').length > 50",
        "s.masks = [strip_mask(encoded, mask ^ ({k} % 2 == 1), 'mask')]",
        "out.querySelector('.cb-t').classList.contains({k} % 2 ? 'out' : 'in')",
        ".cb-view",
    ),
    "ipywidgets.HTML": (
        "w = ipywidgets.HTML(spans(mask, 0), layout=dict(max_height='420px', overflow='auto')); display(w)",
        "out.querySelectorAll('.v0 .tok').length >= {n}",
        "w.value = spans(mask ^ ({k} % 2 == 1), {k})",
        "out.querySelectorAll('.v{k} .tok').length >= {n}",
        ".widget-html",
    ),
    "CircuitsVis": (
        "h = display(HTML(circuitsvis.tokens.colored_tokens(pieces, mask.astype(float)).local_src))",
        "out.querySelectorAll('span').length >= {n}",
        None,
        None,
        None,
    ),
    "plotly heat map": (
        "display(heat_map(mask, 0), raw=True)",
        "out.querySelector('.gtitle')?.textContent === 'v0' && out.querySelector('.hm image')",
        None,
        None,
        None,
    ),
}  # neither has a way to new colours but to be shown again
TIMED = """async ([index, shown, ready, code]) => {
    const panel = window.jupyterapp.shell.currentWidget, out = panel.content.widgets[shown].outputArea.node;
    const test = new Function('out', `return ${ready}`), frame = () => new Promise(requestAnimationFrame);
    panel.content.activeCellIndex = index;
    await frame(); await frame();
    const start = performance.now();
    const done = code ? panel.sessionContext.session.kernel.requestExecute({code, store_history: false}).done
        : window.jupyterapp.commands.execute('notebook:run-cell');
    while (!test(out)) { await frame(); if (performance.now() - start > 120000) return null }
    await frame(); await frame();
    const took = performance.now() - start;
    await done;
    return took }"""
SCROLL = """async ([shown, what]) => {
    const box = window.jupyterapp.shell.currentWidget.content.widgets[shown].outputArea.node.querySelector(what);
    const frame = () => new Promise(requestAnimationFrame);
    box.scrollTop = 0; await frame(); await frame();
    let worst = 0, last = performance.now();
    for (let k = 1; k <= 40; k++) {
        box.scrollTop = (box.scrollHeight - box.clientHeight) * k / 40;
        await frame();
        const now = performance.now();
        worst = Math.max(worst, now - last); last = now;
    }
    return worst }"""  # noqa: E501
BYTES = """shown => JSON.stringify(window.jupyterapp.shell.currentWidget.content.model.cells.get(shown).outputs.toJSON()).length"""  # noqa: E501


CLEAR = "shown => window.jupyterapp.shell.currentWidget.content.model.cells.get(shown).outputs.clear()"


def measure(lab, n):
    "Yields one dict a measurement with `n` tokens."
    cells = [
        SETUP.format(n=n, circuitsvis=str(fetch("circuitsvis"))),
        WARM,
        *(show for show, *_ in PEERS.values()),
    ]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, lab.root / f"bench{n}.ipynb")
    book = lab.open(f"bench{n}.ipynb")

    def timed(shown, ready, code=None):
        took = book.page.evaluate(TIMED, [shown, shown, ready, code])
        book.wait_idle()
        return took

    timed(0, "true"), timed(1, "out.querySelector('.cb-message') && out.querySelector('.js-plotly-plot')")
    book.page.evaluate(CLEAR, 1)
    for shown, (name, (_, there, recolour, changed, box)) in enumerate(PEERS.items(), 2):
        row, times = {"view": name, "tokens": n}, []
        while len(times) < 3 and None not in times:
            book.page.evaluate(CLEAR, shown)
            times.append(timed(shown, there.format(n=n)))
        yield row | {"what": "show", "ms": None if None in times else statistics.median(times)}
        if recolour:
            times = [timed(shown, changed.format(n=n, k=k), recolour.format(k=k)) for k in (1, 2, 3)]
            yield row | {"what": "recolour", "ms": None if None in times else statistics.median(times)}
        if box:
            yield row | {"what": "scroll", "ms": book.page.evaluate(SCROLL, [shown, box])}
        held = {"cbnb": "len(s.static()._repr_html_())", "ipywidgets.HTML": "len(w.value)"}.get(
            name
        )  # what is kept, in a file without a kernel
        yield row | {
            "what": "bytes",
            "bytes": int(book.execute(f"print({held})")) if held else book.page.evaluate(BYTES, shown),
        }
        book.page.evaluate(CLEAR, shown)  # the next one has the page to itself
    book.page.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, Lab(folder) as lab:
        for n in [int(a) for a in sys.argv[1:]] or SIZES:
            for row in measure(lab, n):
                print(json.dumps(row), flush=True)
