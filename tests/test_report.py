"""The report's picture and page: what they hold, that a stranger's text stays text, that no script runs and
nothing is fetched."""

import base64
import json
import os
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pandas as pd
import plotly.graph_objects as go
import pytest

from cbnb.basics.terminal import visible
from cbnb.report.figures import (
    PANELS,
    curves,
    figure_bundle,
    readable_table,
    report_page,
    show,
    static_svg,
    write_report,
)
from cbnb.step.objectives import run_terms

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7*7 }}{% raw %}",
    "</title></svg><script>",
    "a\x00b\x1b[31m",
    "\ud800",
    "ab\u202ecd",
    "]]>&amp;&#60;script&#62;",
    "<!-- ",
    "' onload='x",
]


def metrics(steps):
    rng = random.Random(0)
    rows = []
    for step in range(1, steps + 1):
        row = {key: rng.uniform(0.01, 1) for _, _, lines, _ in PANELS for key in lines}
        rows.append(
            row | {"step": step, "lr": 1e-3, "grad_norm_kl": row["grad_norm_kl"] if step % 5 == 0 else None}
        )
    rows[0]["loss_kl"] = 0.0
    return rows


TABLE = pd.DataFrame(
    {"before": [1.0, 0.0, None], "after": [0.0123, 0.00031, 0.5], "n": pd.array([80, None, 12], "Int64")},
    index=["attack_success", "heldout_kl in_domain", "exact_match plain"],
)


def no_way_out(text):
    "Nothing in `text` runs or is fetched: no script, no handler, no address but the XML namespace."
    assert "<script" not in text.lower() and "javascript:" not in text.lower()
    assert set(re.findall(r"https?:[^\"' <]*", text)) <= {"http://www.w3.org/2000/svg"}
    for element in ET.fromstring(text).iter():
        assert not [name for name in element.attrib if name.lower().startswith("on")]
        tag = element.tag.removeprefix(SVG)
        assert tag not in {
            "script",
            "iframe",
            "object",
            "embed",
            "link",
            "foreignObject",
            "img",
            "image",
            "use",
            "a",
        }


@pytest.mark.parametrize("steps", [1, 2, 40, 4000])
def test_every_line_of_the_figure_is_in_the_static_picture(steps):
    figure = curves(metrics(steps))
    svg = static_svg(figure)
    no_way_out(svg)
    root = ET.fromstring(svg)
    panels = root.findall(f"{SVG}g")
    assert type(figure) is go.Figure and len(panels) == len(PANELS)
    assert len(svg) < 400_000 and not re.search(r"\b(nan|inf|None)\b", svg)
    for n, (panel, (title, _, lines, _)) in enumerate(zip(panels, PANELS, strict=True), 1):
        texts = [t.text for t in panel.findall(f"{SVG}text")]
        assert any(t.startswith(title) for t in texts)
        drawn = [t for t in figure.data if t.xaxis == ("x" if n == 1 else f"x{n}") and pd.notna(t.y).any()]
        if len(lines) > 1:
            assert {t.name for t in drawn} <= set(texts)
        strokes = {p.get("stroke") for p in panel.findall(f"{SVG}path")} | {
            c.get("fill") for c in panel.findall(f"{SVG}circle")
        }
        assert {t.line.color for t in drawn} <= strokes


def test_lines_lie_inside_their_panels_and_names_do_not_touch():
    root = ET.fromstring(static_svg(curves(metrics(60))))
    for panel in root.findall(f"{SVG}g"):
        # grid first, data after; x and y alternate in "Mx yLx y…"
        numbers = [
            float(v) for p in panel.findall(f"{SVG}path")[1:] for v in re.findall(r"-?\d+\.\d", p.get("d"))
        ]
        assert numbers and -10 <= min(numbers) and max(numbers) < 400
        right = max(float(t.get("x")) for t in panel.findall(f"{SVG}text"))
        names = [
            t
            for t in panel.findall(f"{SVG}text")
            if float(t.get("x")) == right and t.get("text-anchor") == "start"
        ]
        names = sorted(float(t.get("y")) for t in names)
        assert all(b - a >= 13.8 for a, b in zip(names, names[1:]))


def test_a_zero_on_a_log_axis_is_a_triangle_at_its_edge():
    svg = static_svg(curves(metrics(40)))
    assert svg.count("h10l-5 8z") == 1 and "▽ below it" in svg
    above = [row | {"loss_kl": 0.5} for row in metrics(40)]
    assert "▽" not in static_svg(curves(above))


def test_without_rows_it_says_so():
    svg = static_svg(curves([]))
    no_way_out(svg)
    assert "no metrics yet" in [t.text for t in ET.fromstring(svg).iter(f"{SVG}text")]


def test_a_run_of_an_own_objective_whose_words_are_lost_is_drawn():
    "Its status.json was edited or is of an older version: no title says what multiplies its terms."
    terms = run_terms("mine:own")
    assert any(term.factors is None for term in terms.values())
    figure = curves(metrics(9), terms)
    texts = {note.text for note in figure.layout.annotations}
    assert "coefficients" in texts and "reroute term: as mine:own has it" in texts
    ET.fromstring(static_svg(figure))


def test_one_bundle_for_every_front_end(monkeypatch):
    figure, shown = curves(metrics(30)), []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append((bundle, raw)))
    show(figure)
    bundle = figure_bundle(figure)
    assert shown == [(bundle, True)]
    assert list(bundle) == ["application/vnd.plotly.v1+json", "text/html", "text/plain"]
    image = ET.fromstring(bundle["text/html"].replace(">", "/>"))
    kind, data = image.get("src").split(",")
    assert (
        image.tag == "img"
        and kind == "data:image/svg+xml;base64"
        and base64.b64decode(data).decode() == static_svg(figure)
    )
    assert image.get("alt") == bundle["text/plain"] and "to step 30" in bundle["text/plain"]
    # the toolbar's upload button is off
    config = bundle["application/vnd.plotly.v1+json"]["config"]
    assert config["showSendToCloud"] is False and config["plotlyServerURL"] == ""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_text_stays_text(tmp_path, name):
    table = pd.DataFrame(
        [[name, 1.0], [0.5, 2.0]],
        index=pd.Index([name, "unparseable"], dtype=object),
        dtype=object,
        columns=pd.Index([name + "1", "after"], dtype=object),
    )
    path = write_report(
        tmp_path / "report.html",
        name,
        metrics(12),
        table,
        {name: [name], "model": name, "beta_kl": 0.3},
        notes=[name],
    )
    page = path.read_text(encoding="utf-8")
    no_way_out(page)
    assert (
        page.count("<svg") == 1
        and "Content-Security-Policy" in page
        and "49" not in ET.fromstring(page).find("body/h1").text
    )
    safe = visible(name)
    root = ET.fromstring(page)
    assert root.find("head/title").text == root.find("body/h1").text == root.find("body/p").text == safe
    parameters = root.findall("body/table")[1]
    assert parameters.find("tbody/tr[2]/td").text == safe and parameters.find("tbody/tr[3]/td").text == "0.3"


def test_the_page_holds_the_numbers_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write_report(path, "run", metrics(12), TABLE, {"seed": 0}) == path
    assert os.listdir(tmp_path) == ["report.html"]
    rows = ET.parse(path).getroot().findall("body/table")[0].findall("tbody/tr")
    assert [["".join(cell.itertext()) for cell in row] for row in rows] == [
        ["attack success", "1", "0.0123", "80", "share"],
        ["held-out KL, in domain", "0", "3.10e−4", "—", "nats per token"],
        ["exact match, plain", "—", "0.500", "12", "share"],
    ]
    assert path.stat().st_size < 100_000 and "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")


def test_the_page_explains_n_and_shows_no_null(tmp_path):
    given = {"model": None, "tools": "", "seed": 0, "fsdp": False, "gone": [None]}
    page = ET.parse(write_report(tmp_path / "report.html", "run", metrics(12), TABLE, given)).getroot()
    values = ["".join(cell.itertext()) for cell in page.findall("body/table")[1].findall("tbody/tr/td")]
    assert values == ["—", "—", "0", "false", "[null]"]
    words = " ".join("".join(p.itertext()) for p in page.findall("body/p"))
    assert "n: how many answers stand behind a rate." in words and "— is what was not given" in words


def test_a_page_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="row 1 of the metrics has None for its step"):
        write_report(path, "run", [{"loss": 1.0}], TABLE, {})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]


def test_the_table_in_a_notebook_is_escaped_too():
    html = readable_table(pd.DataFrame({"<script>": ["<script>"]}, index=["<script>"])).to_html()
    assert "<script" not in html and html.count("&lt;script&gt;") == 3


def test_the_module_needs_no_torch():
    code = "import sys, cbnb.report.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "C"],
)
@pytest.mark.parametrize(
    "command",
    [
        ("cbnb.report", "RUN"),
        ("cbnb.cli", "status", "RUN"),
        ("cbnb.cli", "train", "--help"),
        ("cbnb.cli", "masks", "--help"),
        ("cbnb.cli", "train", "--no-such-flag", "−"),
        ("cbnb.run", "close", "RUN", "1"),
    ],
    ids=" ".join,
)
def test_a_terminal_that_cannot_print_everything(command, env, tmp_path):
    """A figure's minus sign, a help text's bars and a user's folder are written as well as the terminal can;
    nothing ends in a UnicodeEncodeError."""
    run = tmp_path / "läufe − 1"
    run.mkdir()
    figures = {"attack_success": 0.00031, "n": {"attack": 64}}
    alarms = [{"alarm": "dead", "step": 2, "text": "cosine −0.1 → 0"}]
    write = {
        "status": {"state": "done", "alarms": alarms},
        "result": {"before": figures, "after": figures, "alarms": alarms},
    }
    for name, value in write.items():
        (run / f"{name}.json").write_text(json.dumps(value))
    words = [str(run) if word == "RUN" else word for word in command]
    done = subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUTF8"} | env,
    )
    said = (done.stdout + done.stderr).decode("ascii")
    assert (
        "UnicodeEncodeError" not in said
        and "Traceback" not in said
        and done.returncode == (2 if "--no-such-flag" in command else 0)
    ), said
    if command[0] == "cbnb.report":
        assert "3.10e-4" in said and "cosine -0.1 -> 0" in said


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cbnb.report", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2 and "give a run directory" in done.stderr and "Traceback" not in done.stderr


def test_kl_by_kind_of_token_is_escaped_and_read_with_gaps():
    "From another version, or anyone's: kinds nobody knows are left out, what is missing is a dash."
    kind = {
        "tokens": 40,
        "transcripts": 1,
        "kl": None,
        "worst": 3.0,
        "agreed": 39,
        "top1": 0.975,
        "interval": None,
    }
    tokens = {"<b>": {"all": kind, "call_value": kind, "<script>": kind}}
    results = {"<i>": {"heldout_tokens": tokens, "counts": {"exact_match": {"<script>": [1, 2]}}}}
    page = report_page("t", [], TABLE, {}, results=results)
    no_way_out(page)
    assert (
        "argument values" in page
        and "1 of 2, " in page
        and "&lt;i&gt;, &lt;b&gt;" in page
        and "<td>—</td>" in page
    )
    assert "by kind of token" not in report_page(
        "t", [], TABLE, {}, results={"after": {"heldout_tokens": None}}
    )
